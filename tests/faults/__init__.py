"""Faults planted in the product one at a time, to see whether its tests notice: tables as data, and what reads them."""
