"""The backend "reference": gram and combine in plain torch, pair by pair, without autograd.

It shares no code with the other backends. Elements are computed in fp32 (fp64 where a gradient is fp64) and
rounded once, as in the kernels, so that updates of elementwise rules can be compared bit for bit. Sums are
taken in fp64. It waits for the device and allocates temporaries of a tensor's size, but runs wherever torch
runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sago.backends.protocol import Batch
from sago.backends.sums import Sums, merge
from sago.rules import Coefficients, Gate, Rule, evaluate
from sago.rules.draws import of_pair

__all__ = [
    "Batch",
    "class_sums_of",
    "combine",
    "conflict",
    "gram",
    "sums_of",
    "update",
    "weighted",
    "with_zeros",
    "write",
]


def conflict(f: Tensor, r: Tensor) -> Tensor:
    """True where `f` and `r` have strictly opposite signs. Zeros and NaN do not conflict.

    The two signs are compared, because the product `f * r` underflows to 0 for small gradients.
    """
    return ((f > 0) & (r < 0)) | ((f < 0) & (r > 0))


def weighted(a: float, f: Tensor, b: float, r: Tensor) -> Tensor:
    """`a*f + b*r`. A gradient whose coefficient is 0 is left out, even if it is NaN or inf."""
    if a == 0 and b == 0:
        return torch.zeros_like(f)
    if a == 0:
        return b * r
    if b == 0:
        return a * f
    return a * f + b * r


def update(
    f: Tensor, r: Tensor, coefficients: Sequence[float], gate: Gate | None = None, floor: float = 0.0
) -> Tensor:
    """The update of one pair, in fp32 (fp64 if either is fp64). Without a gate, conflicts are class 0."""
    f, r = _computed(f, r)
    read = above(r, floor)
    values = torch.tensor(coefficients, dtype=torch.float64).to(f.dtype).tolist()
    pairs = list(zip(values[0::2], values[1::2], strict=True))
    if gate is None:
        (a_c, b_c), (a, b) = pairs
        return torch.where(conflict(f, read), weighted(a_c, f, b_c, r), weighted(a, f, b, r))
    classes = gate(f, read)
    u = weighted(pairs[-1][0], f, pairs[-1][1], r)
    for k, (a, b) in enumerate(pairs[:-1]):
        u = torch.where(classes == k, weighted(a, f, b, r), u)
    return u


def above(r: Tensor, floor: float) -> Tensor:
    """`r` as a gate reads it: 0 where its magnitude is below the floor, which is rounded to r's dtype."""
    limit = torch.tensor(floor, dtype=torch.float64).to(r)
    return torch.where(r.abs() < limit, 0.0, r) if floor else r


def _computed(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32
    return f.to(dtype), r.to(dtype)


def write(u: Tensor, out: Tensor) -> None:
    """`out.copy_(u)`. fp64 is converted to 16 bits through fp32, as in the kernels."""
    out.copy_(u.float() if out.dtype.itemsize == 2 else u)


def sums_of(f: Tensor, r: Tensor, floor: float = 0.0) -> Tensor:
    """The sums of one pair, fp64 `[9]`.

    They are ff, fr and rr of the elements out of conflict, the number of conflicts, the numbers of NaN and
    inf in f and in r, and ff, fr and rr of the elements in conflict.
    """
    f, r = _computed(f, r)
    c = conflict(f, above(r, floor))
    f, r = f.double(), r.double()
    outside, inside = ((f.where(part, 0.0), r.where(part, 0.0)) for part in (~c, c))
    values = [*_products(*outside), c, ~f.isfinite(), ~r.isfinite(), *_products(*inside)]
    return torch.stack([v.sum(dtype=torch.float64) for v in values])


def class_sums_of(f: Tensor, r: Tensor, gate: Gate, floor: float = 0.0) -> Tensor:
    """The sums of one pair by class, fp64 `[15]`.

    They are ff, fr and rr of class 0, the number of conflicts, the numbers of NaN and inf in f and in r, ff,
    fr and rr of class 1 and of class 2, and the numbers of elements of the three classes.
    """
    f, r = _computed(f, r)
    read = above(r, floor)
    classes, c = gate(f, read), conflict(f, read)
    parts = [classes == 0, classes == 1, (classes != 0) & (classes != 1)]
    f, r = f.double(), r.double()
    first, second, third = (_products(f.where(part, 0.0), r.where(part, 0.0)) for part in parts)
    values = [*first, c, ~f.isfinite(), ~r.isfinite(), *second, *third, *parts]
    return torch.stack([v.sum(dtype=torch.float64) for v in values])


def with_zeros(f: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the pair, and replaces None by zeros. At most one of the two is None."""
    zeros = torch.zeros_like(next(t for t in (f, r) if t is not None))
    return zeros if f is None else f, zeros if r is None else r


def _products(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return f * f, f * r, r * r


@torch.no_grad()
def gram(
    batch: Batch,
    sums: int,
    gate: Gate | None = None,
    draw: Tensor | None = None,
    floors: Tensor | None = None,
) -> Tensor:
    """The table of these sums, fp64 `[rows, sums]`."""
    return _table(batch, sums, gate, draw, _listed(floors, batch))


def _listed(floors: Tensor | None, batch: Batch) -> list[float]:
    return [0.0] * batch.row_count if floors is None else floors.tolist()


def _table(
    batch: Batch, sums: int, gate: Gate | None, draw: Tensor | None, floors: Sequence[float]
) -> Tensor:
    width = Sums.SPLIT if gate is None else Sums.CLASSES
    table = torch.zeros(batch.row_count, width, dtype=torch.float64, device=batch.device)
    for i, (f, r, row) in enumerate(zip(batch.forget, batch.retain, batch.rows, strict=True)):
        pair = with_zeros(f, r)
        own = of_pair(gate, draw, batch.origins, i)
        floor = floors[row]
        table[row] += sums_of(*pair, floor) if own is None else class_sums_of(*pair, own, floor)
    return merge(table, Sums(sums))


@torch.no_grad()
def combine(
    batch: Batch,
    rule: Rule,
    gamma: float | Tensor,
    alpha: float | Tensor,
    eps: float,
    gram: Tensor | None,
    sums: int,
    coefficients: Coefficients | None = None,
    propagate: bool = False,
    draw: Tensor | None = None,
    floors: Tensor | None = None,
) -> Tensor | None:
    """Writes the update of every pair to `out`; see `sago.backends.protocol`."""
    floor_of = _listed(floors, batch)
    table = _table(batch, sums, rule.gate, draw, floor_of) if sums else None
    values, *_ = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
    all_classes = values if rule.classes > 1 else values.repeat(1, 2)
    rows = all_classes.expand(batch.row_count, -1).tolist()
    pairs = zip(batch.forget, batch.retain, batch.out, batch.rows, strict=True)
    for i, (f, r, out, row) in enumerate(pairs):
        f, r = with_zeros(f, r)
        u = update(f, r, rows[row], of_pair(rule.gate, draw, batch.origins, i), floor_of[row])
        if propagate:
            u = u.where(f.isfinite() & r.isfinite(), torch.nan)
        write(u, out)
    return table
