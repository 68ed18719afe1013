"""What was done and measured, for programs (report.json), people (report.html) and the terminal."""
