"""The backend "compiled", for the CPU: torch code on flat tensors, compiled by TorchInductor.

Large tensors are processed one by one, in slices. Small tensors are processed in packs. The sums of a tensor
do not depend on the other tensors of the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from sago.backends import graphs
from sago.backends.graphs import BLOCK, TILE, Known, Wanted, compute_dtype
from sago.backends.inductor import COMPILE_AT_ONCE, compiled_code
from sago.backends.packs import Pack, lay_out
from sago.backends.sums import Sums, insert_nonfinite
from sago.rules import Coefficients, Gate, Rule, evaluate
from sago.rules.draws import Drawn, of_pair

# The number of elements that are processed at a time, compiled (_SLICE) and uncompiled (_EAGER). It limits
# the memory: partial sums take less than 1 MiB, and temporaries of uncompiled code take a few MiB. The sums
# of a slice leave it in the cache for its update.
_SLICE = {torch.float32: 1 << 19, torch.float64: 1 << 18}
_EAGER = 1 << 16


class Batch:
    """Gradient pairs and their layout; see `sago.backends.protocol`."""

    def __init__(
        self,
        device: torch.device,
        forget: Sequence[Tensor | None],
        retain: Sequence[Tensor | None],
        out: Sequence[Tensor],
        rows: Sequence[int],
        row_count: int,
        origins: Sequence[int] = (),
    ) -> None:
        self.device, self.rows, self.row_count, self.origins = device, rows, row_count, origins
        self.bind(forget, retain, out)
        self._packs, self._alone = lay_out(forget, retain, rows)
        self._by_row: dict[bool, tuple[Tensor, Tensor]] = {}

    def bind(
        self, forget: Sequence[Tensor | None], retain: Sequence[Tensor | None], out: Sequence[Tensor]
    ) -> None:
        """Uses these tensors, which have the shapes, strides and dtypes of those of the construction."""
        self.forget, self.retain, self.out = forget, retain, out

    def release(self) -> bool:
        """Drops the references to the tensors, until the next `bind`."""
        self.bind((), (), ())
        return True

    def parts(self, packed: bool) -> tuple[Sequence[Pack], Sequence[int]]:
        """The packs, and the positions of the pairs that are processed alone. Without packs, all are."""
        return (self._packs, self._alone) if packed else ((), range(len(self.rows)))

    def add_up(self, of_pairs: Sequence[Tensor], sums: int, packed: bool) -> Tensor:
        """The table of the sums of all pairs, which are given in the order of `parts`."""
        if packed not in self._by_row:
            packs, alone = self.parts(packed)
            pairs = [*(i for pack in packs for i in pack.pairs), *alone]
            rows = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
            # In the order of the list, which does not depend on the pairs that are packed with them.
            positions = torch.tensor(pairs, dtype=torch.int64, device="cpu")
            order = (rows * len(rows))[positions].add_(positions).argsort()
            self._by_row[packed] = order, torch.bincount(rows, minlength=self.row_count)
        if not of_pairs:
            return torch.zeros(self.row_count, sums, dtype=torch.float64, device=self.device)
        order, counts = self._by_row[packed]
        return _segments(torch.cat(list(of_pairs))[order], counts)


@torch.no_grad()
def gram(
    batch: Batch,
    sums: int,
    gate: Gate | None = None,
    draw: Tensor | None = None,
    floors: Tensor | None = None,
) -> Tensor:
    """The table of these sums, fp64 `[rows, sums]`."""
    packs, alone = batch.parts(draw is None)
    table = []
    for pack in packs:
        pack.fill(batch.forget, batch.retain)
        table.append(_pack_sums(batch, pack, _wanted(sums, gate), floors))
    for i in alone:
        table.append(_sums(batch, i, _wanted(sums, of_pair(gate, draw, batch.origins, i)), floors))
    return batch.add_up(table, sums, draw is None)


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
    values, terms, _ = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
    if floors is not None:
        values = torch.cat([values.expand(batch.row_count, -1), floors[:, None]], dim=1)
    graph = graphs.update_by_class if rule.classes > 1 else graphs.update
    packs, alone = batch.parts(draw is None)
    table = []
    for pack in packs:
        pack.fill(batch.forget, batch.retain)
        if sums:
            table.append(_pack_sums(batch, pack, _wanted(sums, rule.gate), floors))
        rows = 0 if len(values) == 1 else pack.rows if pack.row is None else pack.row
        tensors = pack.forget, pack.retain, pack.retain
        _update(graph, (terms, rule.gate, propagate), tensors, values.to(pack.retain.dtype)[rows])()
        pack.empty(batch.out)
    of_rows = {t: values.to(t).expand(batch.row_count, -1) for t in (torch.float32, torch.float64)}
    for i in alone:
        f, r = _flat_pair(batch.forget[i], batch.retain[i])
        known = terms, of_pair(rule.gate, draw, batch.origins, i), propagate
        row = of_rows[compute_dtype(f, r)][batch.rows[i]]
        update = _update(graph, known, (f, r, _flat(batch.out[i])), row)
        if sums:
            wanted = _wanted(sums, of_pair(rule.gate, draw, batch.origins, i))
            table.append(_sums(batch, i, wanted, floors, update))
        else:
            update()
    return batch.add_up(table, sums, draw is None) if sums else None


def _wanted(sums: int, gate: Gate | None) -> Wanted:
    return sums, gate if sums == Sums.CLASSES else None


def _update(graph: Any, known: Known, tensors: Sequence[Tensor], coefficients: Tensor) -> Callable[..., None]:
    """A function that writes the update of a slice of the tensors, or of all their elements."""
    call = compiled_code(graph, known, tensors, coefficients)

    def write(piece: slice | None = None) -> None:
        parts = tensors if piece is None else [t[piece] for t in tensors]
        if call is not None:
            call(*parts, coefficients)
            return
        tiles = coefficients.split(_EAGER // TILE) if coefficients.ndim > 1 else repeat(coefficients)
        for (f, r, out), c in zip(zip(*(t.split(_EAGER) for t in parts), strict=True), tiles, strict=False):
            graph(f, r, out, c, graphs.simplified(known, f, r, c))

    return write


def _pack_sums(batch: Batch, pack: Pack, wanted: Wanted, floors: Tensor | None) -> Tensor:
    """The sums of each pair of a pack, `[pairs, k]`."""
    of_tiles = None if floors is None else floors.to(pack.retain.dtype)[pack.rows, None]
    sums = _segments(graphs.tile_sums(pack.forget, pack.retain, wanted, of_tiles), pack.tiles)
    if wanted[0] == Sums.PRODUCTS:
        return sums
    # An inf or NaN in a gradient makes one of its squares not finite. The other pairs keep their sums.
    finite: Any = sums.isfinite().all(1).tolist()
    if wanted[1] is not None:
        of_zeros = torch.tensor(_classes_of_zeros(wanted[1], 1), dtype=torch.float64, device="cpu")
        sums[:, -3:] -= torch.outer(pack.padding, of_zeros)
    sums = insert_nonfinite(sums, sums.new_zeros(len(sums), 2))
    for k, i in enumerate(pack.pairs):
        if not finite[k]:
            f, r = _flat_pair(batch.forget[i], batch.retain[i])
            sums[k] = _sums_of_any(f, r, wanted, _floor(batch, i, floors, f, r))
    return sums


def _floor(batch: Batch, i: int, floors: Tensor | None, f: Tensor, r: Tensor) -> Tensor | None:
    """The floor of a pair, `[1]`, in the dtype of its computation."""
    return None if floors is None else floors[batch.rows[i]].to(compute_dtype(f, r)).view(1)


def _sums(
    batch: Batch,
    i: int,
    wanted: Wanted,
    floors: Tensor | None,
    update: Callable[[slice], None] | None = None,
) -> Tensor:
    """The sums of a pair, `[1, k]`. `update` is called for each slice after its sums are taken."""
    f, r = _flat_pair(batch.forget[i], batch.retain[i])
    floor = _floor(batch, i, floors, f, r)
    graph = graphs.block_sums if floor is None else graphs.block_sums_above
    call = compiled_code(graph, wanted, (f, r), floor)
    dtype = compute_dtype(f, r)
    length = _SLICE[dtype] * (2 if wanted[0] == Sums.PRODUCTS else 1)
    total = [0.0] * wanted[0]
    for start in range(0, f.numel(), length):
        piece = slice(start, start + length)
        of_slice = _slice_sums(f[piece], r[piece], wanted, floor, call)
        total = [x + y for x, y in zip(total, of_slice, strict=True)]
        if update is not None:
            update(piece)
    return torch.tensor([total], dtype=torch.float64, device="cpu")


def _slice_sums(
    f: Tensor, r: Tensor, wanted: Wanted, floor: Tensor | None, call: Callable[..., Tensor] | None
) -> list[float]:
    gate, numel = wanted[1], f.numel()
    more = () if floor is None else (floor,)
    graph: Any = graphs.block_sums if floor is None else graphs.block_sums_above
    start = gate.at if isinstance(gate, Drawn) else 0
    whole, padding = numel // BLOCK * BLOCK, -numel % BLOCK
    pairs = [(f[:whole], r[:whole])] if padding else [(f, r)]
    if padding:
        pairs.append((graphs.padded(f[whole:]), graphs.padded(r[whole:])))
    if call is not None:
        blocks = [call(*pair, *more) for pair in pairs if len(pair[0])]
    else:
        pieces = (zip(*(t.split(_EAGER) for t in pair), strict=True) for pair in pairs if len(pair[0]))
        blocks = [graph(f, r, *more, wanted) for f, r in chain(*pieces)]
    # A sum of fewer than 32768 numbers is taken in one thread.
    of_blocks = [x.sum(-1, dtype=torch.float64) for x in blocks]
    sums: list[float] = (torch.cat(of_blocks, dim=1) if len(of_blocks) > 1 else of_blocks[0]).sum(-1).tolist()
    if wanted[0] == Sums.PRODUCTS:
        return sums
    # An inf or NaN in a gradient makes one of its squares not finite.
    if not all(map(math.isfinite, sums)):
        if isinstance(gate, Drawn):
            gate.at = start
        of_any: list[float] = _sums_of_any(f, r, wanted, floor).tolist()
        return of_any
    if gate is not None and padding:
        if isinstance(gate, Drawn):
            gate.at = start + numel
        of_zeros = _classes_of_zeros(gate, padding)
        sums[-3:] = [x - n for x, n in zip(sums[-3:], of_zeros, strict=True)]
    return [*sums[:4], 0.0, 0.0, *sums[4:]]


def _sums_of_any(f: Tensor, r: Tensor, wanted: Wanted, floor: Tensor | None) -> Tensor:
    pieces = zip(f.split(_EAGER), r.split(_EAGER), strict=True)
    return torch.stack([graphs.sums_of_any(*pair, wanted, floor) for pair in pieces]).sum(0)


def _classes_of_zeros(gate: Gate, numel: int) -> list[int]:
    """The number of elements of each of the three classes of pairs of zeros."""
    zeros = torch.zeros(numel, dtype=torch.float32, device="cpu")
    classes = gate(zeros, zeros).tolist()
    return [classes.count(k) for k in range(3)]


def _segments(values: Tensor, lengths: Tensor) -> Tensor:
    """The sums of `lengths[0]`, `lengths[1]` ... rows of `values`, each in order."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)


def _flat_pair(f: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both gradients flat in memory order, with zeros for None."""
    flat = [None if t is None else _flat(t) for t in (f, r)]
    zeros = next(torch.zeros((), dtype=t.dtype, device=t.device).expand_as(t) for t in flat if t is not None)
    return zeros if flat[0] is None else flat[0], zeros if flat[1] is None else flat[1]


def _flat(t: Tensor) -> Tensor:
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def has_compiler() -> bool:
    """Whether torch can compile code for the CPU on this machine. Compiles a small graph to find out."""
    example = torch.empty(COMPILE_AT_ONCE, dtype=torch.float32, device="cpu")
    pair = torch.empty(2, dtype=torch.float32, device="cpu")
    return (
        compiled_code(graphs.update, (("nonzero", "nonzero"), None, False), [example] * 3, pair) is not None
    )
