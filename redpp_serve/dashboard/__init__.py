"""A page with live numbers of both versions for people without Grafana: scraped, kept for minutes, on loopback."""
