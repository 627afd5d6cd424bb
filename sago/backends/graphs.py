"""The arithmetic of the backend "compiled": functions that compute the update and the sums of 1-D gradients.

`update`, `update_by_class` and `block_sums` give the same bits compiled by TorchInductor and uncompiled. The
sums and the update are separate graphs. In one graph they do not fuse, which is ten times slower.

The order of the additions does not depend on the number of threads. Up to 256 products are added in fp32
(fp64 for fp64 gradients). These partial sums are then added in fp64. A small tensor has one for each tile,
and a large tensor has 16 for each block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sago.backends.sums import Sums
from sago.rules import Gate, Term

# Which coefficients are zero, the gate of the rule, and whether NaN and inf propagate.
Known = tuple[tuple[Term, ...], Gate | None, bool]

Wanted = tuple[int, Gate | None]  # the sums, and for CLASSES the gate

TILE = 32  # elements of a small tensor that have the same coefficients and are summed together
# A block has runs of 16 rows. A row has 32 elements, which are two vectors of fp32 in the widest registers:
# with less than one, TorchInductor lets several threads add the elements of a column. Uncompiled torch adds
# up to 16 rows one after another, as compiled code does.
_RUNS, _ROWS, _LANES = 8, 16, 32
BLOCK = _RUNS * _ROWS * _LANES
_SUMS = 16  # of a block: the sum of 256 squares of 1e18 is finite in fp32


def update_by_class(f: Tensor, r: Tensor, out: Tensor, coefficients: Tensor, known: Known) -> None:
    """Writes the update of a rule that has several classes of elements; see `update`.

    A column of the coefficients after those of the classes is the floor of `above`.
    """
    terms, gate, propagate = known
    f, r, columns = _computed(f, r, coefficients)
    values, floor = columns[: len(terms)], columns[len(terms) :]
    of_classes = [
        _weighted(a, f, b, r, terms[2 * k : 2 * k + 2])
        for k, (a, b) in enumerate(zip(values[0::2], values[1::2], strict=True))
    ]
    read = above(r, floor[0]) if floor else r
    if gate is None:
        u = torch.where(_conflict(f, read), of_classes[0], of_classes[1])
    else:
        classes = gate(f, read)
        u = of_classes[-1]
        for k, other in enumerate(of_classes[:-1]):
            u = torch.where(classes == k, other, u)
    _write(f, r, u, out, propagate)


def update(f: Tensor, r: Tensor, out: Tensor, coefficients: Tensor, known: Known) -> None:
    """Writes `a*f + b*r` to `out`.

    Args:
        f, r, out: 1-D tensors.
        coefficients: `[2]`, or `[tiles, 2]` with the coefficients of each tile.
        known: What the code is compiled for.
    """
    terms, _, propagate = known
    f, r, (a, b) = _computed(f, r, coefficients)
    _write(f, r, _weighted(a, f, b, r, terms), out, propagate)


def above(r: Tensor, floor: Tensor | None) -> Tensor:
    """`r` as a gate reads it: 0 where its magnitude is below the floor."""
    return r if floor is None else torch.where(r.abs() < floor, 0.0, r)


def simplified(known: Known, f: Tensor, r: Tensor, coefficients: Tensor) -> Known:
    """Returns `known` with the terms and the propagation that these values need.

    Uncompiled code then leaves out calls of `where`, which is slow. The update has the same bits.
    """
    terms, gate, propagate = known
    if "any" in terms:
        is_zero = (coefficients[..., : len(terms)] == 0).view(-1, len(terms))
        some, every = is_zero.any(0).tolist(), is_zero.all(0).tolist()
        terms = tuple(
            term if term != "any" else "zero" if every[k] else "any" if some[k] else "nonzero"
            for k, term in enumerate(terms)
        )
    if propagate:
        total: Any = (f.sum() + r.sum()).tolist()
        propagate = not math.isfinite(total)
    return terms, gate, propagate


def _computed(f: Tensor, r: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients in the dtype of the coefficients, and the columns of the coefficients."""
    columns = list(coefficients.unbind(-1))
    f, r = f.to(coefficients.dtype), r.to(coefficients.dtype)
    if coefficients.ndim == 1:
        return f, r, columns
    return f.view(-1, TILE), r.view(-1, TILE), [c.unsqueeze(-1) for c in columns]


def _write(f: Tensor, r: Tensor, u: Tensor, out: Tensor, propagate: bool) -> None:
    out.copy_(_downcast(_propagated(f, r, u) if propagate else u, out.dtype).view(-1))


def _propagated(f: Tensor, r: Tensor, u: Tensor) -> Tensor:
    # x - x is 0 for a finite x and NaN for NaN and inf.
    return torch.where((f - f) + (r - r) == 0, u, torch.nan)


def _conflict(f: Tensor, r: Tensor) -> Tensor:
    """True where `f` and `r` have strictly opposite signs."""
    return _signed(f, r) < 0


def _signed(f: Tensor, r: Tensor) -> Tensor:
    # `f * r` can underflow. After this scaling, the product of the smallest subnormal numbers does not, and a
    # product that overflows keeps its sign. If one of the two is 0, the product is 0 or NaN.
    large = 2.0**127 if f.dtype == torch.float32 else 2.0**1023
    return (f * large) * (r * large)


def _weighted(a: Tensor, f: Tensor, b: Tensor, r: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """`a*f + b*r`. A gradient whose coefficient is 0 is left out, even if it is NaN or inf."""
    zero = torch.zeros((), dtype=f.dtype, device=f.device)
    x = zero if terms[0] == "zero" else a * f
    y = zero if terms[1] == "zero" else b * r
    if terms[0] == "any":
        x = torch.where(a == 0, zero, x)
    if terms[1] == "any":
        y = torch.where(b == 0, zero, y)
    if "zero" in terms:
        return y if terms[0] == "zero" else x
    u = x + y
    # x + 0 would turn a -0 into a 0.
    if terms[0] == "any":
        u = torch.where(a == 0, y, u)
    return torch.where(b == 0, x, u) if terms[1] == "any" else u


def _downcast(u: Tensor, dtype: torch.dtype) -> Tensor:
    # fp64 is converted to 16 bits through fp32, as in eager torch. The compiler could choose another way.
    return u.to(torch.float32).to(dtype) if dtype.itemsize == 2 else u.to(dtype)


def tile_sums(f: Tensor, r: Tensor, wanted: Wanted, floor: Tensor | None = None) -> Tensor:
    """Sums of every tile, fp64 `[tiles, k]`, without the non-finite counts. It is not compiled.

    `floor` has the number of each tile, `[tiles, 1]`.
    """
    found = _summands(f, r, (-1, TILE), wanted, floor)
    return torch.stack([v.sum(1) for v in found], dim=1).to(torch.float64)


def block_sums(f: Tensor, r: Tensor, wanted: Wanted) -> Tensor:
    """Sums of every block, `[k, blocks, 16]`, without the non-finite counts. The last 16 are to be added."""
    return _block_sums(f, r, None, wanted)


def block_sums_above(f: Tensor, r: Tensor, floor: Tensor, wanted: Wanted) -> Tensor:
    """Like `block_sums`, with a floor `[1]`."""
    return _block_sums(f, r, floor, wanted)


def _block_sums(f: Tensor, r: Tensor, floor: Tensor | None, wanted: Wanted) -> Tensor:
    runs = torch.stack([v.sum(2) for v in _summands(f, r, (-1, _RUNS, _ROWS, _LANES), wanted, floor)])
    return _pairwise(_pairwise(runs.transpose(-1, -2), 1).squeeze(-1), _SUMS)


def padded(t: Tensor) -> Tensor:
    """The elements, followed by zeros up to a whole number of blocks."""
    return torch.nn.functional.pad(t, (0, -t.numel() % BLOCK))


def _pairwise(x: Tensor, size: int) -> Tensor:
    """Adds halves of the last dimension until it has this size, in an order that no compiler changes."""
    while x.shape[-1] > size:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _summands(
    f: Tensor, r: Tensor, shape: tuple[int, ...], wanted: Wanted, floor: Tensor | None
) -> list[Tensor]:
    """The terms of each sum in this shape. Those of SPLIT are right where they are all finite."""
    dtype = compute_dtype(f, r)
    f, r = f.to(dtype).view(shape), r.to(dtype).view(shape)
    sums, gate = wanted
    products = _products(f, r)
    if sums == Sums.PRODUCTS:
        return products
    read = above(r, floor)
    counted = _signed(f, read).lt_(0)  # 0 and 1; uncompiled, faster than a conversion of bools
    if sums == Sums.COUNTED:
        return [*products, counted]
    if gate is None:
        # Factors of 0 and 1 instead of `where`, which is slow uncompiled. The differences are exact.
        inside = [p * counted for p in products]
        return [*(p - q for p, q in zip(products, inside, strict=True)), counted, *inside]
    classes = gate(f, read)
    parts = [classes == 0, classes == 1, (classes != 0) & (classes != 1)]
    first, second, third = (_part(f, r, part) for part in parts)
    return [*first, counted, *second, *third, *(part.to(dtype) for part in parts)]


def sums_of_any(f: Tensor, r: Tensor, wanted: Wanted, floor: Tensor | None = None) -> Tensor:
    """All sums of elements of which some are NaN or inf, fp64 `[k]`."""
    dtype = compute_dtype(f, r)
    f, r = f.to(dtype), r.to(dtype)
    found = _summands(f, r, (-1,), wanted, floor)
    if wanted[0] == Sums.SPLIT:
        inside = _conflict(f, above(r, floor))
        found = [*_part(f, r, ~inside), found[3], *_part(f, r, inside)]
    counts = [(~t.isfinite()).to(dtype) for t in (f, r)]
    return torch.stack([v.sum(dtype=torch.float64) for v in (*found[:4], *counts, *found[4:])])


def _part(f: Tensor, r: Tensor, where: Tensor) -> list[Tensor]:
    return _products(torch.where(where, f, 0.0), torch.where(where, r, 0.0))


def _products(f: Tensor, r: Tensor) -> list[Tensor]:
    return [f * f, f * r, r * r]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
