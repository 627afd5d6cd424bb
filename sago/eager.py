"""The backend "reference": gram and combine made of the functions of `sago.reference`, pair by pair.

It waits for the device and allocates temporaries of a tensor's size, but runs wherever torch runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sago import reference
from sago.compiled import Batch
from sago.rules import Coefficients, Rule, evaluate

__all__ = ["Batch", "combine", "gram"]


@torch.no_grad()
def gram(batch: Batch, sums: int) -> Tensor:
    """The sums of every row, fp64 `[rows, sums]`, with the columns of `sago.kernels.gram`."""
    table = torch.zeros(batch.row_count, 9, dtype=torch.float64, device=batch.device)
    for f, r, row in zip(batch.forget, batch.retain, batch.rows, strict=True):
        table[row] += reference.sums(*reference.with_zeros(f, r))
    if sums == 9:
        return table
    return torch.cat([table[:, 0:3] + table[:, 6:9], table[:, 3:6]], dim=1)[:, :sums]


@torch.no_grad()
def combine(
    batch: Batch,
    rule: Rule,
    gamma: float | Tensor,
    alpha: float | Tensor,
    eps: float,
    gram_table: Tensor | None,
    sums: int,
    coefficients: Coefficients | None = None,
    propagate: bool = False,
) -> Tensor | None:
    """Writes the update of every pair to `out`; see `sago.kernels.combine`."""
    table = gram(batch, sums) if sums else None
    values, _ = coefficients or evaluate(rule, gram_table, gamma, alpha, eps, batch.device)
    both = values if rule.gated else values.repeat(1, 2)
    rows = both.expand(batch.row_count, 4).tolist()
    for f, r, out, row in zip(batch.forget, batch.retain, batch.out, batch.rows, strict=True):
        f, r = reference.with_zeros(f, r)
        u = reference.update(f, r, rows[row])
        if propagate:
            u = u.where(f.isfinite() & r.isfinite(), torch.nan)
        reference.write(u, out)
    return table
