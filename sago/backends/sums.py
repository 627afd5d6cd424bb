"""The sums that a backend computes over the gradients of a row, and the columns of their table.

A backend computes the columns in the order below, and other code reads them with the functions of this file.
`sago.reference` has its own code for the columns, because the tests compare the library with it.

A table of sums is fp64 `[rows, columns]`. With `f` the forget and `r` the retain gradient, the columns are

    PRODUCTS   <f,f>  <f,r>  <r,r>
    COUNTED    <f,f>  <f,r>  <r,r>   conflicts  nonfinite_forget  nonfinite_retain
    SPLIT      the products out of conflict     the three counts   the products in conflict
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

COUNTS = ("conflicts", "nonfinite_forget", "nonfinite_retain")


class Sums(IntEnum):
    """Which sums are taken. The value is the number of columns."""

    NONE = 0
    PRODUCTS = 3
    COUNTED = 6
    SPLIT = 9


def without_nonfinite(sums: int) -> int:
    """The number of columns besides `nonfinite_forget` and `nonfinite_retain`."""
    return sums if sums == Sums.PRODUCTS else sums - 2


def insert_nonfinite(table: Tensor, counts: Tensor) -> Tensor:
    """The table of COUNTED or SPLIT, from one without these two counts, and the counts, `[rows, 2]`."""
    return torch.cat([table[:, :4], counts, table[:, 4:]], dim=1)


def merge(table: Tensor, wanted: Sums) -> Tensor:
    """The table of the `wanted` sums, from a table of SPLIT."""
    return table if wanted == Sums.SPLIT else torch.cat([products(table), table[:, 3:6]], dim=1)[:, :wanted]


def products(table: Tensor) -> Tensor:
    """`<f,f>, <f,r>, <r,r>` over all elements of each row, `[rows, 3]`."""
    outside, inside = split(table)
    return outside if inside is None else outside + inside


def split(table: Tensor) -> tuple[Tensor, Tensor | None]:
    """The products out of conflict and in conflict, or the products over all elements and None."""
    columns = table.shape[1]
    outside = table if columns == Sums.PRODUCTS else table[:, 0:3]
    return outside, table[:, 6:9] if columns == Sums.SPLIT else None


def counts(table: Tensor) -> Tensor | None:
    """The columns of `COUNTS`, `[rows, 3]`; None if they were not taken."""
    return table[:, 3:6] if table.shape[1] >= Sums.COUNTED else None


def nonfinite(table: Tensor) -> Tensor:
    """Whether each row has a NaN or an inf, `[rows]`. Uses the squared norms if there are no counts."""
    counted = counts(table)
    if counted is None:
        return ~(table[:, 0] + table[:, 2]).isfinite()
    return counted[:, 1:].sum(1) != 0


def scale(table: Tensor, forget: float, retain: float) -> Tensor:
    """The table for gradients that are multiplied by these factors."""
    factors = [forget * forget, forget * retain, retain * retain]
    outside, inside = split(table)
    counted = counts(table)
    parts = [outside, counted, inside]
    scaled = [
        part
        if part is None or part is counted
        else torch.stack([column * x for column, x in zip(part.unbind(1), factors, strict=True)], dim=1)
        for part in parts
    ]
    return torch.cat([part for part in scaled if part is not None], dim=1)


def of_update(table: Tensor, coefficients: Tensor) -> list[Tensor]:
    """`<u,u>, <u,f>, <u,r>` of every row for the update `u` with these coefficients, `[rows, 2 or 4]`.

    They follow from the products: `<u,u> = a^2 <f,f> + 2ab <f,r> + b^2 <r,r>`, on each side of the gate.
    """
    outside, inside = split(table)
    a, b = coefficients[:, -2:].unbind(1)
    found = _of_update(a, b, outside)
    if inside is not None:
        a_c, b_c = coefficients[:, :2].unbind(1)
        found = [x + y for x, y in zip(found, _of_update(a_c, b_c, inside), strict=True)]
    found[0] = found[0].clamp(min=0.0)  # cancellation leaves an error of either sign
    return found


def _of_update(a: Tensor, b: Tensor, products: Tensor) -> list[Tensor]:
    ff, fr, rr = products.unbind(1)

    def times(coefficient: Tensor, product: Tensor) -> Tensor:
        # A coefficient of 0 leaves its gradient out.
        return torch.where(coefficient == 0, 0.0, coefficient * product)

    uu = times(a * a, ff) + times(2 * a * b, fr) + times(b * b, rr)
    return [uu, times(a, ff) + times(b, fr), times(a, fr) + times(b, rr)]
