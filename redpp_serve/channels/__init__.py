"""Coupled channels: which channels of a network must be kept or taken out together, and the graph without them."""
