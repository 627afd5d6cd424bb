"""One of the two gradients of a window: its accumulators, and which parameters a backward reached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sago.capture.flat import Flat, clear
from sago.ranks.dtensor import wrap


class Side:
    """The accumulators of the forget or of the retain gradient.

    Attributes:
        name: "forget" or "retain".
        views, owner, buffers: See `sago.capture.flat.Flat`; the views hold the shards of this rank.
        grads: The views in the form of `p.grad`: DTensors if the parameters are DTensors.
        touched: For each parameter, whether a backward of the window reached it.
        captures: The number of captures of the window that had a backward.
        written: Whether the accumulators were written since they were cleared.
        probed: For each parameter, whether its gradient was found to be dense.
        mean: Whether the captures of a window are averaged.
    """

    mean = False

    def __init__(self, name: str, flat: Flat, params: Sequence[Tensor]) -> None:
        self.name = name
        self.views, self.owner, self.buffers = flat
        self.grads = [wrap(view, p) for view, p in zip(self.views, params, strict=True)]
        self.touched = [False] * len(params)
        self.captures = 0
        self.written = False
        self.probed = [False] * len(params)

    @property
    def reached(self) -> list[bool]:
        """For each parameter, whether the accumulators hold a gradient of it."""
        return self.touched

    @property
    def empty(self) -> bool:
        """Whether the window has no gradient of this side."""
        return self.captures == 0 and not any(self.touched)

    def version(self, i: int) -> int:
        """A number that changes when gradient `i` is written."""
        view, grad = self.views[i], self.grads[i]
        # An operation on a DTensor changes only the DTensor's version. FSDP2 writes to its local tensor.
        return view._version if grad is view else view._version + grad._version

    def versions(self) -> list[int]:
        return [self.version(i) for i in range(len(self.views))]

    def present(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """`grads` with None for each parameter that no backward reached."""
        return [g if t else None for g, t in zip(grads, self.reached, strict=True)]

    def weight(self, captures: int) -> float:
        """The number by which the accumulators are divided, after so many captures in the window."""
        return float(captures) if self.mean else 1.0

    def discard(self) -> None:
        """Ends the window. The accumulators are cleared by the next capture."""
        self.touched = [False] * len(self.touched)
        self.captures = 0

    def clear(self) -> None:
        if self.written:
            clear(self.buffers)
        self.written = False

    def drop(self) -> None:
        """Clears accumulators with an incomplete gradient."""
        self.clear()

    def check_replaceable(self, name: str) -> None:
        """Raises if the gradient of parameter `name` may not begin again within a capture."""


class RunningMean(Side):
    """A gradient that is averaged over windows: a past window weighs `decay` for each window since then.

    The accumulators hold the weighted sum. They are multiplied by `decay` where those of a `Side` are
    cleared, and NaN and inf become 0 then. A gradient of the mean is that sum, divided by the sum of the
    weights, as in the bias correction of Adam.

    Attributes:
        decay: Between 0 and 1.
        kept: For each parameter, whether a backward of an earlier window reached it.
        past: The sum of the weights of earlier windows, or of their captures if captures are averaged.
    """

    def __init__(self, name: str, flat: Flat, params: Sequence[Tensor], decay: float) -> None:
        super().__init__(name, flat, params)
        self.decay = decay
        self.kept = [False] * len(params)
        self.past = 0.0

    @property
    def reached(self) -> list[bool]:
        return [t or k for t, k in zip(self.touched, self.kept, strict=True)]

    def weight(self, captures: int) -> float:
        return self.past + (captures if self.mean else min(captures, 1))

    def discard(self) -> None:
        self.past = self.weight(self.captures)
        self.kept = self.reached
        super().discard()

    @torch.no_grad()
    def clear(self) -> None:
        if self.written:
            for buffer in self.buffers:
                buffer.mul_(self.decay).nan_to_num_(0.0, 0.0, 0.0)
            self.past *= self.decay
        self.written = False

    def drop(self) -> None:
        if self.past:
            warnings.warn(
                f"The running mean of the {self.name} gradient begins again, because a gradient of the last "
                "window was not complete.",
                RuntimeWarning,
                stacklevel=4,
            )
        self.past, self.kept = 0.0, [False] * len(self.kept)
        super().clear()

    def check_replaceable(self, name: str) -> None:
        raise ValueError(
            f"zero_grad(set_to_none=True) should not be called within {self.name}(), because it would drop "
            f"the running mean. Found that it dropped `{name}.grad`. Call buckets.zero_() between windows."
        )

    @torch.no_grad()
    def restore(self, shards: Sequence[Tensor | None], past: float) -> None:
        """Replaces the accumulators by those that another object had."""
        clear(self.buffers)
        for view, shard in zip(self.views, shards, strict=True):
            if shard is not None:
                view.copy_(shard)
        self.kept, self.past, self.written = [shard is not None for shard in shards], past, False


class Capture:
    """An open capture.

    Attributes:
        side: The side that its backwards accumulate into.
        versions: The versions of the accumulators when the capture last mounted them.
        mounted: Whether its accumulators were mounted completely.
        reached: Whether a backward directly in this capture reached a parameter.
        nested: Whether a capture inside this one had a backward.
        alone: Whether no other capture may be opened inside this one.
        handles: The hooks to remove when it closes.
    """

    def __init__(self, side: Side, alone: bool) -> None:
        self.side = side
        self.alone = alone
        self.versions = side.versions()
        self.mounted = False
        self.reached = False
        self.nested = False
        self.handles: list[torch.utils.hooks.RemovableHandle | Any] = []
