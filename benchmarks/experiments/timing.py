"""Times on a CUDA device: experiments on the second read beside what ships, and configurations.

Every contender is a CUDA graph, so that the host is left out, and runs in turn with the others; before
each, retain is restored and the L2 is overwritten. Nothing is timed before its update has the bits of the
one that ships.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks.experiments import cache, kernels, sweep
from benchmarks.measure import origin
from sago.rules import RULES

COLUMNS = ("workload", "dtype", "contender", "ms", "p20", "p80", "ratio", "predicted_ratio")
SWEEP_COLUMNS = ("workload", "dtype", "rule", "block", "threads", "ms", "p20", "p80", "ratio")
GAMMA, ALPHA = 0.75, 1.25
SHIPPED = "sago.synthesize_"
SOURCES = ("kernels", "sago", "benchmarks/experiments")

Shapes = Sequence[tuple[int, ...]]


class WrongResult(RuntimeError):
    """A contender has other bits than what ships, so there is nothing to report."""


def inputs(shapes: Shapes, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients that conflict as a whole: every tensor is projected."""
    generator = torch.Generator("cuda").manual_seed(0)
    forget, retain = [], []
    for shape in shapes:
        r = torch.randn(shape, generator=generator, device="cuda")
        forget.append(torch.randn(shape, generator=generator, device="cuda").sub_(r, alpha=0.3).to(dtype))
        retain.append(r.to(dtype))
    return forget, retain


def second_read(
    workloads: dict[str, Shapes], dtypes: Sequence[torch.dtype], rounds: int = 20
) -> dict[str, Any]:
    """Every experiment on pcgrad without statistics, and `sago`, which reads once."""
    rows = []
    for dtype in dtypes:
        for workload, shapes in workloads.items():
            sizes = [math.prod(shape) for shape in shapes]
            forget, retain = inputs(shapes, dtype)
            work = [r.clone() for r in retain]
            calls: dict[str, Callable[[], Any]] = {
                SHIPPED: partial(sago.synthesize_, forget, work, "pcgrad", GAMMA, ALPHA, stats=False)
            }
            for name, experiment in kernels.EXPERIMENTS.items():
                if "resident" not in experiment.phases or max(sizes) <= kernels.CHUNK:
                    launches = kernels.prepare(experiment, forget, work, RULES["pcgrad"], GAMMA, ALPHA, work)
                    calls[name] = partial(kernels.run, launches)
            check(calls, work, retain)
            calls["sago (3s)"] = partial(sago.synthesize_, forget, work, "sago", GAMMA, ALPHA, stats=False)
            times = measure(calls, work, retain, rounds)
            base = statistics.median(times[SHIPPED])
            labels = {"workload": workload, "dtype": str(dtype).removeprefix("torch.")}
            for name, taken in times.items():
                predicted = _predicted(name, sizes, dtype.itemsize)
                rows.append(
                    {**labels, "contender": name, **_shown(taken, base), "predicted_ratio": predicted}
                )
    return {**origin("cuda", *SOURCES), "rounds": rounds, "rows": rows}


def configurations(
    workloads: dict[str, Shapes],
    dtypes: Sequence[torch.dtype],
    rounds: int = 20,
    blocks: Sequence[int] = sweep.BLOCKS,
    threads: Sequence[int] = sweep.THREADS,
) -> dict[str, Any]:
    """Combine without sums for every BLOCK and number of threads. `ratio` is to what ships."""
    from sago.kernels import Batch
    from sago.kernels import combine as launcher

    rows = []
    for dtype in dtypes:
        for workload, shapes in workloads.items():
            forget, retain = inputs(shapes, dtype)
            work = [r.clone() for r in retain]
            batch = Batch(work[0].device, forget, work, work, [0] * len(work), 1)
            gram = torch.tensor([[1.0, -0.3, 1.0]], dtype=torch.float64, device="cuda")
            for name in sweep.RULES:
                rule = RULES[name]
                numbers = None if rule.scope == "element" else gram
                call = partial(launcher, batch, rule, GAMMA, ALPHA, 0.0, numbers, 0)
                calls = {"shipped": call}
                for block in blocks:
                    for n in threads:
                        calls[f"{block} {n}"] = partial(_configured, batch, call, block, n)
                check(calls, work, retain)
                times = measure(calls, work, retain, rounds)
                base = statistics.median(times["shipped"])
                labels = {"workload": workload, "dtype": str(dtype).removeprefix("torch."), "rule": name}
                for config, taken in times.items():
                    shipped = config == "shipped"
                    block, n = (None, None) if shipped else map(int, config.split())
                    rows.append({**labels, "block": block, "threads": n, **_shown(taken, base)})
    return {**origin("cuda", *SOURCES), "rounds": rounds, "rows": rows}


class _Configured:
    """A kernel with other constants than it is asked for, which its launcher does not remember."""

    def __init__(self, kernel: Any, **changed: int) -> None:
        self._kernel, self._changed = kernel, changed

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._kernel[grid](*args, **kwargs | self._changed)

        return launch


def _configured(batch: Any, call: Callable[[], Any], block: int, threads: int) -> None:
    from importlib import import_module

    module = import_module("sago.kernels.combine")
    kernel = _Configured(module._combine_kernel, BLOCK=block, num_warps=threads // 32)
    for part in batch.parts:
        part.compiled.clear()
    with mock.patch.object(module, "_combine_kernel", kernel):
        call()


def check(calls: dict[str, Callable[[], Any]], work: Sequence[Tensor], retain: Sequence[Tensor]) -> None:
    """Runs every contender and raises `WrongResult` if its update is not that of the first, bit for bit."""
    expected: list[Tensor] = []
    for name, call in tqdm(calls.items(), desc="check"):
        _restore(work, retain)
        call()
        if not expected:
            expected = [w.clone() for w in work]
        elif not all(torch.equal(w, e) for w, e in zip(work, expected, strict=True)):
            raise WrongResult(f"{name} has not the bits of {next(iter(calls))}. Nothing is reported.")


def measure(
    calls: dict[str, Callable[[], Any]], work: Sequence[Tensor], retain: Sequence[Tensor], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every round of every contender."""
    flush = torch.empty(
        4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda"
    )
    replays = {name: graphed(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in tqdm(range(rounds), desc="time"):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            _restore(work, retain)
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replays[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda kept=kept: graph.replay()  # type: ignore[misc]


def _restore(work: Sequence[Tensor], retain: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(work), list(retain))


def _predicted(name: str, sizes: Sequence[int], itemsize: int) -> float | None:
    """The time of an order by that of two launches, after the model; None if it lacks the order or GPU."""
    machine = next((m for m in cache.MACHINES if m.name in torch.cuda.get_device_name()), None)
    orders = {order.name: order for order in cache.ORDERS}
    if machine is None or name not in orders:
        return None
    one, base = (
        cache.simulate(sizes, itemsize, machine, orders[n])["time_of_5s"] for n in (name, "two launches")
    )
    return one / base


def _shown(taken: Sequence[float], base: float) -> dict[str, float]:
    fifths = statistics.quantiles(taken, n=5)
    median = statistics.median(taken)
    return {"ms": median, "p20": fifths[0], "p80": fifths[3], "ratio": median / base}
