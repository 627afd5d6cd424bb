"""One of the two gradients of a window: its accumulators, and which parameters a backward reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sago.capture.exposed import Exposed
from sago.capture.flat import Flat, clear
from sago.ranks.dtensor import is_dtensor


class Side:
    """The accumulators of the forget or of the retain gradient.

    Attributes:
        name: "forget" or "retain".
        views, owner, buffers: See `sago.capture.flat.Flat`; the views hold the shards of this rank.
        exposed: The aliases of the views that become `p.grad`: DTensors if the parameters are DTensors.
        touched: For each parameter, whether a backward of the window reached it.
        captures: The number of captures of the window that had a backward.
        written: Whether a window wrote to the accumulators since they were cleared.
        probed: For each parameter, whether its gradient was found to be dense.
        mean: Whether the captures of a window are averaged.
        keeps: Whether the accumulators hold gradients of earlier windows.
        fresh: Whether there are no accumulators; see `sago.capture.fresh`.
    """

    mean = False
    keeps = False
    fresh = False

    def __init__(self, name: str, flat: Flat, params: Sequence[Tensor]) -> None:
        self.name = name
        self.views, self.owner, self.buffers = flat
        self.exposed = Exposed(self.views, params)
        self._placed = [is_dtensor(p) for p in params]
        self.touched = [False] * len(params)
        self.captures = 0
        self.written = False
        self.probed = [False] * len(params)
        self._cleared = self.versions()

    @property
    def grads(self) -> list[Any]:
        """The gradients in the form of `p.grad`."""
        return self.exposed.grads

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
        view = self.views[i]
        # An operation on a DTensor changes only the DTensor's version. FSDP2 writes to its local tensor.
        return view._version + self.grads[i]._version if self._placed[i] else view._version

    def versions(self) -> list[int]:
        if any(self._placed):
            return [self.version(i) for i in range(len(self.views))]
        return [view._version for view in self.views]

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
        # Other code may have kept a gradient of an earlier window, and may have written to it since.
        if self.written or self.versions() != self._cleared:
            clear(self.buffers)
            self._cleared = self.versions()
        self.written = False

    def drop(self) -> None:
        """Clears accumulators with an incomplete gradient."""
        self.clear()

    def warn_unused(self) -> None:
        """Warns if `clear` has kept the gradient of a window that was not synthesized."""


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
        self.versions: list[int] = []
        self.mounted = False
        self.reached = False
        self.nested = False
        self.handles: list[torch.utils.hooks.RemovableHandle | Any] = []
