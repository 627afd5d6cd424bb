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
from sago.rules import Coefficients, Rule, evaluate

__all__ = ["Batch", "combine", "conflict", "gram", "sums_of", "update", "weighted", "with_zeros", "write"]


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


def update(f: Tensor, r: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The update of one pair, in fp32 (fp64 if either is fp64)."""
    dtype = torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32
    f, r = f.to(dtype), r.to(dtype)
    a_c, b_c, a, b = torch.tensor(coefficients, dtype=torch.float64).to(dtype).tolist()
    return torch.where(conflict(f, r), weighted(a_c, f, b_c, r), weighted(a, f, b, r))


def write(u: Tensor, out: Tensor) -> None:
    """`out.copy_(u)`. fp64 is converted to 16 bits through fp32, as in the kernels."""
    out.copy_(u.float() if out.dtype.itemsize == 2 else u)


def sums_of(f: Tensor, r: Tensor) -> Tensor:
    """The sums of one pair, fp64 `[9]`.

    They are ff, fr and rr of the elements out of conflict, the number of conflicts, the numbers of NaN and
    inf in f and in r, and ff, fr and rr of the elements in conflict.
    """
    f, r = f.double(), r.double()
    c = conflict(f, r)
    outside, inside = ((f.where(part, 0.0), r.where(part, 0.0)) for part in (~c, c))
    values = [*_products(*outside), c, ~f.isfinite(), ~r.isfinite(), *_products(*inside)]
    return torch.stack([v.sum(dtype=torch.float64) for v in values])


def with_zeros(f: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the pair, and replaces None by zeros. At most one of the two is None."""
    zeros = torch.zeros_like(next(t for t in (f, r) if t is not None))
    return zeros if f is None else f, zeros if r is None else r


def _products(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return f * f, f * r, r * r


@torch.no_grad()
def gram(batch: Batch, sums: int) -> Tensor:
    """The table of these sums, fp64 `[rows, sums]`."""
    return _table(batch, sums)


def _table(batch: Batch, sums: int) -> Tensor:
    table = torch.zeros(batch.row_count, Sums.SPLIT, dtype=torch.float64, device=batch.device)
    for f, r, row in zip(batch.forget, batch.retain, batch.rows, strict=True):
        table[row] += sums_of(*with_zeros(f, r))
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
) -> Tensor | None:
    """Writes the update of every pair to `out`; see `sago.backends.protocol`."""
    table = _table(batch, sums) if sums else None
    values, _ = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
    both = values if rule.gated else values.repeat(1, 2)
    rows = both.expand(batch.row_count, 4).tolist()
    for f, r, out, row in zip(batch.forget, batch.retain, batch.out, batch.rows, strict=True):
        f, r = with_zeros(f, r)
        u = update(f, r, rows[row])
        if propagate:
            u = u.where(f.isfinite() & r.isfinite(), torch.nan)
        write(u, out)
    return table
