"""Measures the time of a call, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.gradients import Prepared

_HEAD_START = 1_000_000  # cycles of a GPU, about half a millisecond


class Sample(NamedTuple):
    """The milliseconds of one call.

    Attributes:
        ms: On the CPU, the time of the call. On a GPU, the time between two events around the call. The GPU
            sleeps before the first event, so that the host has queued the launches when the kernels start.
        wall_ms: On a GPU, the time from an idle device to an idle device. It includes the launches.
        host_ms: On a GPU, the time until the call returned.
    """

    ms: float
    wall_ms: float | None = None
    host_ms: float | None = None


class Clock:
    """Takes samples on a device. On a GPU the L2 cache holds other data when a call starts."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._other = torch.empty(max(2 * cache, 1 << 26), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Fills the L2 cache with other memory, and waits for the device."""
        if self._cuda:
            self._other.zero_()
            self.wait()

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def sample(self, prepared: Prepared) -> Sample:
        prepared.restore()
        self.flush()
        start = time.perf_counter()
        prepared.run()
        self.wait()
        wall = 1e3 * (time.perf_counter() - start)
        if not self._cuda:
            return Sample(wall)

        prepared.restore()
        self._other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        start = time.perf_counter()
        prepared.run()
        host = 1e3 * (time.perf_counter() - start)
        end.record()
        self.wait()
        return Sample(begin.elapsed_time(end), wall, host)


def rounds(
    everyone: Sequence[Prepared], clock: Clock, repeats: int, seconds: float, label: str
) -> tuple[list[list[Sample]], dict[int, RuntimeError]]:
    """Calls everyone once in each of `repeats` rounds.

    A contender that has spent `seconds`, including the restoring of its gradients, stops after five samples.
    A contender that raises is not called again. Returns the samples and the errors.
    """
    samples: list[list[Sample]] = [[] for _ in everyone]
    errors: dict[int, RuntimeError] = {}
    spent = [0.0] * len(everyone)
    for turn in tqdm(range(repeats), desc=label):
        for i in range(len(everyone)):
            i = (i + turn) % len(everyone)  # a contender does not always follow the same neighbour
            if i in errors or (len(samples[i]) >= 5 and spent[i] > seconds):
                continue
            start = time.perf_counter()
            try:
                samples[i].append(clock.sample(everyone[i]))
            except RuntimeError as error:  # out of memory is one
                errors[i] = error.with_traceback(None)  # the frames hold the memory that it had allocated
            spent[i] += time.perf_counter() - start
    return samples, errors
