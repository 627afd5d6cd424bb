"""`sago.synthesize` in plain torch: a readable form of the paper (arXiv 2604.14808) that tests compare with.

It does not use autograd and shares no code with the fast backends. Elements are computed in fp32 (fp64 where
a gradient is fp64) and rounded once at the end, as in the kernels, so that the elementwise rules can be
compared bit for bit. Inner products are summed in fp64. Arguments are checked as in `sago.synthesize_`.

`f` is the gradient of the forget loss as minimised, `r` the gradient of the retain loss. Each rule has a
function here, defined in its file under `sago.rules`, that returns `(a_c, b_c, a, b)`: the update is
`a_c*f + b_c*r` where the two conflict and `a*f + b*r` elsewhere. For a rule with a gate of its own, it
returns two coefficients for each class of the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from sago import rules
from sago.backends.reference import class_sums_of, conflict, update, weighted, with_zeros, write
from sago.backends.reference import sums_of as sums
from sago.core.checks import (
    NEW,
    as_list,
    check_bool,
    check_floor,
    check_pairs,
    check_weight,
    non_negative,
)
from sago.core.report import SynthesisReport
from sago.core.transforms import refuse_transforms
from sago.ranks import dtensor
from sago.rules import REFERENCES, Rule
from sago.rules.draws import of_pair

__all__ = [
    *REFERENCES,
    "conflict",
    "definition",
    "sums",
    "synthesize",
    "synthesize_",
    "update",
    "weighted",
    "with_zeros",
    "write",
]

Gradients = Tensor | Sequence[Tensor | None]
Floats = tuple[float, ...]  # a_c, b_c, a, b, or a and b of each class


def __getattr__(name: str) -> Callable[..., Floats]:
    """The function of each rule: `sago.reference.pcgrad`."""
    if name in REFERENCES:
        return REFERENCES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def synthesize(
    forget: Gradients,
    retain: Gradients,
    rule: Any = "sago",
    gamma: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
    stats: bool = True,
    reduce_gram: Callable[[Tensor], Tensor | None] | None = None,
    retain_floor: float = 0.0,
) -> tuple[Any, SynthesisReport]:
    """`sago.synthesize` in plain torch: new tensors of retain's dtype, and the report."""
    refuse_transforms()
    single = isinstance(forget, Tensor) and isinstance(retain, Tensor)
    forget, retain = as_list("forget", forget), as_list("retain", retain)
    checked = check_pairs(forget, retain, rules.resolve(rule), NEW, groups, reduce_gram, "reference", dtensor)
    out = checked.updates
    more = groups, eps, stats, reduce_gram, retain_floor
    report = synthesize_(forget, retain, rule, gamma, alpha, out, *more)
    return (out[0] if single else out), report


@torch.no_grad()
def synthesize_(
    forget: Gradients,
    retain: Gradients,
    rule: Any = "sago",
    gamma: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    out: Gradients | str | None = None,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
    stats: bool = True,
    reduce_gram: Callable[[Tensor], Tensor | None] | None = None,
    retain_floor: float = 0.0,
) -> SynthesisReport:
    """`sago.synthesize_` in plain torch: the update is written to retain, to forget or to `out`."""
    refuse_transforms()
    name, rule = rule, rules.resolve(rule)
    forget, retain = as_list("forget", forget), as_list("retain", retain)
    out = out if out is None or isinstance(out, str) else as_list("out", out)
    checked = check_pairs(forget, retain, rule, out, groups, reduce_gram, "reference", dtensor)
    gamma, alpha = (
        float(check_weight(side, weight, checked.backends))
        for side, weight in (("gamma", gamma), ("alpha", alpha))
    )
    eps = non_negative("eps", eps)
    check_bool("stats", stats)
    targets = retain if out is None else forget if isinstance(out, str) else out
    coefficients = REFERENCES[name] if isinstance(name, str) else definition(rule)

    if groups is None:
        groups = ["all"] * len(forget) if rule.scope == "global" else list(range(len(forget)))
    rows = list(dict.fromkeys(groups))
    pairs = [
        None if f is None and r is None else with_zeros(f, r) for f, r in zip(forget, retain, strict=True)
    ]

    if rule.seed is not None:  # the numbers follow the order of the elements in memory
        pairs = [pair and _laid_out(*pair, o) for pair, o in zip(pairs, targets, strict=True)]

    # A row has the values of `sums` or `class_sums_of`, and the number of elements. This file does not use
    # the functions of `sago.backends.sums` that read the columns, because the tests compare them with it.
    gate = rule.gate
    draw = None if rule.seed is None else torch.tensor([rule.seed, 0])
    starts = [0, *accumulate(0 if pair is None else pair[0].numel() for pair in pairs)]
    device = next((p[0].device for p in pairs if p), torch.device("cpu"))
    floors = [0.0] * len(rows)
    if check_floor(rule, retain_floor):
        norms = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
        for group, pair in zip(groups, pairs, strict=True):
            if pair:
                f, r = (t.double() for t in pair)
                numel = torch.tensor(f.numel(), device=f.device)
                norms[rows.index(group)] += torch.stack([(f * f).sum(), (r * r).sum(), numel]).to(device)
        if reduce_gram is not None:
            reduced = reduce_gram(norms)
            norms = norms if reduced is None else reduced
        norms = norms.sum(0, keepdim=True).expand_as(norms) if rule.scope == "global" else norms
        floors = [_floor(ff, rr, n, retain_floor) for ff, rr, n in norms.tolist()]
    table = torch.zeros(len(rows), 10 if gate is None else 16, dtype=torch.float64, device=device)
    for i, (group, pair) in enumerate(zip(groups, pairs, strict=True)):
        if pair:
            own = of_pair(gate, draw, starts, i)
            floor = floors[rows.index(group)]
            taken = sums(*pair, floor) if own is None else class_sums_of(*pair, own, floor)
            both = torch.cat([taken, torch.tensor([pair[0].numel()], device=pair[0].device)])
            table[rows.index(group)] += both.to(device)
    if reduce_gram is not None and (stats or rule.scope != "element"):
        reduced = reduce_gram(table)
        table = table if reduced is None else reduced

    read = table.sum(0, keepdim=True).expand_as(table) if rule.scope == "global" else table
    chosen = []
    for row in read:
        ff, fr, rr = _gram(row, rule).sum(0).tolist()
        classes = torch.cat([row[12:15, None], _gram(row, rule)], dim=1).tolist() if rule.by_class else None
        sixth = [] if classes is None else [classes[: rule.classes]]
        chosen.append(coefficients(ff + eps, fr, rr + eps, gamma, alpha, *sixth))
    updates = [
        pair and update(*pair, chosen[rows.index(g)], of_pair(gate, draw, starts, i), floors[rows.index(g)])
        for i, (g, pair) in enumerate(zip(groups, pairs, strict=True))
    ]
    for target, u in zip(targets, updates, strict=True):
        if u is not None:
            write(u, target)
    return _report(rule, rows, table, chosen, stats)


def _floor(ff: float, rr: float, numel: float, retain_floor: float) -> float:
    """The magnitude below which an element of retain counts as 0 in a gate."""
    if not isfinite(rr):
        return 0.0
    return inf if rr < 2.0**-32 * ff < inf else retain_floor * (rr / max(numel, 1)) ** 0.5


def _laid_out(f: Tensor, r: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return (f, r) if f.stride() == r.stride() == out.stride() else (f.contiguous(), r.contiguous())


def definition(rule: Any) -> Callable[..., Floats]:
    """The coefficient function of a `sago.Rule` on floats. It returns those of two classes or more.

    A coefficient is NaN if a sum that it reads is not finite. A rule with `state` is at its first step.
    """

    def coefficients(*numbers: Any) -> Floats:
        *products, gamma, alpha = numbers[:5]
        lost = {name for name, x in zip(("ff", "fr", "rr"), products, strict=True) if not isfinite(x)}
        five = torch.tensor(numbers[:5], dtype=torch.float64)
        sixth = [[torch.tensor(x, dtype=torch.float64) for x in classes] for classes in numbers[5:]]
        more = [*sixth, *([torch.tensor(rule.state, dtype=torch.float64)] if rule.state else [])]
        values = [float(x) for x in rule.coefficients(*five, *more)][: 2 * rule.classes]
        read = rule.reads[gamma == 0, alpha == 0]
        values = [nan if lost & names else x for x, names in zip(values, read, strict=True)]
        return tuple(values) if rule.classes > 1 else (*values, *values)

    return coefficients


def _gram(row: Tensor, rule: Rule) -> Tensor:
    """`ff, fr, rr` of each class of a row, in the order of the coefficients."""
    parts = [row[6:9], row[0:3]] if rule.gate is None else [row[0:3], row[6:9], row[9:12]]
    return torch.stack(parts)


def _report(
    rule: Rule,
    rows: list[Hashable],
    table: Tensor,
    chosen: list[Floats],
    stats: bool,
) -> SynthesisReport:
    gram = [_gram(row, rule) for row in table]
    columns: dict[str, Tensor] = {}
    if stats or rule.scope != "element":
        products = torch.stack([part.sum(0) for part in gram])
        columns.update(zip(("ff", "fr", "rr"), products.unbind(1), strict=True))
    if stats or rule.by_class or (rule.scope != "element" and rule.classes == 1):
        columns.update(zip(("uu", "uf", "ur"), _of_update(chosen, gram).unbind(1), strict=True))
    if stats or rule.by_class:
        counts = table[:, 3:6].unbind(1)
        columns.update(zip(("conflicts", "nonfinite_forget", "nonfinite_retain"), counts, strict=True))
    return SynthesisReport(rule.name, rows, table[:, -1], lambda: columns)


def _of_update(chosen: list[Floats], gram: list[Tensor]) -> Tensor:
    """`<u,u>`, `<u,f>` and `<u,r>` of `u = a*f + b*r`, from the sums of each class."""
    total = torch.zeros(len(gram), 3, dtype=torch.float64, device=gram[0].device)
    for i, values in enumerate(chosen):
        for p, q, (ff, fr, rr) in zip(values[0::2], values[1::2], gram[i], strict=False):
            total[i, 0] += _times(p * p, ff) + _times(2 * p * q, fr) + _times(q * q, rr)
            total[i, 1] += _times(p, ff) + _times(q, fr)
            total[i, 2] += _times(p, fr) + _times(q, rr)
    total[:, 0].clamp_(min=0.0)  # cancellation leaves an error of either sign
    return total


def _times(coefficient: float, product: Tensor) -> Tensor:
    return torch.zeros_like(product) if coefficient == 0 else coefficient * product
