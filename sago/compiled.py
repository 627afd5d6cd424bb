"""The CPU path: the work of the two kernels as torch code on flat tensors, compiled by torch.compile.

A gram graph and a combine graph are kept apart: in one graph the sums and the store do not fuse, and it
runs an order of magnitude slower. Tensors of fewer than `COMPILE_FROM` elements run the same code
uncompiled, and so does everything where no C++ compiler is found.

Sums are taken over a fixed tree that does not depend on the number of threads: 128 elements a lane in
fp32 (fp64 for fp64 gradients), the lanes of a block in fp64, then 1024 blocks at a time, in slices of 4 Mi
elements (2 Mi in fp64), then the slices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.rules import Coefficients, Rule, Term, evaluate

Known = tuple[tuple[Term, ...], bool]  # about the coefficients; whether NaN and inf propagate

COMPILE_FROM = 32768
_LINE = 64  # bytes: a lane an element of a cache line, so that memory is read in order
_DEPTH = 128  # elements a lane adds: that many squares of 1e18 stay in the range of fp32
_FAN_IN = 1024
# Elements at a time, which bounds what is allocated: partial sums of less than 1 MiB where the code is
# compiled, a dozen temporaries where it is not.
_SUMMED = {torch.float32: 1 << 22, torch.float64: 1 << 21}
_EAGER = 1 << 18


class Batch(NamedTuple):
    """Gradient pairs on one device and where their update goes; see `sago.kernels.Batch`."""

    device: torch.device
    forget: Sequence[Tensor | None]
    retain: Sequence[Tensor | None]
    out: Sequence[Tensor]
    rows: Sequence[int]
    row_count: int


def gram(batch: Batch, sums: int) -> Tensor:
    """The sums of every row, fp64 `[rows, sums]`, with the columns of `sago.kernels.gram`."""
    return _table(batch, sums)


def _table(batch: Batch, sums: int) -> Tensor:
    pairs = [_flat_pair(f, r) for f, r in zip(batch.forget, batch.retain, strict=True)]
    members: list[list[Tensor]] = [[] for _ in range(batch.row_count)]
    for pair, row in zip(pairs, batch.rows, strict=True):
        members[row].append(_pair_sums(*pair, sums))
    zero = torch.zeros(3 if sums == 3 else sums - 2, dtype=torch.float64, device=batch.device)
    table = torch.stack([_total(row) if row else zero for row in members])
    if sums == 3:
        return table
    # An inf or NaN shows in ff or rr: elements are looked at only in rows with a sum that is not finite.
    nonfinite = torch.zeros(batch.row_count, 2, dtype=torch.float64, device=batch.device)
    suspects = set((~table.isfinite().all(1)).nonzero().flatten().tolist())
    for pair, row in zip(pairs, batch.rows, strict=True):
        if row in suspects:
            nonfinite[row] += torch.stack([_count_nonfinite(t) for t in pair])
    return torch.cat([table[:, :4], nonfinite, table[:, 4:]], dim=1)


def _count_nonfinite(t: Tensor) -> Tensor:
    return torch.stack([(~piece.isfinite()).sum() for piece in t.split(_EAGER)]).sum()


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
    """Writes the update of every pair to `out`; see `sago.kernels.combine`. Sums take a pass of their own."""
    table = _table(batch, sums) if sums else None
    values, terms = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
    rows = {t: values.to(t).expand(batch.row_count, -1).unbind(0) for t in (torch.float32, torch.float64)}
    graph = _gated_combine if rule.gated else _combine
    for f, r, out, row in zip(batch.forget, batch.retain, batch.out, batch.rows, strict=True):
        f, r = _flat_pair(f, r)
        scalars = rows[_compute_dtype(f, r)][row].unbind()
        for call, pieces in _pieces(graph, (terms, propagate), f, r, _flat(out)):
            call(*pieces, *scalars)
    return table


def _gated_combine(
    f: Tensor, r: Tensor, out: Tensor, a_c: Tensor, b_c: Tensor, a: Tensor, b: Tensor, known: Known
) -> None:
    terms, propagate = known
    f, r = f.to(a.dtype), r.to(a.dtype)
    u = torch.where(_conflict(f, r), _weighted(a_c, f, b_c, r, terms[:2]), _weighted(a, f, b, r, terms[2:]))
    out.copy_(_downcast(_propagated(f, r, u) if propagate else u, out.dtype))


def _combine(f: Tensor, r: Tensor, out: Tensor, a: Tensor, b: Tensor, known: Known) -> None:
    terms, propagate = known
    f, r = f.to(a.dtype), r.to(a.dtype)
    u = _weighted(a, f, b, r, terms)
    out.copy_(_downcast(_propagated(f, r, u) if propagate else u, out.dtype))


def _propagated(f: Tensor, r: Tensor, u: Tensor) -> Tensor:
    # x - x is 0 for a finite x and NaN for NaN and inf.
    return torch.where((f - f) + (r - r) == 0, u, torch.nan)


def _conflict(f: Tensor, r: Tensor) -> Tensor:
    # Signs, never the product: f * r underflows. Nested, this costs the CPU fewer masks than `&` and `|`.
    return torch.where(f > 0, r, torch.where(f < 0, -r, 0.0)) < 0


def _weighted(a: Tensor, f: Tensor, b: Tensor, r: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """`a*f + b*r`, where a gradient whose coefficient is 0 is left out, be it NaN or inf."""
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
    # fp64 goes to 16 bits through fp32 here as in eager torch, whatever the compiler would choose.
    return u.to(torch.float32).to(dtype) if dtype.itemsize == 2 else u.to(dtype)


def _block_sums(f: Tensor, r: Tensor, sums: int) -> Tensor:
    """Sums of every block, fp64 `[k, blocks]`, without the non-finite counts."""
    shape, dtype = (-1, _DEPTH, _lanes(f, r)), _compute_dtype(f, r)
    f, r = f.to(dtype).view(shape), r.to(dtype).view(shape)
    if sums == 3:
        values = _products(f, r)
    elif sums == 6:
        values = [*_products(f, r), _conflict(f, r).to(dtype)]
    else:
        conflict = _conflict(f, r)
        outside = _products(torch.where(conflict, 0.0, f), torch.where(conflict, 0.0, r))
        inside = _products(torch.where(conflict, f, 0.0), torch.where(conflict, r, 0.0))
        values = [*outside, conflict.to(dtype), *inside]
    return torch.stack([v.sum(1).sum(1, dtype=torch.float64) for v in values])


def _products(f: Tensor, r: Tensor) -> list[Tensor]:
    return [f * f, f * r, r * r]


def _pair_sums(f: Tensor, r: Tensor, sums: int) -> Tensor:
    block = _DEPTH * _lanes(f, r)
    whole = f.numel() // block * block
    calls = list(_pieces(_block_sums, sums, f[:whole], r[:whole], length=_SUMMED[_compute_dtype(f, r)]))
    if whole < f.numel():
        padding = (0, whole + block - f.numel())
        call = calls[-1][0] if calls else _bound(_block_sums, sums)
        calls.append((call, [torch.nn.functional.pad(t[whole:], padding) for t in (f, r)]))
    return _total([_tree(call(*tensors)) for call, tensors in calls])


def _total(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else _tree(torch.stack(sums, dim=1))


def _tree(partials: Tensor) -> Tensor:
    """The sum over the last dimension in a fixed order: torch splits a long sum by threads."""
    while partials.shape[-1] > _FAN_IN:
        padding = -partials.shape[-1] % _FAN_IN
        partials = torch.nn.functional.pad(partials, (0, padding)).unflatten(-1, (-1, _FAN_IN)).sum(-1)
    return partials.sum(-1) if partials.shape[-1] > 1 else partials.squeeze(-1)


def _flat_pair(f: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both gradients flat in memory order, with zeros for None."""
    flat = [None if t is None else _flat(t) for t in (f, r)]
    zeros = next(torch.zeros((), dtype=t.dtype, device=t.device).expand_as(t) for t in flat if t is not None)
    return zeros if flat[0] is None else flat[0], zeros if flat[1] is None else flat[1]


def _flat(t: Tensor) -> Tensor:
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def _lanes(f: Tensor, r: Tensor) -> int:
    return _LINE // max(f.dtype.itemsize, r.dtype.itemsize)


def _compute_dtype(f: Tensor, r: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32


def _pieces(
    graph: Any, constant: Any, *tensors: Tensor, length: int | None = None
) -> Iterator[tuple[Callable[..., Any], Sequence[Tensor]]]:
    """What to call on which parts of the tensors, at most `length` elements at a time.

    `constant` is the last argument of `graph`; the callables take the others.
    """
    numel = tensors[0].numel()
    if numel == 0:
        return
    if numel < COMPILE_FROM or not all(t.is_contiguous() for t in tensors) or not has_compiler():
        for pieces in [tensors] if numel <= _EAGER else zip(*(t.split(_EAGER) for t in tensors), strict=True):
            yield _bound(graph, constant), pieces
        return
    call = _compiled(graph, constant, *(t.dtype for t in tensors))
    whole = length is None or numel <= length
    for pieces in [tensors] if whole else zip(*(t.split(length) for t in tensors), strict=True):
        # Storages of their own: torch.compile guards on storages that are shared, and works around them.
        yield call, [torch.from_dlpack(t) for t in pieces]


@cache
def _bound(graph: Any, constant: Any) -> FunctionType:
    return FunctionType(graph.__code__, graph.__globals__, graph.__name__, (constant,))


@cache
def _compiled(graph: Any, constant: Any, *dtypes: torch.dtype) -> Callable[..., Any]:
    # With a code object of its own: torch.compile limits the variants of one.
    own = FunctionType(graph.__code__.replace(), graph.__globals__, graph.__name__, (constant,))
    return torch.compile(own, dynamic=True, fullgraph=True)


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether torch.compile can build C++ here; if not, says so once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, at its imports
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(1, device="cpu"))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"sago: torch.compile found no working C++ compiler ({reason}); "
            "gradients on the CPU are synthesized by eager torch, which is slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
