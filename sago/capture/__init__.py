"""Extraction of one gradient for each task."""
