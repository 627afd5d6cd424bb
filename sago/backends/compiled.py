"""The backend "compiled", for the CPU: torch code on flat tensors, compiled by TorchInductor.

The sums and the update are separate graphs. In one graph they do not fuse, which is ten times slower.
`make_fx` traces each graph once, with a symbolic size, and TorchInductor compiles it once for each
combination of dtypes. TorchDynamo takes no part, so none of its limits and none of its guards on global state
(threads, grad mode, autocast, default dtype, deterministic mode) apply. The same code also runs uncompiled,
with the same bits. It does so for small tensors, until a compilation would have paid for itself, while
another thread compiles, and if the compilation fails.

Sums are taken over a fixed tree, which does not depend on the number of threads. A lane adds 32 elements one
after another in fp32 (fp64 for fp64 gradients), and four such sums pairwise. The lanes of a block are added
pairwise in fp64, then the blocks of a slice of 512 Ki elements (256 Ki in fp64), and then the slices.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sago.backends.protocol import Batch
from sago.backends.sums import Sums, insert_nonfinite, without_nonfinite
from sago.rules import Coefficients, Gate, Rule, Term, evaluate
from sago.rules.draws import Drawn, of_pair

# Which coefficients are zero, the gate of the rule, and whether NaN and inf propagate.
Known = tuple[tuple[Term, ...], Gate | None, bool]

Wanted = tuple[int, Gate | None]  # the sums, and for CLASSES the gate

COMPILE_FROM = 1 << 15  # elements of the smallest tensor for which a call of compiled code pays
COMPILE_AT_ONCE = 1 << 20  # elements of a tensor that is not run uncompiled first
COMPILE_AFTER = 1 << 27  # elements that run uncompiled first: some seconds, as a compilation takes
# Two vectors of fp32 in the widest registers. With less than one, TorchInductor lets several threads
# add the elements of a lane.
_LANES = 32
# A lane adds _RUNS * _DEPTH elements: the sum of 128 squares of 1e18 is finite in fp32. The roundings of 32
# equal squares, which have the same sign, add up to at most 6.6e-7 of their sum. With 64 it would be 1.3e-6.
_RUNS, _DEPTH = 4, 32
_FAN_IN = 1024
# The number of elements that are processed at a time, compiled (_SUMMED) and uncompiled (_EAGER). It limits
# the memory: partial sums take less than 1 MiB, and temporaries of uncompiled code take a few MiB.
_SUMMED = {torch.float32: 1 << 19, torch.float64: 1 << 18}
_EAGER = 1 << 15
_EXAMPLE = 1 << 21  # elements of the tensors that a graph is compiled with

_log = logging.getLogger("sago")


def gram(batch: Batch, sums: int, gate: Gate | None = None, draw: Tensor | None = None) -> Tensor:
    """The table of these sums, fp64 `[rows, sums]`."""
    return _table(batch, sums, gate, draw)


def _table(batch: Batch, sums: int, gate: Gate | None, draw: Tensor | None) -> Tensor:
    gate = gate if sums == Sums.CLASSES else None
    pairs = [_flat_pair(f, r) for f, r in zip(batch.forget, batch.retain, strict=True)]
    by_row: list[list[Tensor]] = [[] for _ in range(batch.row_count)]
    for i, (pair, row) in enumerate(zip(pairs, batch.rows, strict=True)):
        by_row[row].append(_pair_sums(*pair, (sums, of_pair(gate, draw, batch.origins, i))))
    zero = torch.zeros(without_nonfinite(sums), dtype=torch.float64, device=batch.device)
    table = torch.stack([_total(found) if found else zero for found in by_row])
    if sums == Sums.PRODUCTS:
        return table
    # An inf or NaN makes ff or rr not finite, so only the elements of such rows are inspected.
    nonfinite = torch.zeros(batch.row_count, 2, dtype=torch.float64, device=batch.device)
    suspects = set((~table.isfinite().all(1)).nonzero().flatten().tolist())
    for pair, row in zip(pairs, batch.rows, strict=True):
        if row in suspects:
            nonfinite[row] += torch.stack([_count_nonfinite(t) for t in pair])
    return insert_nonfinite(table, nonfinite)


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
    draw: Tensor | None = None,
) -> Tensor | None:
    """Writes the update of every pair to `out`; see `sago.backends.protocol`. The sums need another pass."""
    table = _table(batch, sums, rule.gate, draw) if sums else None
    values, terms, _ = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
    rows = {t: values.to(t).expand(batch.row_count, -1).unbind(0) for t in (torch.float32, torch.float64)}
    graph = _gated_combine if rule.classes > 1 else _combine
    pairs = zip(batch.forget, batch.retain, batch.out, batch.rows, strict=True)
    for i, (f, r, out, row) in enumerate(pairs):
        f, r = _flat_pair(f, r)
        known = terms, of_pair(rule.gate, draw, batch.origins, i), propagate
        _update(graph, known, (f, r, _flat(out)), rows[_compute_dtype(f, r)][row])
    return table


def _update(graph: Any, known: Known, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    call = _found(graph, known, tensors)
    if call is not None:
        call(*tensors, coefficients)
        return
    for pieces in zip(*(t.split(_EAGER) for t in tensors), strict=True):
        graph(*pieces, coefficients, known)


def _gated_combine(f: Tensor, r: Tensor, out: Tensor, coefficients: Tensor, known: Known) -> None:
    terms, gate, propagate = known
    f, r = f.to(coefficients.dtype), r.to(coefficients.dtype)
    of_classes = [
        _weighted(a, f, b, r, terms[2 * k : 2 * k + 2])
        for k, (a, b) in enumerate(zip(coefficients[0::2], coefficients[1::2], strict=True))
    ]
    if gate is None:
        u = torch.where(_conflict(f, r), of_classes[0], of_classes[1])
    else:
        classes = gate(f, r)
        u = of_classes[-1]
        for k, other in enumerate(of_classes[:-1]):
            u = torch.where(classes == k, other, u)
    out.copy_(_downcast(_propagated(f, r, u) if propagate else u, out.dtype))


def _combine(f: Tensor, r: Tensor, out: Tensor, coefficients: Tensor, known: Known) -> None:
    terms, _, propagate = known
    a, b = coefficients.unbind()
    f, r = f.to(a.dtype), r.to(a.dtype)
    u = _weighted(a, f, b, r, terms)
    out.copy_(_downcast(_propagated(f, r, u) if propagate else u, out.dtype))


def _propagated(f: Tensor, r: Tensor, u: Tensor) -> Tensor:
    # x - x is 0 for a finite x and NaN for NaN and inf.
    return torch.where((f - f) + (r - r) == 0, u, torch.nan)


def _conflict(f: Tensor, r: Tensor) -> Tensor:
    # The signs are compared because f * r underflows. Nested `where` needs fewer masks than `&` and `|`.
    return torch.where(f > 0, r, torch.where(f < 0, -r, 0.0)) < 0


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


def _block_sums(f: Tensor, r: Tensor, wanted: Wanted) -> Tensor:
    """Sums of every block, fp64 `[k, blocks]`, without the non-finite counts."""
    return torch.stack([_lanes_and_runs(v.sum(2)) for v in _summands(f, r, wanted)])


def _block_sums_in_order(f: Tensor, r: Tensor, wanted: Wanted) -> Tensor:
    """Like `_block_sums`, but adds one element after another, as compiled code does, for the same bits."""
    rows = torch.stack(_summands(f, r, wanted)).unbind(3)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return _lanes_and_runs(total)


def _summands(f: Tensor, r: Tensor, wanted: Wanted) -> list[Tensor]:
    """The terms of each sum, `[blocks, _RUNS, _DEPTH, lanes]`."""
    shape, dtype = (-1, _RUNS, _DEPTH, _LANES), _compute_dtype(f, r)
    f, r = f.to(dtype).view(shape), r.to(dtype).view(shape)
    sums, gate = wanted
    if sums == Sums.PRODUCTS:
        return _products(f, r)
    conflict = _conflict(f, r)
    if sums == Sums.COUNTED:
        return [*_products(f, r), conflict.to(dtype)]
    if gate is None:
        outside = _products(torch.where(conflict, 0.0, f), torch.where(conflict, 0.0, r))
        return [*outside, conflict.to(dtype), *_part(f, r, conflict)]
    classes = gate(f, r)
    parts = [classes == 0, classes == 1, (classes != 0) & (classes != 1)]
    first, second, third = (_part(f, r, part) for part in parts)
    return [*first, conflict.to(dtype), *second, *third, *(part.to(dtype) for part in parts)]


def _part(f: Tensor, r: Tensor, where: Tensor) -> list[Tensor]:
    return _products(torch.where(where, f, 0.0), torch.where(where, r, 0.0))


def _products(f: Tensor, r: Tensor) -> list[Tensor]:
    return [f * f, f * r, r * r]


def _lanes_and_runs(x: Tensor) -> Tensor:
    """The sum of `[..., _RUNS, lanes]` over both: of the runs in the dtype of `x`, of the lanes in fp64."""
    return _pairwise(_pairwise(x.transpose(-1, -2)).to(torch.float64))


def _pairwise(x: Tensor) -> Tensor:
    """The sum over the last dimension, whose size is a power of 2, in an order that no compiler changes."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _pair_sums(f: Tensor, r: Tensor, wanted: Wanted) -> Tensor:
    block, length = _RUNS * _DEPTH * _LANES, _SUMMED[_compute_dtype(f, r)]
    whole = f.numel() // block * block
    slices = list(zip(f[:whole].split(length), r[:whole].split(length), strict=True)) if whole else []
    if whole < f.numel():
        f_tail, r_tail = (torch.nn.functional.pad(t[whole:], (0, whole + block - t.numel())) for t in (f, r))
        slices.append((f_tail, r_tail))
    call = _found(_block_sums, wanted, (f, r))
    if call is not None:
        partials = [call(*pair) for pair in slices]
    else:
        # Smaller tensors are never compiled, so their sums can use the faster order with other bits.
        graph: Any = _block_sums if f.numel() < COMPILE_FROM else _block_sums_in_order
        partials = [
            torch.cat([graph(*p, wanted) for p in zip(*(t.split(_EAGER) for t in pair), strict=True)], dim=1)
            for pair in slices
        ]
    total = _total([_tree(p) for p in partials])
    gate = wanted[1]
    if gate is not None:  # the padding was counted in the classes of pairs of zeros
        if isinstance(gate, Drawn):
            gate.at -= -f.numel() % block
        zeros = torch.zeros(-f.numel() % block, dtype=_compute_dtype(f, r))
        classes = gate(zeros, zeros)
        total[-3:] -= torch.stack([(classes == k).sum() for k in range(3)])
    return total


def _total(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else _tree(torch.stack(sums, dim=1))


def _tree(partials: Tensor) -> Tensor:
    """The sum over the last dimension in a fixed order. torch would split a long sum over its threads."""
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


def _compute_dtype(f: Tensor, r: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32


def _found(graph: Any, constant: Any, tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
    """The compiled code for these tensors; None where they are processed uncompiled."""
    numel = tensors[0].numel()
    if numel < COMPILE_FROM or not all(t.is_contiguous() for t in tensors):
        return None
    if any(isinstance(x, Drawn) for x in constant):  # random gates are not compiled
        return None
    key = graph, constant, *(t.dtype for t in tensors)
    if key in _compiled:
        return _compiled[key]
    if numel < COMPILE_AT_ONCE:
        _uncompiled[key] += numel
        if _uncompiled[key] <= COMPILE_AFTER:
            return None
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or not _lock.acquire(blocking=False):
        return None
    try:
        if key not in _compiled:
            _compiled[key] = _compile(*key)
    finally:
        _lock.release()
    return _compiled[key]


_compiled: dict[Any, Callable[..., Any] | None] = {}  # None where the compilation failed
_uncompiled: Counter[Any] = Counter()  # elements that were processed uncompiled, by the same keys
_lock = threading.Lock()  # two compilations at a time would share the state of the compiler


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held the lock


def _compile(graph: Any, constant: Any, *dtypes: torch.dtype) -> Callable[..., Any] | None:
    """`graph(..., constant)` for 1-D tensors of these dtypes and any size; None if it cannot be compiled."""
    _announce()
    try:
        return _build(graph, constant, dtypes)
    except Exception as error:  # torch, TorchInductor and the C++ compiler share no base class of errors
        _warn_uncompiled(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return None


def _build(graph: Any, constant: Any, dtypes: Sequence[torch.dtype]) -> Callable[..., Any]:
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    compute_dtype = torch.float64 if torch.float64 in dtypes[:2] else torch.float32
    coefficients = 0 if graph is _block_sums else len(constant[0])
    with (
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # warnings of torch at its imports
        # The size is large so that the compiler uses threads. The memory is not touched.
        examples = [torch.empty(_EXAMPLE, dtype=d) for d in dtypes]
        if coefficients:
            examples.append(torch.empty(coefficients, dtype=compute_dtype))
        traced = make_fx(lambda *args: graph(*args, constant), tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
        # Without this option, the code would contain the current number of threads.
        options = {"cpp.dynamic_threads": True}
        if torch.__version__.startswith("2.6."):
            options["fx_graph_cache"] = False  # a cached graph raises an error without TorchDynamo
        return compile_graph(traced, inputs, options=options)


@cache
def _announce() -> None:
    _log.warning(
        "sago: compiling code for gradients on the CPU, which takes some seconds for each combination of "
        "dtypes. Later processes take less, because torch caches the result on disk."
    )


@cache
def _warn_uncompiled(reason: str) -> None:
    warnings.warn(
        f"sago: torch cannot compile code for the CPU ({reason}); gradients on the CPU are synthesized by "
        "eager torch, which gives the same result more slowly.",
        RuntimeWarning,
        stacklevel=2,
    )


def has_compiler() -> bool:
    """Whether torch can compile code for the CPU on this machine. Compiles a small graph to find out."""
    example = torch.empty(COMPILE_AT_ONCE, dtype=torch.float32, device="cpu")
    return _found(_combine, (("nonzero", "nonzero"), None, False), [example] * 3) is not None
