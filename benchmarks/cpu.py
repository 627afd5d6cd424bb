"""Times a synthesis on the CPU beside what people write instead, and measures the accuracy of the sums.

What is timed, and how, is that of `benchmarks.speed`. If one contender is wrong, nothing is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks import peers, timing
from benchmarks.contenders import Contender, compiled_peer, others, ours, peer
from benchmarks.gradients import ALPHA, GAMMA, Gradients
from benchmarks.measure import origin
from benchmarks.speed import first
from sago.backends import compiled

COLUMNS = (
    "dtype", "contender", "in_place", "ms", "p20", "p80",
    "ratio_to_add", "faster_than_released", "target", "met",
)  # fmt: skip
ACCURACY_COLUMNS = ("dtype", "backend", "rule", "statistics", "ff", "fr", "rr", "target", "met")
SOURCES = ("kernels", "sago")
_SLICE = 1 << 22

_compiled = partial(compiled_peer, "torch.compile(where)", "sago")
CONTENDERS = (
    ours("sago", False, name="sago"),
    ours("sago", True, name="sago, statistics"),
    ours("pcgrad", False, name="pcgrad"),
    ours("pcgrad", True, name="pcgrad, statistics"),
    peer("torch.add(f, r, out=r)", "add", peers.add_),
    _compiled(partial(peers.compiled, peers.sago_)),
    _compiled(partial(peers.compiled, peers.formula), in_place=False),
    peer("torch.where", "sago", peers.where, in_place=False),
    *(others(rule, False)[0]._replace(name=f"released {rule}") for rule in ("sago", "pcgrad")),
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
    """Times `contenders` on `tensors` pairs of `elements` elements in all.

    Gradients have 4096 rows where that divides them, else they are flat.
    """
    each = elements // tensors
    shape = (4096, each // 4096) if each % 4096 == 0 else (each,)
    rows = []
    for dtype in dtypes:
        gradients = Gradients([shape] * tensors, dtype, "cpu")
        everyone = [first(c, gradients)[0] for c in tqdm(contenders, desc=f"check {_name(dtype)}")]
        clock = timing.Clock(gradients.device)
        samples, errors = timing.rounds(everyone, clock, repeats, math.inf, f"cpu {_name(dtype)}")
        for error in errors.values():
            raise error
        rows += _rows(_name(dtype), contenders, [[s.ms for s in some] for some in samples])
    return {
        **origin("cpu", *SOURCES),
        "elements": elements,
        "tensors": tensors,
        "shape": list(shape),
        "repeats": repeats,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


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
            "p20": timing.percentile(taken, 0.2),
            "p80": timing.percentile(taken, 0.8),
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


def accuracy(elements: int = 1 << 26, target: float = 1e-6) -> dict[str, Any]:
    """The relative errors of ff, fr and rr against sums in float64."""
    rows = []
    for dtype in tqdm((torch.bfloat16, torch.float16, torch.float32, torch.float64), desc="accuracy"):
        f, r = inputs(elements, dtype)
        exact = {"ff": _dot(f, f), "fr": _dot(f, r), "rr": _dot(r, r)}
        out = torch.empty_like(r)
        for backend in ("compiled", "compiled, no compiler", "reference"):
            pieces = [[t] if backend != "reference" else list(t.split(_SLICE)) for t in (f, r, out)]
            for rule, stats in (("pcgrad", False), ("sago", True)):
                found = compiled._found if "no compiler" not in backend else lambda *_: None
                with mock.patch.object(compiled, "_found", found):
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
    return {**origin("cpu", *SOURCES), "elements": elements, "rows": rows}


def inputs(elements: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random normal all through, unlike what is timed: the sums of a repeated stretch say less."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(elements, generator=generator)
    return torch.randn(elements, generator=generator).sub_(r, alpha=0.3).to(dtype), r.to(dtype)


def _dot(x: Tensor, y: Tensor) -> float:
    pieces = zip(x.split(1 << 16), y.split(1 << 16), strict=True)
    return math.fsum((a.double() * b.double()).sum().item() for a, b in pieces)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
