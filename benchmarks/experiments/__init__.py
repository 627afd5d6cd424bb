"""Experiments on the second read of the rules with inner products; see docs/performance.md.

Nothing here is imported by the library. What wins on a GPU moves there; until then users get two launches.
"""
