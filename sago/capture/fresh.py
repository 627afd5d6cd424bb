"""The retain side without accumulators: each gradient is used as soon as a backward has made it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sago.capture.flat import Flat
from sago.capture.side import Side


class FreshGradients(Side):
    """The gradients of one backward, which are synthesized during it and dropped.

    Args:
        like: The other side, whose views have the layout of the gradients.
        params: The parameters.

    Attributes:
        arrived: For each parameter, its gradient on this rank until it is used.
    """

    fresh = True

    def __init__(self, like: Side, params: Sequence[Tensor]) -> None:
        super().__init__("retain", Flat(like.views, list(range(len(params))), []), params)
        self.arrived: list[Tensor | None] = [None] * len(params)

    def add(self, i: int, shard: Tensor) -> None:
        """Keeps a gradient that a backward has made. A second one is added to it."""
        before = self.arrived[i]
        # Autograd may give two parameters gradients that share memory, so the sum is a new tensor.
        self.arrived[i] = shard if before is None else before + shard

    def present(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        return [None] * len(grads)  # `grads` are those of the other side

    def take(self, positions: Sequence[int]) -> list[Tensor | None]:
        """The gradients at these positions, which are not kept any longer."""
        found = [self.arrived[i] for i in positions]
        for i in positions:
            self.arrived[i] = None
        for g in found:
            if g is not None and g.is_cuda:
                g.record_stream(torch.cuda.current_stream(g.device))  # the backward may use several streams
        return found

    def discard(self) -> None:
        super().discard()
        self.arrived = [None] * len(self.arrived)

    def clear(self) -> None:
        self.arrived = [None] * len(self.arrived)
        self.written = False
