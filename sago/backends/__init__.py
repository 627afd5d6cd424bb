"""Implementations of the two operations of a synthesis, `gram` and `combine`."""
