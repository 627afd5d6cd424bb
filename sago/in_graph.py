"""The operator `sago::synthesize`, which stands for a synthesis in a graph of torch.compile.

The operator runs the eager synthesis on the tensors of the graph, so that the update has the same bits. It
returns new tensors, and the graph copies them into the outputs. It does not write into its arguments, because
torch.compile may replace an argument by another tensor with the same values. Therefore, a synthesis in a
graph needs memory for one more copy of the update. A graph does not check whether outputs overlap.

Eager code does not use the operator. The dispatcher alone would take longer than an eager call takes on the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.core.checks import DTYPES, NEW, Gradients, as_list, check_groups, check_outputs, check_pair
from sago.core.pairs import Placement, Weight
from sago.core.report import SynthesisReport, columns_of
from sago.core.statistics import computed
from sago.rules import Rule
from sago.rules.rule import with_id

Tensors = Sequence[Tensor | None]


class _Arguments(NamedTuple):
    """The arguments of the operator, in the order of `_SCHEMA`.

    Attributes:
        dtypes: The positions in `DTYPES` of the outputs' dtypes. -1 for a pair without gradients.
        rule: The `id` of the rule, because an operator does not take other objects.
        weights: gamma and alpha as numbers. They are not used where `on_device` has a tensor.
    """

    forget: Tensors
    retain: Tensors
    dtypes: Sequence[int]
    rule: int
    weights: Sequence[float]
    on_device: Tensors
    groups: Sequence[int] | None
    eps: float
    stats: bool
    backend: str | None
    retain_floor: float


_SCHEMA = (
    "(Tensor?[] forget, Tensor?[] retain, int[] dtypes, int rule, float[] weights, Tensor?[] on_device, "
    "int[]? groups, float eps, bool stats, str? backend, float retain_floor) -> Tensor[]"
)


class InGraph:
    """A synthesis that torch.compile traces.

    Args:
        eager: `sago.synthesize_`, which the operator runs.
        placement: The functions on DTensors.
    """

    def __init__(self, eager: Callable[..., SynthesisReport], placement: Placement) -> None:
        self._eager, self._placement = eager, placement
        self._operator = torch.library.custom_op(
            "sago::synthesize", self._run, mutates_args=(), schema=_SCHEMA
        )
        self._operator.register_fake(self._fake)

    def __call__(
        self,
        forget: Gradients,
        retain: Gradients,
        rule: Rule,
        gamma: Weight,
        alpha: Weight,
        out: Any,
        groups: Sequence[Hashable] | None,
        eps: float,
        stats: bool,
        reduce_gram: Any,
        backend: str | None,
        retain_floor: float,
    ) -> tuple[list[Tensor | None], SynthesisReport]:
        """The outputs and the report. Takes the arguments of `sago.synthesize_`. `out` may be `NEW`."""
        sides = [_detached(as_list("forget", forget)), _detached(as_list("retain", retain))]
        if reduce_gram is not None or any(self._placement.is_dtensor(t) for side in sides for t in side):
            raise ValueError(
                "Gradients should not be distributed over ranks in code that torch.compile traces. Found "
                "DTensors or `reduce_gram`. Call sago.synthesize_ outside of the compiled function."
            )
        rows, keys = check_groups(groups, len(sides[0]), rule)
        if out is NEW:
            outputs = [f if r is None else r for f, r in zip(*sides, strict=True)]
        else:
            outputs = _detached(check_outputs(out, *sides))
        for i, tensors in enumerate(zip(*sides, outputs, strict=True)):
            check_pair(i, *tensors)
        weights = [gamma, alpha]
        *updates, table = self._operator(
            *sides,
            [-1 if o is None else DTYPES.index(o.dtype) for o in outputs],
            id(rule),
            [0.0 if isinstance(w, Tensor) else float(w) for w in weights],
            [w.detach() if isinstance(w, Tensor) else None for w in weights],
            None if groups is None else rows,
            eps,
            stats,
            backend,
            retain_floor,
        )
        numel = [0] * len(keys)
        written = [i for i, o in enumerate(outputs) if o is not None]
        for i, update in zip(written, updates, strict=True):
            numel[rows[i]] += update.numel()
            if out is NEW:
                outputs[i] = update
            else:
                outputs[i].copy_(update)
        columns = dict(zip(computed(rule, stats), table.unbind(0), strict=True))
        return outputs, SynthesisReport(rule.name, keys, numel, lambda: columns)

    def _run(self, *arguments: Any) -> list[Tensor]:
        """The updates of pairs with a gradient, and the columns of the report, fp64 `[columns, groups]`."""
        call = _Arguments(*arguments)
        rule, out = with_id(call.rule), _new(call)
        gamma, alpha = (w if t is None else t for w, t in zip(call.weights, call.on_device, strict=True))
        # TorchDynamo would otherwise trace the functions that the operator calls.
        eager = torch.compiler.disable(self._eager)
        report = eager(
            call.forget,
            call.retain,
            rule,
            gamma,
            alpha,
            out=out,
            groups=call.groups,
            eps=call.eps,
            stats=call.stats,
            backend=call.backend,
            retain_floor=call.retain_floor,
        )
        updates = [o for o in out if o is not None]
        found = columns_of(report)
        columns = [found[name] for name in computed(rule, call.stats)]
        return [*updates, torch.stack(columns) if columns else _table(updates, 0, len(report.groups))]

    @staticmethod
    def _fake(*arguments: Any) -> list[Tensor]:
        """Tensors of the shapes that `_run` returns."""
        call = _Arguments(*arguments)
        rule = with_id(call.rule)
        updates = [o for o in _new(call) if o is not None]
        _, keys = check_groups(call.groups, len(call.forget), rule)
        return [*updates, _table(updates, len(computed(rule, call.stats)), len(keys))]


def _detached(tensors: list[Any]) -> list[Any]:
    return [t.detach() if isinstance(t, Tensor) else t for t in tensors]


def _new(call: _Arguments) -> list[Tensor | None]:
    like = (f if r is None else r for f, r in zip(call.forget, call.retain, strict=True))
    return [
        None if t is None else torch.empty_like(t, dtype=DTYPES[d])
        for t, d in zip(like, call.dtypes, strict=True)
    ]


def _table(updates: Sequence[Tensor], columns: int, rows: int) -> Tensor:
    device = updates[0].device if updates else "cpu"
    return torch.empty(columns, rows, dtype=torch.float64, device=device)
