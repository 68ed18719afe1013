"""A page with live numbers of both versions for people without Grafana, on the loopback address."""
