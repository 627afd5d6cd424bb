"""Times syntheses beside their peers, on the same memory in the same run, on the CPU or a GPU.

Every contender is first compared with `sago.reference`; one that is wrong has no time. Then each round runs
every contender once, in turn, on retain gradients written anew.

`gb_s` is what the rule has to move at the least over the time: 3 passes over a gradient if it is elementwise
(read f, read r, write the update), 5 if it needs inner products. `of_triad` is that over the bandwidth that
`torch.add(f, r, out=r)` on the same flat buffers reaches in the same run. `first_s` is the first call with
all that is made for it, such as compilation: torch.compile with an empty cache, Triton with what is there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import timing
from benchmarks.contenders import CEILING, ENTRIES, Contender, ceiling, others, ours
from benchmarks.gradients import ALPHA, GAMMA, Gradients, Prepared, Tensors, WrongResult
from benchmarks.measure import origin
from benchmarks.released import RULES
from benchmarks.workloads import SWEEP, WORKLOADS, Shapes, elements, shrink

COLUMNS = (
    "workload", "dtype", "contender", "rule", "stats", "mode", "ms", "p20", "p80",
    "wall_ms", "host_us", "gb_s", "of_triad", "first_s", "note",
)  # fmt: skip
SOURCES = ("kernels", "sago")
DTYPES = ("bfloat16", "float32")
SUITES = ("quick", "full")
WITH_PEERS = ("llama-3-8b", "lora", "llama-3.2-1b")


class Case(NamedTuple):
    workload: str
    dtype: str
    contenders: list[Contender]


class Target(NamedTuple):
    """A bound on the quotient of two measurements, or on one."""

    text: str
    of: Callable[[Callable[..., float | None]], float | None]
    most: bool
    bound: float


def cases(
    suite: str,
    cuda: bool,
    workloads: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Case]:
    """What a suite times, or what of lists, rules and dtypes is named in the place of those of the suite."""
    full = suite == "full"
    sweep = list(SWEEP) if full else list(SWEEP)[::4]
    for workload in workloads or [*WORKLOADS, *sweep]:
        for dtype in dtypes or (DTYPES if full or workload == "llama-3.2-1b" else DTYPES[:1]):
            found = ceiling()
            every = full or (workload == "llama-3.2-1b" and dtype == "bfloat16")
            for rule in rules or (RULES if every else ("sago", "pcgrad")):
                found += _ours(rule, full, workload, cuda)
                if full or workload in (*WITH_PEERS, *SWEEP):
                    # A list compiled as one function takes a minute or more.
                    lists = workload != "tiny" if full else (workload, rule) == ("lora", "sago")
                    peers = others(rule, compile_lists=lists and cuda and dtype == "bfloat16")
                    found += [p for p in peers if workload not in SWEEP or p.name == "torch.compile, flat"]
            yield Case(workload, dtype, found)


def _ours(rule: str, full: bool, workload: str, cuda: bool) -> Iterator[Contender]:
    main = rule in ("sago", "pcgrad")
    for stats in (True, False):
        for entry in ENTRIES:
            for mode in ("eager", "graph") if cuda else ("eager",):
                few = workload not in WITH_PEERS or not main
                if not full and few and (entry, mode) not in (("synthesize_", "eager"), ("Plan", "graph")):
                    continue
                if full or stats or rule == "sago":
                    yield ours(rule, stats, entry, mode)


def run(
    device: str = "cpu",
    suite: str = "quick",
    workloads: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    most: int | None = None,
    repeats: int = 20,
    seconds: float = 0.5,
    write: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Times the cases of a suite and calls `write` with the record so far after each.

    Args:
        most: Elements that a list is shrunk to, if it has more.
        repeats, seconds: See `timing.rounds`.
    """
    record: dict[str, Any] = {
        **origin(device, *SOURCES),
        "suite": suite,
        "repeats": repeats,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "workloads": {},
        "targets": [],
        "rows": [],
    }
    for case in cases(suite, device == "cuda", workloads, rules, dtypes):
        shapes = {**WORKLOADS, **SWEEP}[case.workload]
        shapes = shapes if most is None else shrink(shapes, most)
        record["workloads"][case.workload] = {"tensors": len(shapes), "elements": elements(shapes)}
        record["rows"] += measure(case, shapes, device, repeats, seconds)
        if device == "cuda" and most is None:
            record["targets"] = targets(record["rows"])
        write(record)
    return record


def measure(case: Case, shapes: Shapes, device: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case. What cannot be run, or is wrong, has a note in the place of a time."""
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
        except Exception as error:
            # Compilers and peers raise what they like. The row says so, and the others are worth having.
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
    """Prepares a contender and checks its updates, or raises `WrongResult`; the seconds of its first call."""
    start = time.perf_counter()
    prepared = contender.prepare(gradients)
    prepared.restore()
    updates = prepared.run()
    if gradients.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    _check(contender, gradients, updates)
    del updates  # a GPU may have no room for them twice
    prepared.restore()
    _check(contender, gradients, prepared.run())  # a second call may go another way than the first
    return prepared, seconds


def targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The aims for a GPU that these rows can tell about, and whether they are met."""
    found = []
    for text, of, most, bound in TARGETS:
        value = of(partial(_value, rows))
        if value is not None:
            met = value <= bound if most else value >= bound
            found.append({"target": text, "bound": f"{'<=' if most else '>='} {bound:g}", "found": value})
            found[-1]["met"] = met
    return found


def _check(contender: Contender, gradients: Gradients, updates: Tensors) -> None:
    gradients.check(contender.label, contender.rule, updates, contender.tolerance[gradients.dtype])


def _fresh_cache() -> AbstractContextManager[Any]:
    from torch._inductor import utils

    return utils.fresh_cache() if hasattr(utils, "fresh_cache") else utils.fresh_inductor_cache()


def _row(case: Case, contender: Contender) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "rounds"))
    row.update(workload=case.workload, dtype=case.dtype, contender=contender.name, rule=contender.rule)
    row.update(stats=contender.stats, mode=contender.mode, in_place=contender.in_place)
    return row


def _times(
    contender: Contender, samples: Sequence[timing.Sample], numel: int, itemsize: int
) -> dict[str, Any]:
    ms = [s.ms for s in samples]
    median = statistics.median(ms)
    # Elements, bytes an element, passes; in GB a second.
    gb_s = contender.passes * itemsize * numel / (1e6 * median)
    walls = [s.wall_ms for s in samples if s.wall_ms is not None]
    hosts = [s.host_ms for s in samples if s.host_ms is not None]
    return {
        "ms": median,
        "p20": timing.percentile(ms, 0.2),
        "p80": timing.percentile(ms, 0.8),
        "wall_ms": statistics.median(walls) if walls else None,
        "host_us": 1e3 * statistics.median(hosts) if hosts else None,
        "gb_s": gb_s,
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


def _value(rows: Sequence[Mapping[str, Any]], field: str, *labels: Any) -> float | None:
    names = ("workload", "contender", "rule", "stats", "mode")
    for row in rows:
        if row["dtype"] == "bfloat16" and all(row[n] == x for n, x in zip(names, labels, strict=False)):
            return row[field]
    return None


def _ratio(above: tuple[Any, ...], below: tuple[Any, ...]) -> Callable[..., float | None]:
    def of(value: Callable[..., float | None]) -> float | None:
        x, y = value("ms", *above), value("ms", *below)
        return x / y if x and y else None

    return of


def _single(field: str, *labels: Any) -> Callable[..., float | None]:
    return lambda value: value(field, *labels)


def _entry(
    rule: str, stats: bool, workload: str = "llama-3-8b", entry: str = "synthesize_", mode: str = "eager"
) -> tuple[Any, ...]:
    return workload, f"sago.{entry}", rule, stats, mode


_SAGO, _PCGRAD = (_entry(rule, True) for rule in ("sago", "pcgrad"))
_LORA = _entry("sago", False, "lora")

# The aims of the project for a GPU, in bf16, and for llama-3-8b with statistics unless a name says otherwise.
# A wall time has the launches and the wait for the device in it.
TARGETS = (
    Target("sago: of the triad", _single("of_triad", *_SAGO), False, 0.92),
    Target("pcgrad over sago", _ratio(_PCGRAD, _SAGO), True, 1.67),
    Target("released over sago", _ratio(("llama-3-8b", "released", "sago"), _SAGO), False, 20),
    Target("released over pcgrad", _ratio(("llama-3-8b", "released", "pcgrad"), _PCGRAD), False, 5),
    Target(
        "sago over torch.compile, 2^30",
        _ratio(_entry("sago", False, "2^30"), ("2^30", "torch.compile, flat", "sago")),
        True,
        1.02,
    ),
    Target("torch.compile over sago, lora", _ratio(("lora", "torch.compile, list", "sago"), _LORA), False, 3),
    Target("sago, lora: wall_ms", _single("wall_ms", *_LORA), True, 0.06),
    Target("sago, lora, graph: ms", _single("ms", *_LORA[:-1], "graph"), True, 0.015),
    Target("sago: host_us", _single("host_us", *_SAGO), True, 50),
    *(
        Target(f"sago.{entry}: host_us", _single("host_us", *_entry("sago", True, entry=entry)), True, 15)
        for entry in ("Plan", "GradientBuckets")
    ),
)
