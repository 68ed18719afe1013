"""Coupled channels: which channels of a network go together, and how to take some out."""
