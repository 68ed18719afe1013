"""Intervals, sequences and verdicts that comparison and A/B share."""
