"""How long a call takes, on the CPU and on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.gradients import Prepared

_HEAD_START = 1_000_000  # cycles of a GPU, about half a millisecond


class Sample(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        ms: On the CPU of the call. On a GPU from its first to its last kernel, by events, with a head start
            for the host: time in which the GPU waits for the host shows only beyond that, or where the call
            itself waits for the GPU.
        wall_ms: On a GPU from an idle device to an idle device, launches included.
        host_ms: On a GPU until the call returned, of the time that `ms` has.
    """

    ms: float
    wall_ms: float | None = None
    host_ms: float | None = None


class Clock:
    """Takes samples on a device. What a call reads is not in the L2 cache of a GPU when it starts."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._other = torch.empty(max(2 * cache, 1 << 26), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Leaves other memory in the cache, and an idle device."""
        if self._cuda:
            self._other.zero_()
            torch.cuda.synchronize()

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def sample(self, prepared: Prepared) -> Sample:
        prepared.restore()
        self.flush()
        start = time.perf_counter()
        prepared.run()
        self.wait()
        wall = _since(start)
        if not self._cuda:
            return Sample(wall)

        prepared.restore()
        self._other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        start = time.perf_counter()
        prepared.run()
        host = _since(start)
        end.record()
        self.wait()
        return Sample(begin.elapsed_time(end), wall, host)


def _since(start: float) -> float:
    """In milliseconds."""
    return 1e3 * (time.perf_counter() - start)


def rounds(
    everyone: Sequence[Prepared], clock: Clock, repeats: int, seconds: float, label: str
) -> tuple[list[list[Sample]], dict[int, RuntimeError]]:
    """Everyone once a round; whoever has spent `seconds`, with restoring, has done after five.

    Returns the samples, and the errors of those that raised, which were not called again.
    """
    samples: list[list[Sample]] = [[] for _ in everyone]
    errors: dict[int, RuntimeError] = {}
    spent = [0.0] * len(everyone)
    for turn in tqdm(range(repeats), desc=label):
        for i in range(len(everyone)):
            i = (i + turn) % len(everyone)  # so that nobody always follows the same neighbour
            if i in errors or (len(samples[i]) >= 5 and spent[i] > seconds):
                continue
            start = time.perf_counter()
            try:
                samples[i].append(clock.sample(everyone[i]))
            except RuntimeError as error:  # out of memory is one
                errors[i] = error.with_traceback(None)  # whose frames hold what it had allocated
            spent[i] += time.perf_counter() - start
    return samples, errors


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    at = share * (len(values) - 1)
    low, high = sorted(values)[math.floor(at)], sorted(values)[math.ceil(at)]
    return low + (at - math.floor(at)) * (high - low)
