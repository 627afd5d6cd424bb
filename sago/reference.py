"""`sago.synthesize` in plain torch: a readable form of the paper (arXiv 2604.14808) that tests compare with.

It does not use autograd and shares no code with the fast backends. Elements are computed in fp32 (fp64 where
a gradient is fp64) and rounded once at the end, as in the kernels, so that the elementwise rules can be
compared bit for bit. Inner products are summed in fp64. The functions check only a few of their arguments,
unlike `sago.synthesize_`.

`f` is the gradient of the forget loss as minimised, `r` the gradient of the retain loss. Each rule has a
function here, defined in its file under `sago.rules`, that returns `(a_c, b_c, a, b)`: the update is
`a_c*f + b_c*r` where the two conflict and `a*f + b*r` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from sago import rules
from sago.backends.reference import conflict, update, weighted, with_zeros, write
from sago.backends.reference import sums_of as sums
from sago.core.report import SynthesisReport
from sago.rules import REFERENCES

__all__ = [
    *REFERENCES,
    "conflict",
    "sums",
    "synthesize",
    "synthesize_",
    "update",
    "weighted",
    "with_zeros",
    "write",
]

Gradients = Tensor | Sequence[Tensor | None]
FourFloats = tuple[float, ...]  # a_c, b_c, a, b


def __getattr__(name: str) -> Callable[..., FourFloats]:
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
) -> tuple[Any, SynthesisReport]:
    """`sago.synthesize` in plain torch: new tensors of retain's dtype, and the report."""
    like = (
        retain
        if isinstance(retain, Tensor)
        else [f if r is None else r for f, r in zip(forget, retain, strict=True)]
    )
    out = (
        torch.empty_like(like)
        if isinstance(like, Tensor)
        else [None if t is None else torch.empty_like(t) for t in like]
    )
    return out, synthesize_(forget, retain, rule, gamma, alpha, out, groups, eps, stats, reduce_gram)


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
) -> SynthesisReport:
    """`sago.synthesize_` in plain torch: the update is written to retain, to forget or to `out`."""
    forget, retain = _listed(forget), _listed(retain)
    targets = retain if out is None else forget if isinstance(out, str) else _listed(out)
    gamma, alpha = float(gamma), float(alpha)
    if isinstance(out, str) and out != "forget":
        raise ValueError(f"Parameter `out` should be None, 'forget' or tensors. Found {out!r}.")
    if isinstance(rule, str):
        scope = rules.resolve(rule).scope
        name, coefficients = rule, REFERENCES[rule]
    else:
        name, coefficients, scope = rule.name, _plain(rule), rule.scope

    if groups is None:
        groups = ["all"] * len(forget) if scope == "global" else list(range(len(forget)))
    rows = list(dict.fromkeys(groups))
    pairs = [
        None if f is None and r is None else with_zeros(f, r) for f, r in zip(forget, retain, strict=True)
    ]

    for i, (target, pair) in enumerate(zip(targets, pairs, strict=True)):
        if pair and (target is None or any(t.shape != target.shape for t in pair)):
            found = [None if t is None else tuple(t.shape) for t in (*pair, target)]
            raise ValueError(
                f"Forget, retain and out of gradient {i} should be tensors of one shape. Found {found}."
            )

    # A row has the nine values of `sums` and the number of elements. This file does not use the functions of
    # `sago.backends.sums` that read the columns, because the tests compare them with it.
    device = next((p[0].device for p in pairs if p), torch.device("cpu"))
    table = torch.zeros(len(rows), 10, dtype=torch.float64, device=device)
    for group, pair in zip(groups, pairs, strict=True):
        if pair:
            both = torch.cat([sums(*pair), torch.tensor([pair[0].numel()], device=pair[0].device)])
            table[rows.index(group)] += both.to(device)
    if reduce_gram is not None and (stats or scope != "element"):
        reduced = reduce_gram(table)
        table = table if reduced is None else reduced

    gram = table[:, 0:3] + table[:, 6:9]
    if scope == "global":
        gram = gram.sum(0, keepdim=True).expand(len(rows), 3)
    chosen = [coefficients(ff + eps, fr, rr + eps, gamma, alpha) for ff, fr, rr in gram.tolist()]
    updates = [pair and update(*pair, chosen[rows.index(g)]) for g, pair in zip(groups, pairs, strict=True)]
    for target, u in zip(targets, updates, strict=True):
        if u is not None:
            write(u, target)
    gated = not isinstance(rule, str) and rule.gated
    return _report(name, rows, table, chosen, stats, scope, gated)


def _listed(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _plain(rule: Any) -> Callable[..., FourFloats]:
    """The coefficient function of a `sago.Rule` on floats. It always returns four coefficients.

    A coefficient is NaN if a sum that it reads is not finite.
    """

    def coefficients(*numbers: float) -> FourFloats:
        *products, gamma, alpha = numbers
        lost = {name for name, x in zip(("ff", "fr", "rr"), products, strict=True) if not isfinite(x)}
        values = [float(x) for x in rule.coefficients(*torch.tensor(numbers, dtype=torch.float64))]
        read = rule.reads[gamma == 0, alpha == 0]
        values = [nan if lost & names else x for x, names in zip(values, read, strict=True)]
        return tuple(values) if rule.gated else (*values, *values)

    return coefficients


def _report(
    name: str,
    rows: list[Hashable],
    table: Tensor,
    chosen: list[FourFloats],
    stats: bool,
    scope: str,
    gated: bool,
) -> SynthesisReport:
    outside, counts, inside, numel = table.split([3, 3, 3, 1], dim=1)
    columns: dict[str, Tensor] = {}
    if stats or scope != "element":
        columns.update(zip(("ff", "fr", "rr"), (outside + inside).unbind(1), strict=True))
    if stats or (scope != "element" and not gated):
        columns.update(zip(("uu", "uf", "ur"), _of_update(chosen, outside, inside).unbind(1), strict=True))
    if stats:
        columns.update(
            zip(("conflicts", "nonfinite_forget", "nonfinite_retain"), counts.unbind(1), strict=True)
        )
    return SynthesisReport(name, rows, numel[:, 0], lambda: columns)


def _of_update(chosen: list[FourFloats], outside: Tensor, inside: Tensor) -> Tensor:
    """`<u,u>`, `<u,f>` and `<u,r>` of `u = a*f + b*r`, from the sums in conflict and out of conflict."""
    total = torch.zeros_like(outside)
    for i, (a_c, b_c, a, b) in enumerate(chosen):
        for (p, q), (ff, fr, rr) in (((a_c, b_c), inside[i]), ((a, b), outside[i])):
            total[i, 0] += _times(p * p, ff) + _times(2 * p * q, fr) + _times(q * q, rr)
            total[i, 1] += _times(p, ff) + _times(q, fr)
            total[i, 2] += _times(p, fr) + _times(q, rr)
    total[:, 0].clamp_(min=0.0)  # cancellation leaves an error of either sign
    return total


def _times(coefficient: float, product: Tensor) -> Tensor:
    return torch.zeros_like(product) if coefficient == 0 else coefficient * product
