"""The rules in plain torch, to be read beside the paper (arXiv 2604.14808) and to test against.

Autograd-free, and no code shared with the fast paths. Arithmetic on elements is done in fp32 (fp64
where a gradient is fp64) and rounded once at the end, as the kernels do, so that the elementwise rules
can be compared bit for bit. Inner products are summed in float64.

Called directly, it checks little of what `sago.synthesize_` checks.

`f` is the gradient of the forget loss as minimised, `r` the gradient of the retain loss. Each rule
below returns `(a_c, b_c, a, b)`: the update is `a_c*f + b_c*r` where the two conflict, `a*f + b*r`
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from sago.report import SynthesisReport

Gradients = Tensor | Sequence[Tensor | None]
Coefficients = tuple[float, float, float, float]


def sum(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> Coefficients:
    """`gamma*f + alpha*r`: the weighted sum of the losses."""
    return gamma, alpha, gamma, alpha


def sago(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> Coefficients:
    """`where(conflict, alpha*r, gamma*f)`: the forget gradient, replaced by retain where it opposes it."""
    return 0.0, alpha, gamma, 0.0


def sago_prefer_retain(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> Coefficients:
    """`where(conflict, alpha*r, gamma*f + alpha*r)`: the sum, less the forget gradient where it opposes."""
    return 0.0, alpha, gamma, alpha


def pcgrad(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> Coefficients:
    """`gamma*(f - k*r) + alpha*r`, `k = fr/rr` if `fr < 0` else 0: forget loses its part against retain.

    Algorithm 1 of arXiv 2001.06782 with retain never projected. `pcgrad` takes the inner products a
    tensor ("module-wise"), `pcgrad_global` takes them over all tensors.
    """
    k = projection(fr, rr)
    if k > 0 or gamma == 0:
        k = 0.0
    return gamma, alpha - gamma * k, gamma, alpha - gamma * k


def blur(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> Coefficients:
    """`gamma*f + alpha*(r - k*f)`, `k = fr/ff`: retain, made orthogonal to forget."""
    k = 0.0 if alpha == 0 else projection(fr, ff)
    return gamma - alpha * k, alpha, gamma - alpha * k, alpha


RULES: dict[str, tuple[Callable[..., Coefficients], str]] = {
    "sum": (sum, "element"),
    "sago": (sago, "element"),
    "sago_prefer_retain": (sago_prefer_retain, "element"),
    "pcgrad": (pcgrad, "tensor"),
    "pcgrad_global": (pcgrad, "global"),
    "blur": (blur, "global"),
}


def projection(product: float, square: float) -> float:
    """`product / square`; 0 where the square is 0, NaN where either is not finite."""
    if not (abs(product) < float("inf") and abs(square) < float("inf")):
        return float("nan")
    return product / square if square > 0 else 0.0


def conflict(f: Tensor, r: Tensor) -> Tensor:
    """True where `f` and `r` have strictly opposite signs. Zeros and NaN do not conflict.

    The signs are compared, not the product's: `f * r` underflows to 0 for small gradients.
    """
    return ((f > 0) & (r < 0)) | ((f < 0) & (r > 0))


def weighted(a: float, f: Tensor, b: float, r: Tensor) -> Tensor:
    """`a*f + b*r`, where a gradient whose coefficient is 0 is left out, be it NaN or inf."""
    if a == 0 and b == 0:
        return torch.zeros_like(f)
    if a == 0:
        return b * r
    if b == 0:
        return a * f
    return a * f + b * r


def update(f: Tensor, r: Tensor, coefficients: Coefficients) -> Tensor:
    """The update of one pair, in fp32 (fp64 if either is fp64)."""
    dtype = torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32
    f, r = f.to(dtype), r.to(dtype)
    a_c, b_c, a, b = torch.tensor(coefficients, dtype=torch.float64).to(dtype).tolist()
    return torch.where(conflict(f, r), weighted(a_c, f, b_c, r), weighted(a, f, b, r))


def write(u: Tensor, out: Tensor) -> None:
    """`out.copy_(u)`, fp64 to 16 bits through fp32 as in the kernels."""
    out.copy_(u.float() if out.dtype.itemsize == 2 else u)


def sums(f: Tensor, r: Tensor) -> Tensor:
    """The sums of one pair, fp64 `[9]`.

    ff, fr, rr out of conflict, the number of conflicts, of NaN and inf in f and in r, ff, fr, rr in conflict.
    """
    f, r = f.double(), r.double()
    c = conflict(f, r)
    outside, inside = ((f.where(part, 0.0), r.where(part, 0.0)) for part in (~c, c))
    values = [*_products(*outside), c, ~f.isfinite(), ~r.isfinite(), *_products(*inside)]
    return torch.stack([v.sum(dtype=torch.float64) for v in values])


def with_zeros(f: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair, of which one may be None, with zeros for it."""
    zeros = torch.zeros_like(next(t for t in (f, r) if t is not None))
    return zeros if f is None else f, zeros if r is None else r


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
        if rule not in RULES:
            raise ValueError(f"Parameter `rule` should be one of {', '.join(RULES)}. Found {rule!r}.")
        name, (coefficients, scope) = rule, RULES[rule]
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
            raise ValueError(f"Gradients and output {i} should be tensors of one shape. Found {target!r}.")

    # A row: what `sums` gives, and the number of elements.
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


def _plain(rule: Any) -> Callable[..., Coefficients]:
    """The coefficient function of a `sago.Rule` on floats, with both branches spelled out.

    A coefficient is NaN if a sum that it reads is not finite.
    """

    def coefficients(*numbers: float) -> Coefficients:
        *sums, gamma, alpha = numbers
        lost = {name for name, x in zip(("ff", "fr", "rr"), sums, strict=True) if not isfinite(x)}
        values = [float(x) for x in rule.coefficients(*torch.tensor(numbers, dtype=torch.float64))]
        read = rule.reads[gamma == 0, alpha == 0]
        values = [nan if lost & names else x for x, names in zip(values, read, strict=True)]
        return tuple(values) if rule.gated else (*values, *values)  # type: ignore[return-value]

    return coefficients


def _products(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return f * f, f * r, r * r


def _report(
    name: str,
    rows: list[Hashable],
    table: Tensor,
    chosen: list[Coefficients],
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


def _of_update(chosen: list[Coefficients], outside: Tensor, inside: Tensor) -> Tensor:
    """`<u,u>`, `<u,f>` and `<u,r>` of `u = a*f + b*r`, from the conflicting part and from the rest."""
    total = torch.zeros_like(outside)
    for i, (a_c, b_c, a, b) in enumerate(chosen):
        for (p, q), (ff, fr, rr) in (((a_c, b_c), inside[i]), ((a, b), outside[i])):
            total[i, 0] += _times(p * p, ff) + _times(2 * p * q, fr) + _times(q * q, rr)
            total[i, 1] += _times(p, ff) + _times(q, fr)
            total[i, 2] += _times(p, fr) + _times(q, rr)
    total[:, 0].clamp_(min=0.0)  # what cancels leaves an error of either sign
    return total


def _times(coefficient: float, product: Tensor) -> Tensor:
    return torch.zeros_like(product) if coefficient == 0 else coefficient * product
