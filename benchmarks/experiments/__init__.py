"""What was tried and does not ship: orders of work for the second read, and configurations of the kernels.

`python -m benchmarks.experiments` runs them; docs/performance.md has predictions and outcomes. Nothing here
is imported by the library. What measures better on a GPU moves there; until then users get two launches.
"""
