"""The way of a synthesis: gram, coefficients, combine, report."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.arguments import Call, Pairs, Weight
from sago.cache import is_capturing
from sago.overlap import is_dense
from sago.report import SynthesisReport
from sago.rules import Coefficients, Rule, evaluate
from sago.upload import upload

# The modules behind the names of backends. Each has `Batch(device, forget, retain, out, rows, row_count)`,
# `gram(batch, sums)` and `combine(batch, rule, gamma, alpha, eps, gram, sums, coefficients, propagate)`.
MODULES = {"triton": "sago.kernels", "compiled": "sago.compiled", "reference": "sago.eager"}


class Part(NamedTuple):
    """The pairs on one device, and the module whose `gram` and `combine` run there.

    Tensors that are not dense in memory are worked on in copies: `before` and `after` have what is copied,
    where to and from where, ahead of the synthesis and behind it.
    """

    module: ModuleType
    batch: Any
    device: torch.device
    before: list[tuple[Tensor, Tensor]]
    after: list[tuple[Tensor, Tensor]]


def _nothing() -> None:
    pass


class Sums(NamedTuple):
    """Sums over the gradients, fp64 `[rows, columns]`, and the elements of each row.

    What other ranks have is in the table once `wait` was called.
    """

    table: Tensor
    elements: Tensor | Sequence[int]
    wait: Callable[[], object] = _nothing


class Pipeline:
    """Gradient pairs, laid out on their devices, to be synthesized as often as their memory is filled anew.

    `numel` has the elements of each row, which may be fewer than the pairs have: buffers have gaps of zeros.

    Attributes:
        writing: Whether an update has begun and not ended.
    """

    def __init__(self, pairs: Pairs, numel: list[int], own: list[int] | None = None) -> None:
        self.keys: list[Hashable] = pairs.keys
        self.numel, self._own = numel, own or numel
        self.writing = False
        self._elements: Tensor | None = None
        self._shards = pairs.shards
        rows, report_rows = pairs.rows, list(range(len(self.keys)))
        if self._shards is not None:
            rows = _apart(rows, self._shards.counted, report_rows)
        self.parts = [
            _part(pairs, rows, len(report_rows), device, backend)
            for device, backend in pairs.backends.items()
        ]
        self._index: Tensor | None = None
        if len(report_rows) > len(self.keys):
            self._index = upload(report_rows, torch.int64, self.parts[0].device)

    def release(self) -> bool:
        """Leaves it to the caller to keep the pairs alive. False where not only addresses are needed."""
        for part in self.parts:
            if part.module.__name__ != MODULES["triton"] or part.before or part.after:
                return False
            part.batch.release()
        return True

    def synthesize(self, call: Call) -> SynthesisReport:
        """Writes the update of every pair, and reports on it."""
        return report(call, self.keys, self.numel, self.update(call))

    def update(self, call: Call) -> Sums | None:
        """Writes the update of every pair; returns the sums, if any were taken."""
        rule, columns = call.rule, call.sums
        self.writing = False
        for part in self.parts:
            if part.before:
                _copy(part.before)
        # Sums that decide on the update come ahead of it, and so do sums for `reduce_gram`: it may raise.
        # Those of shards are begun behind it, for the report alone.
        ahead = columns > 0 and (rule.scope != "element" or call.limited or call.reduce_gram is not None)
        sums = gram = coefficients = None
        if columns and self._shards is not None:
            self._shards.over.check_same(self._shards.layout, self.parts[0].device)
        if ahead:
            sums = self._reduced([part.module.gram(part.batch, columns) for part in self.parts], call)
            sums.wait()
            sums = sums._replace(wait=_nothing)
            gram = _gram(rule, sums.table)
        if call.limited or call.scales != (1.0, 1.0):
            coefficients = _limited(call, sums, gram, self.parts[0].device)
            coefficients = coefficients._replace(values=self._all_rows(coefficients.values))
        if gram is not None:
            gram = self._all_rows(gram)
        taken = []
        self.writing = True
        for part in self.parts:
            taken.append(
                part.module.combine(
                    part.batch,
                    rule,
                    _to(call.gamma, part.device),
                    _to(call.alpha, part.device),
                    call.eps,
                    _to(gram, part.device),
                    0 if ahead else columns,
                    coefficients and coefficients._replace(values=_to(coefficients.values, part.device)),
                    call.nonfinite == "propagate",
                )
            )
            if part.after:
                _copy(part.after)
        if columns and not ahead:
            sums = self._reduced(taken, call)  # may fail, too, and the update is written
        self.writing = False
        return sums

    def _reduced(self, tables: Sequence[Tensor], call: Call) -> Sums:
        """The tables of all devices and of all ranks added up."""
        table = tables[0]
        for other in tables[1:]:
            table = table + other.to(table.device)
        table = table[: len(self.keys)]
        if call.scales != (1.0, 1.0):
            f, r = call.scales
            factors = [f * f, f * r, r * r, 1.0, 1.0, 1.0, f * f, f * r, r * r]
            columns = [column * x for column, x in zip(table.unbind(1), factors, strict=False)]
            table = torch.stack(columns, dim=1)
        if call.reduce_gram is not None:
            counts = self._elements
            if counts is None:
                counts = upload(self._own, table.dtype, table.device)
                if not is_capturing([table.device]):  # what a graph copies is not there before its replay
                    self._elements = counts
            table = call.reduce_gram(torch.cat([table, counts[:, None]], dim=1))
            return Sums(table[:, :-1], table[:, -1])
        if self._shards is not None:
            return Sums(table, self.numel, self._shards.over.start(table))
        return Sums(table, self.numel)

    def _all_rows(self, values: Tensor) -> Tensor:
        """Values of the report's rows for the rows of the batches; one row may stand for all."""
        return values if self._index is None or len(values) < len(self.keys) else values[self._index]


def _apart(rows: Sequence[int], counted: Sequence[bool], known: list[int]) -> list[int]:
    """Rows in which what another rank counts is apart; `known` has the report's row of each, and grows."""
    spare: dict[int, int] = {}
    found = list(rows)
    for i, row in enumerate(rows):
        if not counted[i]:
            if row not in spare:
                spare[row] = len(known)
                known.append(row)
            found[i] = spare[row]
    return found


def _part(pairs: Pairs, row_of: Sequence[int], row_count: int, device: torch.device, backend: str) -> Part:
    module = import_module(MODULES[backend])
    forget, retain, out, rows = [], [], [], []
    before: list[tuple[Tensor, Tensor]] = []
    after: list[tuple[Tensor, Tensor]] = []
    for f, r, o, row in zip(pairs.forget, pairs.retain, pairs.out, row_of, strict=True):
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
    batch = module.Batch(device, forget, retain, out, rows, row_count)
    return Part(module, batch, device, before, after)


def count_versions(updates: Iterable[Tensor | None]) -> None:
    """Lets autograd know that they were written."""
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


def _gram(rule: Rule, table: Tensor) -> Tensor | None:
    """`ff, fr, rr` as the rule is given them, fp64 `[rows, >= 3]`; None if it uses none."""
    if rule.scope == "element":
        return None
    gram = table[:, 0:3] + table[:, 6:9] if table.shape[1] == 9 else table
    if rule.scope == "global" and len(gram) > 1:
        gram = gram.sum(0, keepdim=True).expand(len(gram), -1)
    return gram


def _limited(call: Call, sums: Sums | None, gram: Tensor | None, device: torch.device) -> Coefficients:
    """The rule's coefficients for the gradients before they are scaled, within what `call` allows.

    Clipping is that of `torch.nn.utils.clip_grad_norm_`, except that a norm that is not finite makes NaN.
    """
    values, terms = evaluate(call.rule, gram, call.gamma, call.alpha, call.eps, device)
    finite = values.isfinite().all()
    if sums is not None and call.max_norm is not None:
        norm = _products_of_update(values, sums.table, call.nonfinite)[0].sum().sqrt()
        clip = (call.max_norm / (norm + 1e-6)).clamp(max=1.0)
        # The 0 of a norm of inf would hide it: a coefficient of 0 leaves its gradient out.
        values = values * torch.where(norm.isfinite(), clip, torch.nan)
        finite = finite & norm.isfinite()
    if sums is not None and call.nonfinite == "zero_update":
        values = torch.where(finite & (sums.table[:, 4:6].sum() == 0), values, 0.0)
    forget, retain = call.scales
    values = torch.stack([values[:, 0::2] * forget, values[:, 1::2] * retain], dim=2).flatten(1)
    # A clip of NaN reaches coefficients that the rule has as literal zeros.
    kept = "zero" if call.max_norm is None else None
    return Coefficients(values, tuple(term if term == kept else "any" for term in terms))


def report(call: Call, keys: Sequence[Hashable], numel: Sequence[int], sums: Sums | None) -> SynthesisReport:
    """What `sums` say, and of the update what follows from them."""
    if sums is None:
        return SynthesisReport(call.rule.name, keys, numel, dict)
    # A weight on the device may have another value by the time the report is read.
    gamma, alpha = (w.clone() if isinstance(w, Tensor) else w for w in (call.gamma, call.alpha))

    def columns() -> dict[str, Tensor]:
        sums.wait()
        return _columns(call.rule, sums.table, gamma, alpha, call.eps, call.nonfinite)

    return SynthesisReport(call.rule.name, keys, sums.elements, columns)


def _columns(
    rule: Rule, table: Tensor, gamma: Weight, alpha: Weight, eps: float, nonfinite: str | None
) -> dict[str, Tensor]:
    """The report's sums from the table; those of the update follow from the coefficients."""
    width = table.shape[1]
    sums = table[:, 0:3] + table[:, 6:9] if width == 9 else table[:, 0:3]
    columns = dict(zip(("ff", "fr", "rr"), sums.unbind(1), strict=True))
    if width >= 6:
        names = ("conflicts", "nonfinite_forget", "nonfinite_retain")
        columns.update(zip(names, table[:, 3:6].unbind(1), strict=True))
    if not rule.gated or width == 9:
        values, _ = evaluate(rule, _gram(rule, table), gamma, alpha, eps, table.device)
        columns.update(zip(("uu", "uf", "ur"), _products_of_update(values, table, nonfinite), strict=True))
    return columns


def _products_of_update(values: Tensor, table: Tensor, nonfinite: str | None) -> list[Tensor]:
    """`<u,u>, <u,f>, <u,r>` of every row, from the coefficients and the sums on both sides of the gate."""
    a, b = values[:, -2:].unbind(1)
    found = _products(a, b, table[:, 0:3])
    if table.shape[1] == 9:
        a_c, b_c = values[:, :2].unbind(1)
        found = [x + y for x, y in zip(found, _products(a_c, b_c, table[:, 6:9]), strict=True)]
    found[0] = found[0].clamp(min=0.0)  # what cancels leaves an error of either sign
    if nonfinite == "propagate":
        # Also what the rule leaves out. Without counts the squares show it.
        finite = (table[:, 0] + table[:, 2]).isfinite() if table.shape[1] == 3 else table[:, 4:6].sum(1) == 0
        found = [torch.where(finite, x, torch.nan) for x in found]
    return found


def _products(a: Tensor, b: Tensor, gram: Tensor) -> list[Tensor]:
    """`<u,u>, <u,f>, <u,r>` of `u = a*f + b*r`, a gradient whose coefficient is 0 left out."""
    ff, fr, rr = gram.unbind(1)

    def times(coefficient: Tensor, product: Tensor) -> Tensor:
        return torch.where(coefficient == 0, 0.0, coefficient * product)

    uu = times(a * a, ff) + times(2 * a * b, fr) + times(b * b, rr)
    return [uu, times(a, ff) + times(b, fr), times(a, fr) + times(b, rr)]
