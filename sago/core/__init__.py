"""Checks, layout and execution of a synthesis."""
