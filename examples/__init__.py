"""Runnable examples of the library on a small language model."""
