"""Whether tensors have the metadata that they had: torch's own guards, in one call for a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is no part of torch's public interface
    TensorGuards = None  # type: ignore[assignment,misc]


class Guards:
    """Compares types, dtypes, devices, shapes, strides and requires_grad; keeps no tensor alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards: Any = None
        if TensorGuards is not None:
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def hold(self, tensors: Sequence[Any]) -> bool:
        """Whether these are as the given ones were. False if it cannot be told."""
        if self._guards is None or len(tensors) != self._count:
            return False
        return bool(self._guards.check(*tensors))
