"""Gradients that are distributed over ranks."""
