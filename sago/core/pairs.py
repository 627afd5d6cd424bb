"""A checked call: the gradient pairs and the arguments of their synthesis."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sago.backends.sums import Sums
from sago.rules import Rule

Weight = float | Tensor

_ON_EVERY_RANK = ("eps", "stats", "max_norm", "nonfinite", "retain_floor")


class Over(Protocol):
    """Ranks that hold other shards of the same gradients, and that add up their tables of sums."""

    def check_same(self, layout: Sequence[object], device: torch.device) -> None:
        """Raises ValueError on every rank if the layouts of the ranks differ."""

    def start(self, table: Tensor) -> Callable[[], None]:
        """Begins the sum over the ranks, in place. The returned function waits for it."""


class Spread(Protocol):
    """How the gradients of a list are distributed over ranks.

    Attributes:
        counted: For each pair, whether the sums of this rank's shard are counted.
        numel: The number of elements of each whole gradient.
        offsets: For each gradient, the number of elements in front of this rank's shard. None if the shard is
            not contiguous.
        over: The ranks.
        layout: A description of the list that is the same on every rank.
    """

    @property
    def counted(self) -> Sequence[bool]: ...
    @property
    def numel(self) -> Sequence[int]: ...
    @property
    def offsets(self) -> Sequence[int | None]: ...
    @property
    def over(self) -> Over: ...
    @property
    def layout(self) -> Sequence[object]: ...


class Placement(Protocol):
    """The functions on DTensors. `sago.core` receives the module, because it does not import `sago.ranks`."""

    def is_dtensor(self, t: Any, /) -> bool:
        """Whether `t` is a DTensor."""

    def local(self, t: Any, /) -> Any:
        """The shard of a DTensor that this rank holds; any other tensor itself."""

    def check_placed(self, i: int, tensors: Sequence[Any], /) -> None:
        """Raises unless the tensors of pair `i` have the same placements and are reduced."""

    def read(self, gradients: Sequence[Any], rows: Sequence[int], /) -> Spread | None:
        """How the list is distributed over ranks. None if it is not distributed."""


@dataclass
class Pairs:
    """Checked gradient pairs.

    Attributes:
        forget, retain, out: Local tensors. None is a zero gradient, and `out` is None if both gradients are.
        updates: `out` as the caller passed it, before DTensors were replaced by their local shards.
        rows: The report row of each pair.
        keys: The group of each row.
        backends: For each device in the list, the backend that runs there.
        spread: How the gradients are distributed over ranks. None if they are not, or if `reduce_gram` adds
            the sums up.
        before: The number of elements in front of each whole gradient. None if `out` is the whole list.
    """

    forget: list[Tensor | None]
    retain: list[Tensor | None]
    out: list[Tensor | None]
    updates: list[Tensor | None]
    rows: list[int]
    keys: list[Hashable]
    backends: dict[torch.device, str]
    spread: Spread | None = None
    before: Sequence[int] | None = None

    def origins(self) -> list[int] | None:
        """The position of the first element of each pair. None if a shard is not contiguous in its tensor."""
        s = self.spread
        sizes = [0 if o is None else o.numel() for o in self.out] if s is None else s.numel
        before = self.before or [0, *accumulate(sizes)]
        offsets = [0] * len(self.out) if s is None else s.offsets
        known = [b + x for b, x in zip(before, offsets, strict=False) if x is not None]
        return known if len(known) == len(offsets) else None

    def numel(self, everywhere: bool = True) -> list[int]:
        """The number of elements of each row: on all ranks, or only the elements that this rank counts."""
        found = [0] * len(self.keys)
        for i, (row, o) in enumerate(zip(self.rows, self.out, strict=True)):
            if o is not None:
                s = self.spread
                here = o.numel() if s is None or s.counted[i] else 0
                found[row] += s.numel[i] if everywhere and s is not None else here
        return found


class Call(NamedTuple):
    """The checked arguments of a synthesis, without its gradients.

    Attributes:
        gamma, alpha: Floats, or 0-d fp64 tensors on the gradients' device.
        max_norm: The largest norm of the update, to which it is clipped; None for no clipping.
        nonfinite: How NaN and inf in a gradient are treated. None leaves them to the rule, "propagate" makes
            the element of the update NaN, "zero_update" makes the whole update 0.
        scales: Factors that forget and retain are multiplied by before the rule sees them.
        state: The numbers that the rule keeps, fp64 `[rows, n]`. The synthesis replaces them in place.
        draw: The seed and the step of a random gate, int64 `[2]`. None for other rules.
        retain_floor: As in `sago.synthesize_`.
    """

    rule: Rule
    gamma: Weight
    alpha: Weight
    eps: float
    stats: bool
    reduce_gram: Callable[[Tensor], Tensor] | None
    max_norm: float | None = None
    nonfinite: str | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    state: Tensor | None = None
    draw: Tensor | None = None
    retain_floor: float = 0.0

    def described(self) -> dict[str, object]:
        """The values that have to be the same on all ranks of one update, by the words that name them.

        The numbers of a tensor are read back from the device.
        """
        rule = self.rule
        weights = {f"Parameter `{name}`": float(getattr(self, name)) for name in ("gamma", "alpha")}
        others = {f"Parameter `{name}`": getattr(self, name) for name in _ON_EVERY_RANK}
        made = {
            "scope": rule.scope,
            "classes": rule.classes,
            "state": rule.state,
            "seed and step": None if self.draw is None else self.draw.tolist(),
            "coefficients of an example": [float(f"{x:.9g}") for x in rule.sample()],
        }
        return {"Parameter `rule`": rule.name, f"The rule {rule.name!r}": made, **weights, **others}

    @property
    def sums(self) -> Sums:
        """Which sums of the gradients are taken."""
        if self.stats or self.limited or self.rule.by_class:
            if self.rule.gate is not None:
                return Sums.CLASSES
            return Sums.SPLIT if self.rule.gated else Sums.COUNTED
        return Sums.NONE if self.rule.scope == "element" else Sums.PRODUCTS

    @property
    def by_row(self) -> bool:
        """Whether the update of an element depends on sums over its row."""
        return self.rule.scope == "tensor" or self.retain_floor > 0.0

    @property
    def limited(self) -> bool:
        """Whether the size of the update depends on the sums."""
        return self.max_norm is not None or self.nonfinite == "zero_update"
