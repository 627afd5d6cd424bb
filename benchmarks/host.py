"""Measures the host time of a synthesis from its second call on, without a GPU.

Triton compiles for sm_90, binds and launches as on a GPU. A stub stands for the CUDA driver
(`benchmarks.driver`), and tensors are on the CPU. The times are therefore those of Python, torch and Triton
alone. A real driver and the caching allocator of a GPU add their own.

`calls` counts the functions that are called from Python, in Python or C. It is the same on every machine. It
is also the same for any number of tensors, if nothing is called for each of them. Buckets are timed after the
captures of a window, which leave the caches of the CPU as cold as a training step does.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import sago
from benchmarks.driver import StubDriver
from benchmarks.measure import origin, percentile

COLUMNS = ("entry", "rule", "statistics", "pairs", "launches", "calls", "us", "p20", "p80", "target", "met")
# Microseconds for 291 pairs, with one launch and with two.
TARGETS = {"list": (110.0, 110.0), "plan": (15.0, 25.0), "buckets": (150.0, 150.0)}


def run(pairs: Sequence[int] = (291,), repeats: int = 300) -> dict[str, Any]:
    """Counts the calls and measures the times of every entry point on lists of these lengths."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        driver = StubDriver(Path(folder))
        names = ("sago.core.checks.choose_backend", "sago.capture.buckets.choose_backend")
        with mock.patch(names[0], _triton), mock.patch(names[1], _triton):
            for count in pairs:
                for entry, rule, stats, prepare, call in _entries(count):
                    prepare()
                    call()
                    driver.launches()
                    prepare()
                    calls = _calls(call)
                    launches = len(driver.launches())
                    times = []
                    for _ in range(repeats):
                        prepare()
                        start = time.perf_counter()
                        call()
                        times.append(1e6 * (time.perf_counter() - start))
                        driver.launches()
                    median = statistics.median(times)
                    target = TARGETS[entry][launches - 1] if count == 291 else None
                    rows.append({
                        "entry": entry, "rule": rule, "statistics": stats, "pairs": count,
                        "launches": launches, "calls": calls, "us": median,
                        "p20": percentile(times, 0.2), "p80": percentile(times, 0.8),
                        "target": target and f"<= {target:g} us", "met": target and median <= target,
                    })  # fmt: skip
    return {**origin("cpu", "kernels", "sago"), "repeats": repeats, "rows": rows}


def _triton(backend: str | None, device: torch.device) -> str:
    return "triton"


def _entries(count: int) -> Iterator[tuple[str, str, bool, Callable[[], Any], Callable[[], Any]]]:
    """Yields entry point, rule, whether statistics are taken, the preparation of a call, and the call."""
    forget, retain = ([torch.ones(64, 64) for _ in range(count)] for _ in range(2))
    params = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(count)]
    buckets = sago.GradientBuckets(params)

    def window() -> None:
        buckets.zero_()
        for capture in (buckets.forget, buckets.retain):
            with capture():
                for p in params:
                    assert p.grad is not None
                    p.grad.add_(1.0)

    for rule in ("sago", "pcgrad"):
        for stats in (True, False):
            plan = sago.Plan(forget, retain, rule, stats=stats)
            yield "plan", rule, stats, lambda: None, plan.synthesize_
            yield (
                "list", rule, stats, lambda: None,
                lambda r=rule, s=stats: sago.synthesize_(forget, retain, r, stats=s, backend="triton"),
            )  # fmt: skip
            yield "buckets", rule, stats, window, lambda r=rule, s=stats: buckets.synthesize_(r, stats=s)


def _calls(call: Callable[[], Any]) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # without the last call of setprofile
