"""Graphs, their artifact file, and the program that runs them. Needs torch alone; copied into each archive."""
