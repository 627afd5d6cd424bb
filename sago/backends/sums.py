"""The sums that a backend computes over the gradients of a row, and the columns of their table.

A backend computes the columns in the order below, and other code reads them with the functions of this file.
`sago.reference` has its own code for the columns, because the tests compare the library with it.

A table of sums is fp64 `[rows, columns]`. With `f` the forget and `r` the retain gradient, the columns are

    PRODUCTS   <f,f>  <f,r>  <r,r>
    COUNTED    <f,f>  <f,r>  <r,r>   conflicts  nonfinite_forget  nonfinite_retain
    SPLIT      the products out of conflict     the three counts   the products in conflict
    CLASSES    the products of class 0          the three counts   the products of class 1 and of class 2,
               and the numbers of elements of classes 0, 1 and 2

SPLIT is taken for a rule with `gated=True`, and CLASSES for a rule with a gate of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    CLASSES = 15


def without_nonfinite(sums: int) -> int:
    """The number of columns besides `nonfinite_forget` and `nonfinite_retain`."""
    return sums if sums == Sums.PRODUCTS else sums - 2


def insert_nonfinite(table: Tensor, counts: Tensor) -> Tensor:
    """The table with the counts `[rows, 2]`, from one without these two columns."""
    return torch.cat([table[:, :4], counts, table[:, 4:]], dim=1)


def merge(table: Tensor, wanted: Sums) -> Tensor:
    """The table of the `wanted` sums, from a table of SPLIT or CLASSES."""
    if table.shape[1] == wanted:
        return table
    return torch.cat([products(table), table[:, 3:6]], dim=1)[:, :wanted]


def products(table: Tensor) -> Tensor:
    """`<f,f>, <f,r>, <r,r>` over all elements of each row, `[rows, 3]`."""
    return _added(by_class(table))


def by_class(table: Tensor) -> list[Tensor]:
    """The products of each class, `[rows, 3]`, in the order of the coefficients; of all without a split."""
    columns = table.shape[1]
    if columns == Sums.SPLIT:
        return [table[:, 6:9], table[:, 0:3]]
    if columns == Sums.CLASSES:
        return [table[:, 0:3], table[:, 6:9], table[:, 9:12]]
    return [table[:, 0:3]]


def class_rows(table: Tensor, classes: int) -> Tensor:
    """`n, <f,f>, <f,r>, <r,r>` of each class, one after another, `[rows, 4 * classes]`, from CLASSES."""
    found = zip(table[:, 12:15].split(1, dim=1), by_class(table), strict=True)
    return torch.cat([column for both in found for column in both][: 2 * classes], dim=1)


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
    columns = list(table.unbind(1))
    for k in (0, 1, 2, 6, 7, 8, 9, 10, 11):  # the products; the others are counts
        if k < len(columns):
            columns[k] = columns[k] * factors[k % 3]
    return torch.stack(columns, dim=1)


def of_update(table: Tensor, coefficients: Tensor) -> list[Tensor]:
    """`<u,u>, <u,f>, <u,r>` of every row for the update `u` with these coefficients, `[rows, 2 * classes]`.

    They follow from the products of each class: `<u,u> = a^2 <f,f> + 2ab <f,r> + b^2 <r,r>`.
    """
    pairs = coefficients.split(2, dim=1)
    classes = zip(pairs, by_class(table)[: len(pairs)], strict=True)
    found = [_of_update(pair[:, 0], pair[:, 1], products) for pair, products in classes]
    total = [_added(columns) for columns in zip(*found, strict=True)]
    total[0] = total[0].clamp(min=0.0)  # cancellation leaves an error of either sign
    return total


def _added(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


def _of_update(a: Tensor, b: Tensor, products: Tensor) -> list[Tensor]:
    ff, fr, rr = products.unbind(1)

    def times(coefficient: Tensor, product: Tensor) -> Tensor:
        # A coefficient of 0 leaves its gradient out.
        return torch.where(coefficient == 0, 0.0, coefficient * product)

    uu = times(a * a, ff) + times(2 * a * b, fr) + times(b * b, rr)
    return [uu, times(a, ff) + times(b, fr), times(a, fr) + times(b, rr)]
