"""The steps of a synthesis: gram, coefficients, combine, statistics."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.backends import choose, sums
from sago.backends.protocol import Backend
from sago.backends.streams import Cache, Streams
from sago.backends.sums import Sums
from sago.backends.upload import upload
from sago.core.coefficients import floors, gram, limited
from sago.core.overlap import is_dense
from sago.core.pairs import Call, Pairs
from sago.core.report import SynthesisReport
from sago.core.statistics import Statistics, nothing, report

Tensors = Sequence[Tensor | None]


class OnDevice(NamedTuple):
    """The pairs on one device, and the backend that runs there.

    `positions` are those of the pairs in the list. Tensors that are not dense in memory are processed as
    copies. `before` has pairs (copy, source): the source is copied before the synthesis. `after` has pairs
    (target, copy): the copy is written back after it. `streams` are those that use the copies.
    """

    backend: Backend
    batch: Any
    device: torch.device
    positions: list[int]
    before: list[tuple[Tensor, Tensor]]
    after: list[tuple[Tensor, Tensor]]
    streams: Streams


class Pipeline:
    """Gradient pairs, laid out on their devices. Each synthesis reads the current values of their memory.

    Args:
        pairs: The pairs.
        numel: The number of elements of each row, on all ranks. Flat buffers have more elements, because the
            gaps between parameters hold zeros.
        own: The number of elements that this rank counts, if it is smaller.
    """

    def __init__(self, pairs: Pairs, numel: list[int], own: list[int] | None = None) -> None:
        self.keys: list[Hashable] = pairs.keys
        self.numel, self._own = numel, own or numel
        self._uploaded = Cache(2)
        self._spread = pairs.spread
        rows, report_rows = pairs.rows, list(range(len(self.keys)))
        if self._spread is not None:
            rows = _with_scratch_rows(rows, self._spread.counted, report_rows)
        origins = pairs.origins()
        self._located = origins is not None
        self.devices = [
            _on_device(pairs, rows, origins or [0] * len(rows), len(report_rows), device, backend)
            for device, backend in pairs.backends.items()
        ]
        self._report_rows = report_rows
        self._none: list[Tensor | None] = [None] * len(self.devices)
        self.bound = True  # False between `release` and `bind`

    def release(self) -> bool:
        """Drops the references to the tensors, which the caller then keeps alive.

        Returns False if a backend or a copy still needs the tensors.
        """
        released = all(not (d.before or d.after) and d.batch.release() for d in self.devices)
        self.bound = not released
        return released

    def bind(self, forget: Tensors, retain: Tensors, out: Tensors) -> None:
        """Uses these lists after a `release`. They have the memory and the metadata of the earlier ones."""
        self.bound = True
        for there in self.devices:
            there.batch.bind(*([side[i] for i in there.positions] for side in (forget, retain, out)))

    def synthesize(self, call: Call, begin: Callable[[], object] = nothing) -> SynthesisReport:
        """Writes the update of every pair, and reports on it. `begin` is called before the first write."""
        # The report is computed when it is read, and the rule may have replaced its numbers by then.
        then = call if call.state is None else call._replace(state=call.state.clone())
        return report(then, self.keys, self.numel, self.update(call, begin))

    def update(self, call: Call, begin: Callable[[], object] = nothing) -> Statistics | None:
        """Writes the update of every pair. Returns the sums, if any were computed.

        `begin` is called before the first write. An earlier error leaves all gradients as they are.
        """
        rule, wanted = call.rule, call.sums
        draws = of_rows = self._none
        if call.draw is not None:
            draws = [call.draw.to(there.device) for there in self.devices]
        if call.draw is not None and not self._located:
            raise ValueError(
                "Gradients should be sharded along their first dimension for a rule with a random gate, "
                f"whose numbers depend on the positions of elements. Found {rule.name!r} and other shards."
            )
        for there in self.devices:
            if there.before or there.after:
                copies = [copy for copy, _ in there.before] + [copy for _, copy in there.after]
                there.streams.join(copies)
                _copy(there.before)
        # Sums that the update depends on are computed first. Sums for `reduce_gram` are also computed first,
        # because it may raise. For DTensors, sums that only the report needs are started after the update.
        ahead = wanted > 0 and (rule.scope != "element" or call.limited or call.reduce_gram is not None)
        taken = inner = coefficients = None
        if (wanted or call.retain_floor) and self._spread is not None:
            self._spread.over.check_same(self._spread.layout, self.devices[0].device)
        if call.retain_floor:
            of_rows = self._floors(call)
        if ahead:
            taken = self._gram(call, wanted, draws, of_rows)
            inner = gram(rule, taken.table)
        if call.limited or call.scales != (1.0, 1.0) or call.state is not None:
            table = None if taken is None else taken.table
            coefficients = limited(call, table, inner, self.devices[0].device)
            coefficients = coefficients._replace(values=self._all_rows(coefficients.values))
        if inner is not None:
            inner = self._all_rows(inner)
        tables = []
        begin()
        for there, draw, floor in zip(self.devices, draws, of_rows, strict=True):
            table = there.backend.combine(
                there.batch,
                rule,
                _to(call.gamma, there.device),
                _to(call.alpha, there.device),
                call.eps,
                _to(inner, there.device),
                Sums.NONE if ahead else wanted,
                coefficients and coefficients._replace(values=_to(coefficients.values, there.device)),
                call.nonfinite == "propagate",
                draw,
                floor,
            )
            if table is not None:
                tables.append(table)
            if there.after:
                _copy(there.after)
        if call.state is not None and coefficients is not None and coefficients.state is not None:
            call.state.copy_(coefficients.state)
        if tables:
            taken = self._reduced(tables, call)  # an error here leaves the update already written
        return taken

    def _gram(
        self, call: Call, wanted: Sums, draws: Sequence[Tensor | None], of_rows: Sequence[Tensor | None]
    ) -> Statistics:
        """The sums, which include those of other ranks. `of_rows` has the floors for each device."""
        gate = call.rule.gate if wanted == Sums.CLASSES else None
        grams = [
            there.backend.gram(there.batch, wanted, gate, draw, floor)
            for there, draw, floor in zip(self.devices, draws, of_rows, strict=True)
        ]
        taken = self._reduced(grams, call)
        taken.wait()
        return taken._replace(wait=nothing)

    def _floors(self, call: Call) -> list[Tensor | None]:
        """The floors of all rows, for each device."""
        taken = self._gram(call, Sums.PRODUCTS, self._none, self._none)
        elements = taken.elements
        if not isinstance(elements, Tensor):
            elements = self._upload("numel", self.numel, torch.float64, taken.table.device)
        found = self._all_rows(floors(call, taken.table, elements))
        return [found.to(there.device) for there in self.devices]

    def _reduced(self, tables: Sequence[Tensor], call: Call) -> Statistics:
        """Adds up the tables of all devices and ranks."""
        table = tables[0]
        for other in tables[1:]:
            table = table + other.to(table.device)
        table = table[: len(self.keys)]
        if call.scales != (1.0, 1.0):
            table = sums.scale(table, *call.scales)
        if call.reduce_gram is not None:
            counts = self._upload("elements", self._own, table.dtype, table.device)
            table = call.reduce_gram(torch.cat([table, counts[:, None]], dim=1))
            return Statistics(table[:, :-1], table[:, -1])
        if self._spread is not None:
            return Statistics(table, self.numel, self._spread.over.start(table))
        return Statistics(table, self.numel)

    def _all_rows(self, values: Tensor) -> Tensor:
        """Repeats the values of report rows for scratch rows. A single row is valid for all rows."""
        if len(self._report_rows) == len(self.keys) or len(values) < len(self.keys):
            return values
        return values[self._upload("rows", self._report_rows, torch.int64, values.device)]

    def _upload(self, name: str, values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`torch.tensor(values)`, uploaded once for each stream."""
        found: Tensor = self._uploaded.get(name, [device], lambda: upload(values, dtype, device))
        return found


def _with_scratch_rows(rows: Sequence[int], counted: Sequence[bool], report_rows: list[int]) -> list[int]:
    """Gives pairs that another rank counts scratch rows of their own.

    Appends the report's row of each scratch row to `report_rows`.
    """
    scratch: dict[int, int] = {}
    found = list(rows)
    for i, row in enumerate(rows):
        if not counted[i]:
            if row not in scratch:
                scratch[row] = len(report_rows)
                report_rows.append(row)
            found[i] = scratch[row]
    return found


def _on_device(
    pairs: Pairs,
    row_of: Sequence[int],
    origin_of: Sequence[int],
    row_count: int,
    device: torch.device,
    backend: str,
) -> OnDevice:
    module = choose.load(backend)
    forget, retain, out, rows, origins, positions = [], [], [], [], [], []
    before: list[tuple[Tensor, Tensor]] = []
    after: list[tuple[Tensor, Tensor]] = []
    sides = pairs.forget, pairs.retain, pairs.out
    for i, (f, r, o, row, origin) in enumerate(zip(*sides, row_of, origin_of, strict=True)):
        if o is None or o.device != device or o.numel() == 0:
            continue
        tensors = [t for t in (f, r, o) if t is not None]
        if any(t.stride() != o.stride() or t.is_neg() or not is_dense(t) for t in tensors):
            f, r = _dense(f, before), _dense(r, before)
            after.append((o, torch.empty_like(o, memory_format=torch.contiguous_format)))
            o = after[-1][1]
        forget.append(f)
        retain.append(r)
        out.append(o)
        rows.append(row)
        origins.append(origin)
        positions.append(i)
    batch = module.Batch(device, forget, retain, out, rows, row_count, origins)
    return OnDevice(module, batch, device, positions, before, after, Streams(device))


def count_versions(updates: Iterable[Tensor | None]) -> None:
    """Increments the version counters of the updates, so that autograd notices the writes."""
    written = [t for t in updates if t is not None]
    try:
        torch.autograd.graph.increment_version(written)
    except TypeError:  # early versions of torch take one at a time, with a version
        for t in written:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in copies:
        target.detach().copy_(source.detach())


def _dense(t: Tensor | None, before: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    if t is None:
        return None
    before.append((torch.empty_like(t, memory_format=torch.contiguous_format), t))
    return before[-1][0]


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
