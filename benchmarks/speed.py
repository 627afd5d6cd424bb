"""Times syntheses beside their peers, on the same memory in the same run, on the CPU or a GPU.

Every contender is first compared with `sago.reference`. A contender with a wrong update has a note in the
place of a time. Then each round calls every contender once, on retain gradients that were written again.

`gb_s` divides the least bytes of the rule by the time: 3 passes over a gradient for an elementwise rule (it
reads f, reads r and writes the update), 5 for a rule with inner products. `of_triad` divides that by the
bandwidth of `torch.add(f, r, out=r)` on the same flat buffers in the same run. `first_s` is the time of the
first call with everything that it prepares. torch.compile starts with an empty cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import timing
from benchmarks.contenders import CEILING, ENTRIES, Contender, ceiling, others, ours
from benchmarks.gradients import ALPHA, GAMMA, Gradients, Prepared, WrongResult
from benchmarks.measure import origin, percentile
from benchmarks.released import RULES
from benchmarks.workloads import SIZES, WORKLOADS, Shapes, elements, shrink

COLUMNS = (
    "workload", "dtype", "contender", "rule", "stats", "mode", "ms", "p20", "p80",
    "wall_ms", "host_us", "gb_s", "of_triad", "first_s", "note",
)  # fmt: skip
DTYPES = ("bfloat16", "float32")
WITH_PEERS = ("llama-3-8b", "lora", "llama-3.2-1b", "tiny")


class Case(NamedTuple):
    workload: str
    dtype: str
    contenders: list[Contender]


def cases(
    cuda: bool,
    workloads: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Yields the cases of the named lists, rules and dtypes. Three lists and the flat tensors have peers.

    By default lists are timed in bfloat16 with `sago` and `pcgrad`, and llama-3.2-1b in both dtypes and with
    every rule.
    """
    for workload in workloads or [*WORKLOADS, *SIZES]:
        for dtype in dtypes or (DTYPES if workload == "llama-3.2-1b" else DTYPES[:1]):
            found = ceiling()
            every = workload == "llama-3.2-1b" and dtype == "bfloat16"
            for rule in rules or (RULES if every else ("sago", "pcgrad")):
                found += _ours(rule, workload, cuda)
                if workload in (*WITH_PEERS, *SIZES):
                    # The compilation of a list as one function takes a minute or more.
                    lists = cuda and dtype == "bfloat16" and (workload, rule) == ("lora", "sago")
                    peers = others(rule, compile_lists=lists)
                    found += [p for p in peers if workload not in SIZES or p.name == "torch.compile, flat"]
            yield Case(workload, dtype, found)


def _ours(rule: str, workload: str, cuda: bool) -> Iterator[Contender]:
    every = workload in WITH_PEERS and rule in ("sago", "pcgrad")
    for stats in (True, False) if rule == "sago" else (True,):
        for entry in ENTRIES:
            for mode in ("eager", "graph") if cuda else ("eager",):
                if every or (entry, mode) in (("synthesize_", "eager"), ("Plan", "graph")):
                    yield ours(rule, stats, entry, mode)


def run(
    device: str,
    chosen: Iterable[Case],
    most: int | None = None,
    repeats: int = 20,
    seconds: float = 0.5,
    write: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Times the chosen cases, and calls `write` with the record so far after each.

    Args:
        most: The number of elements that a longer list is shrunk to.
        repeats, seconds: See `timing.rounds`.
    """
    record: dict[str, Any] = {
        **origin(device, "kernels", "sago"),
        "repeats": repeats,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "workloads": {},
        "targets": [],
        "rows": [],
    }
    for case in chosen:
        shapes = {**WORKLOADS, **SIZES}[case.workload]
        shapes = shapes if most is None else shrink(shapes, most)
        record["workloads"][case.workload] = {"tensors": len(shapes), "elements": elements(shapes)}
        record["rows"] += measure(case, shapes, device, repeats, seconds)
        if device == "cuda" and most is None:
            record["targets"] = targets(record["rows"])
        write(record)
    return record


def measure(case: Case, shapes: Shapes, device: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Returns the rows of a case. A contender that fails or is wrong has a note instead of a time."""
    label = f"{case.workload} {case.dtype}"
    rows = [_row(case, contender) for contender in case.contenders]
    try:
        gradients = Gradients(shapes, getattr(torch, case.dtype), device)
        clock = timing.Clock(gradients.device)
    except torch.OutOfMemoryError:
        return [{**row, "note": "out of memory"} for row in rows]
    ready: list[tuple[Contender, dict[str, Any], Prepared]] = []
    for contender, row in zip(tqdm(case.contenders, desc=f"check {label}"), rows, strict=True):
        try:
            with _fresh_cache() if contender.compiles else nullcontext():
                prepared, row["first_s"] = first(contender, gradients)
        except (
            Exception
        ) as error:  # compilers and peers raise errors of no common class; the row shows the error
            row["note"] = _note(error)
        else:
            ready.append((contender, row, prepared))
        _collect(device)
    samples, errors = timing.rounds([p for _, _, p in ready], clock, repeats, seconds, label)
    for i, (contender, row, _) in enumerate(ready):
        if i in errors:
            row["note"] = _note(errors[i])
        else:
            row.update(_times(contender, samples[i], sum(gradients.numels), gradients.dtype.itemsize))
    triad = next((row["gb_s"] for row in rows if row["contender"] == CEILING), None)
    for row in rows:
        row["of_triad"] = row["gb_s"] and triad and row["gb_s"] / triad
    del ready, gradients
    _collect(device)
    return rows


def first(contender: Contender, gradients: Gradients) -> tuple[Prepared, float]:
    """Prepares a contender and checks its updates. Returns it with the seconds of its first call.

    Raises `WrongResult` if an update of the first or second call is wrong.
    """
    check = partial(gradients.check, contender.label, contender.rule)
    tolerance = contender.tolerance[gradients.dtype]
    start = time.perf_counter()
    prepared = contender.prepare(gradients)
    prepared.restore()
    updates = prepared.run()
    if gradients.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    check(updates, tolerance)
    del updates  # a GPU may not have the memory to hold them twice
    prepared.restore()
    check(prepared.run(), tolerance)  # a second call may take another path than the first
    return prepared, seconds


def _fresh_cache() -> AbstractContextManager[Any]:
    from torch._inductor import utils

    return utils.fresh_cache() if hasattr(utils, "fresh_cache") else utils.fresh_inductor_cache()


def _row(case: Case, contender: Contender) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "rounds"))
    row.update({name: getattr(contender, name) for name in ("label", "rule", "stats", "mode", "in_place")})
    return {**row, "workload": case.workload, "dtype": case.dtype, "contender": contender.name}


def _times(
    contender: Contender, samples: Sequence[timing.Sample], numel: int, itemsize: int
) -> dict[str, Any]:
    ms = [s.ms for s in samples]
    walls = [s.wall_ms for s in samples if s.wall_ms is not None]
    hosts = [s.host_ms for s in samples if s.host_ms is not None]
    return {
        "ms": statistics.median(ms),
        "p20": percentile(ms, 0.2),
        "p80": percentile(ms, 0.8),
        "wall_ms": statistics.median(walls) if walls else None,
        "host_us": 1e3 * statistics.median(hosts) if hosts else None,
        # passes * bytes of an element * elements, in GB a second
        "gb_s": contender.passes * itemsize * numel / (1e6 * statistics.median(ms)),
        "rounds": len(samples),
    }


def _note(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    message = next(iter(str(error).splitlines()), "")
    return f"{'wrong' if isinstance(error, WrongResult) else type(error).__name__}: {message}"


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# The aims of the project for a GPU, in bfloat16: a row, its field, the milliseconds to subtract, a row whose
# `ms` divides, and the bound.
SAGO, PCGRAD = (f"llama-3-8b sago.synthesize_ {rule}, statistics" for rule in ("sago", "pcgrad"))
LORA, COPY = "lora sago.synthesize_ sago, no statistics", f"lora {CEILING} add"
TARGETS = (
    (SAGO, "of_triad", 0.0, None, ">=", 0.92),
    (PCGRAD, "ms", 0.0, SAGO, "<=", 1.67),
    (SAGO, "ms", 0.0, "llama-3-8b released sago", "<=", 1 / 20),
    (PCGRAD, "ms", 0.0, "llama-3-8b released pcgrad", "<=", 1 / 5),
    ("2^30 sago.synthesize_ sago, no statistics", "ms", 0.0, "2^30 torch.compile, flat sago", "<=", 1.02),
    (LORA, "ms", 0.0, "lora torch.compile, list sago", "<=", 1 / 3),
    (LORA, "wall_ms", 0.03, COPY, "<=", 1.15),
    (f"{LORA}, graph", "ms", 0.005, COPY, "<=", 1.10),
    (SAGO, "host_us", 0.0, None, "<=", 110),
    ("llama-3-8b sago.Plan sago, statistics", "host_us", 0.0, None, "<=", 15),
    ("llama-3-8b sago.GradientBuckets sago, statistics", "host_us", 0.0, None, "<=", 150),
)


def targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the targets for which these rows have the numbers, and whether they are met."""
    named = {f"{row['workload']} {row['label']}": row for row in rows if row["dtype"] == "bfloat16"}
    found = []
    for name, field, allow, over, sense, bound in TARGETS:
        value = named.get(name, {}).get(field)
        by = 1.0 if over is None else named.get(over, {}).get("ms")
        if value is not None and by is not None:
            value = (value - allow) / by
            row = {
                "target": name,
                "field": field,
                "allow": allow,
                "over": over,
                "bound": f"{sense} {bound:.3g}",
            }
            found.append({**row, "found": value, "met": value <= bound if sense == "<=" else value >= bound})
    return found
