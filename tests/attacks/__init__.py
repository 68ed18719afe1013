"""Makers of hostile and odd files. The tests write them afresh, so that none lies in the repository."""
