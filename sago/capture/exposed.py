"""The tensors that a training loop gets as `p.grad`, over memory that the buckets keep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sago.core.guards import Guards
from sago.ranks.dtensor import is_dtensor, wrap


class Exposed:
    """Aliases of views. Other code may move an alias to other memory, for example by `p.grad.data = x`.

    Without `renew`, a moved alias would stay in use: later gradients would be added to other memory than that
    which the synthesis reads.

    Args:
        views: Tensors that only the buckets hold.
        params: The parameters. The alias of a DTensor is a DTensor, which cannot be moved in this way.

    Attributes:
        grads: The aliases. Each shares the version counter of its view.
    """

    def __init__(self, views: Sequence[Tensor], params: Sequence[Any]) -> None:
        self._views, self._params = views, params
        self.grads = [self._alias(i) for i in range(len(views))]
        plain = [i for i, p in enumerate(params) if not is_dtensor(p)]
        self._index = {i: k for k, i in enumerate(plain)}
        self._addresses = [views[i].data_ptr() for i in plain]
        self._plain = [self.grads[i] for i in plain]
        self._guards = Guards(self._plain)

    def moved(self) -> list[int]:
        """The positions of the aliases that were moved, resized, cast or transposed."""
        plain = self._plain
        if list(map(Tensor.data_ptr, plain)) == self._addresses and self._guards.hold(plain):
            return []
        for i, k in self._index.items():
            if self._views[i].data_ptr() != self._addresses[k]:
                raise ValueError(
                    "The accumulators should keep their memory. Found that the storage of a gradient was "
                    "resized or moved. Make new GradientBuckets, and clear gradients with zero_."
                )
        return [i for i in self._index if _metadata(self.grads[i]) != _metadata(self._views[i])]

    def is_moved(self, i: int) -> bool:
        """Whether the alias at this position was moved, resized or transposed. A cast moves it."""
        if i not in self._index:
            return False
        grad, view = self.grads[i], self._views[i]
        moved = grad.data_ptr() != self._addresses[self._index[i]]
        return moved or grad.stride() != view.stride() or grad.shape != view.shape

    def renew(self, positions: Collection[int] | None = None) -> None:
        """Replaces the aliases at these positions, or those that were moved, by aliases of the views."""
        for i in self.moved() if positions is None else positions:
            self.grads[i] = self._alias(i)
            self._plain[self._index[i]] = self.grads[i]

    def _alias(self, i: int) -> Any:
        view, p = self._views[i], self._params[i]
        with torch.inference_mode(False):  # tensors of inference mode have no versions
            return wrap(view, p) if is_dtensor(p) else view.detach()


def _metadata(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, t.requires_grad
