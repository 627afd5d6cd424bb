"""Times a synthesis on the CPU beside what people write instead, and measures the accuracy of the sums.

Forget and retain are random normal and correlated at about -0.29, so that two thirds of the elements conflict
and pcgrad projects. Every contender is first compared with `sago.reference`; if one is wrong, nothing is
reported. Then each round runs every contender once, in turn, on a fresh copy of retain.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks import peers
from benchmarks.measure import machine, source_hash
from benchmarks.released import released
from sago import compiled, reference

GAMMA, ALPHA = 0.75, 1.25
COLUMNS = (
    "dtype", "contender", "in_place", "ms", "p20", "p80",
    "ratio_to_add", "faster_than_released", "target", "met",
)  # fmt: skip
ACCURACY_COLUMNS = ("dtype", "backend", "rule", "statistics", "ff", "fr", "rr", "target", "met")
_SLICE = 1 << 22

Tensors = Sequence[Tensor]


class Contender(NamedTuple):
    """What is timed: `run(forget, retain, gamma, alpha)` returns the updates of `rule`.

    An update may be off by `tolerance[dtype] * (|f| + |r|)`; 0 asks for the same bits.
    """

    name: str
    rule: str
    in_place: bool
    run: Callable[..., Any]
    tolerance: dict[torch.dtype, float]


class WrongResult(RuntimeError):
    """A contender disagrees with the reference, so there is nothing to report."""


def _ours(rule: str, stats: bool, forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    sago.synthesize_(forget, retain, rule=rule, gamma=gamma, alpha=alpha, stats=stats)
    return retain


def _theirs(rule: str, forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    return released(forget, retain, rule, gamma, alpha)


EXACT = {torch.bfloat16: 0.0, torch.float32: 0.0}
# The coefficient may differ in its last bits, and the update, of at most 1.5 * (|f| + |r|) here, be rounded
# the other way: one step of bf16 is 2^-7 of its value.
ROUNDING = {torch.bfloat16: 1.5 * 2**-7, torch.float32: 2**-22}
# The released pcgrad rounds each of its steps, and its inner products, to the dtype of the gradients.
RELEASED = {torch.bfloat16: 2**-6, torch.float32: 2**-20}

CONTENDERS = (
    Contender("sago", "sago", True, partial(_ours, "sago", False), EXACT),
    Contender("sago, statistics", "sago", True, partial(_ours, "sago", True), EXACT),
    Contender("pcgrad", "pcgrad", True, partial(_ours, "pcgrad", False), ROUNDING),
    Contender("pcgrad, statistics", "pcgrad", True, partial(_ours, "pcgrad", True), ROUNDING),
    Contender("torch.add(f, r, out=r)", "add", True, peers.add_, EXACT),
    Contender("torch.compile(where)", "sago", True, peers.compiled_where_, EXACT),
    Contender("torch.compile(where)", "sago", False, peers.compiled_where, EXACT),
    Contender("torch.where", "sago", False, peers.where, EXACT),
    Contender("released sago", "sago", False, partial(_theirs, "sago"), EXACT),
    Contender("released pcgrad", "pcgrad", False, partial(_theirs, "pcgrad"), RELEASED),
)
# Contender, dtype (None: any), field, whether less is better, bound.
TARGETS = (
    ("sago", None, "ratio_to_add", True, 1.5),
    ("sago", "bfloat16", "faster_than_released", False, 50.0),
    ("sago, statistics", None, "ratio_to_add", True, 3.0),
)


def run(
    elements: int = 1 << 26,
    tensors: int = 1,
    repeats: int = 10,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    contenders: Sequence[Contender] = CONTENDERS,
) -> dict[str, Any]:
    """Times `contenders` on `tensors` pairs of `elements` elements in all."""
    rows = []
    for dtype in dtypes:
        forget, retain = inputs(elements, tensors, dtype)
        work = [r.clone() for r in retain]
        check(contenders, forget, retain, work)
        times: list[list[float]] = [[] for _ in contenders]
        for turn in tqdm(range(repeats), desc=f"cpu {_name(dtype)}"):
            for i in range(len(contenders)):
                i = (i + turn) % len(contenders)  # so that nobody always follows the same neighbour
                _restore(work, retain)
                start = time.perf_counter()
                contenders[i].run(forget, work, GAMMA, ALPHA)
                times[i].append(1e3 * (time.perf_counter() - start))
        rows += _rows(_name(dtype), contenders, times)
    shape = list(forget[0].shape)
    return {
        **_origin(),
        "elements": elements,
        "tensors": tensors,
        "shape": shape,
        "repeats": repeats,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


def inputs(elements: int, tensors: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of 4096 rows where that divides them, else flat."""
    each = elements // tensors
    shape = (4096, each // 4096) if each % 4096 == 0 else (each,)
    generator = torch.Generator().manual_seed(0)
    forget, retain = [], []
    for _ in range(tensors):
        r = torch.randn(shape, generator=generator)
        forget.append(torch.randn(shape, generator=generator).sub_(r, alpha=0.3).to(dtype))
        retain.append(r.to(dtype))
    return forget, retain


def check(contenders: Sequence[Contender], forget: Tensors, retain: Tensors, work: Tensors) -> None:
    """Runs every contender once and raises `WrongResult` if its updates are not the reference's."""
    expected: dict[str, Tensors] = {}
    for contender in tqdm(contenders, desc=f"check {_name(forget[0].dtype)}"):
        if contender.rule not in expected:
            expected[contender.rule] = _expected(contender.rule, forget, retain)
        _restore(work, retain)
        updates = contender.run(forget, work, GAMMA, ALPHA)
        tolerance = contender.tolerance[forget[0].dtype]
        for tensors in zip(updates, expected[contender.rule], forget, retain, strict=True):
            for u, e, f, r in zip(*(t.view(-1).split(_SLICE) for t in tensors), strict=True):
                allowed = (f.float().abs() + r.float().abs()) * tolerance
                if not bool(((u.float() - e.float()).abs() <= allowed).all()):  # not `>`: a NaN is wrong
                    place = "in place" if contender.in_place else "into a new tensor"
                    raise WrongResult(
                        f"{contender.name} ({place}, {_name(f.dtype)}) is not `{contender.rule}` of "
                        f"sago.reference within {tolerance} * (|f| + |r|). Nothing is reported."
                    )


def _expected(rule: str, forget: Tensors, retain: Tensors) -> Tensors:
    if rule == "add":
        return [f + r for f, r in zip(forget, retain, strict=True)]
    updates = [torch.empty_like(r) for r in retain]
    # In slices, because the reference keeps a dozen fp64 copies of what it is given.
    pieces = [[p for t in some for p in t.view(-1).split(_SLICE)] for some in (forget, retain, updates)]
    groups = [i for i, t in enumerate(retain) for _ in t.view(-1).split(_SLICE)]
    f, r, out = pieces
    reference.synthesize_(f, r, rule, GAMMA, ALPHA, out, groups=groups, stats=False)
    return updates


def _restore(work: Tensors, retain: Tensors) -> None:
    for w, r in zip(work, retain, strict=True):
        w.copy_(r)


def _rows(dtype: str, contenders: Sequence[Contender], times: list[list[float]]) -> list[dict[str, Any]]:
    medians = {c.name: statistics.median(t) for c, t in zip(contenders, times, strict=True)}
    rows = []
    for contender, taken in zip(contenders, times, strict=True):
        median = statistics.median(taken)
        add, peer = medians.get("torch.add(f, r, out=r)"), medians.get(f"released {contender.rule}")
        row = {
            "dtype": dtype,
            "contender": contender.name,
            "in_place": contender.in_place,
            "ms": median,
            "p20": _percentile(taken, 0.2),
            "p80": _percentile(taken, 0.8),
            "ratio_to_add": add and median / add,
            "faster_than_released": peer and peer / median,
        }
        targets, met = [], []
        for name, only, field, less, bound in TARGETS:
            if name == contender.name and only in (None, dtype) and row[field] is not None:
                targets.append(f"{field} {'<=' if less else '>='} {bound:g}")
                met.append("yes" if (row[field] <= bound if less else row[field] >= bound) else "no")
        rows.append({**row, "target": "; ".join(targets) or None, "met": "; ".join(met) or None})
    return rows


def _percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    at = share * (len(values) - 1)
    low, high = sorted(values)[math.floor(at)], sorted(values)[math.ceil(at)]
    return low + (at - math.floor(at)) * (high - low)


def accuracy(elements: int = 1 << 26, target: float = 1e-6) -> dict[str, Any]:
    """The relative errors of ff, fr and rr against sums in float64."""
    rows = []
    for dtype in tqdm((torch.bfloat16, torch.float16, torch.float32, torch.float64), desc="accuracy"):
        forget, retain = inputs(elements, 1, dtype)
        f, r = forget[0].view(-1), retain[0].view(-1)
        exact = {"ff": _dot(f, f), "fr": _dot(f, r), "rr": _dot(r, r)}
        out = torch.empty_like(r)
        for backend in ("compiled", "compiled, no compiler", "reference"):
            pieces = [[t] if backend != "reference" else list(t.split(_SLICE)) for t in (f, r, out)]
            for rule, stats in (("pcgrad", False), ("sago", True)):
                with mock.patch.object(compiled, "has_compiler", return_value="no compiler" not in backend):
                    report = sago.synthesize_(
                        *pieces[:2],
                        rule=rule,
                        out=pieces[2],
                        groups=[0] * len(pieces[0]),
                        stats=stats,
                        backend=backend.split(",")[0],
                    )
                errors = {name: abs(getattr(report, name).item() / exact[name] - 1) for name in exact}
                rows.append(
                    {
                        "dtype": _name(dtype),
                        "backend": backend,
                        "rule": rule,
                        "statistics": stats,
                        **errors,
                        "target": f"<= {target:g}",
                        "met": max(errors.values()) <= target,
                    }
                )
    return {**_origin(), "elements": elements, "rows": rows}


def _dot(x: Tensor, y: Tensor) -> float:
    pieces = zip(x.split(1 << 16), y.split(1 << 16), strict=True)
    return math.fsum((a.double() * b.double()).sum().item() for a, b in pieces)


def _origin() -> dict[str, Any]:
    return {**machine(), "source": source_hash("kernels", "sago/compiled.py")}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
