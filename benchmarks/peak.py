"""Measures the peak of the memory that torch allocates, on the CPU and on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType

MIB = 2**20


class Peak:
    """Bytes above the level at the start: `bytes` at the highest point, `kept` at the end."""

    bytes = 0
    kept = 0


@contextmanager
def peak(device: str = "cpu") -> Iterator[Peak]:
    """Counts the memory that torch allocates inside the block.

    On the CPU, the profiler reports every allocation, also those inside of an operator or of compiled code.
    Older memory that is freed inside the block is not counted there. On a GPU it is.
    """
    found = Peak()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - start
        found.kept = torch.cuda.memory_allocated(device) - start
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    live: dict[int, int] = {}  # bytes by address
    level = 0
    for event in sorted(_allocations(profile), key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        # Memory from before the block, which another object may free inside it, is not counted.
        level -= live.pop(fields.ptr, 0)
        if fields.alloc_size > 0:
            live[fields.ptr] = fields.alloc_size
            level += fields.alloc_size
        found.bytes = max(found.bytes, level)
    found.kept = level


def _allocations(profile: torch.profiler.profile) -> Iterator[Any]:
    """The events of the profiler in which memory is allocated or freed."""
    assert profile.profiler is not None
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            yield event
