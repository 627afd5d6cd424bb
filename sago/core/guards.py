"""Whether tensors have the metadata that they had: the guards of TorchDynamo, in one call for a list."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("sago")


def _tensor_guards() -> Any:
    """The private class TensorGuards of torch, or None where it is not there or does something else."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        examples = [torch.zeros(2, device="cpu"), torch.zeros(3, device="cpu")]
        guards = TensorGuards(*examples, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if guards.check(*examples) and not guards.check(*reversed(examples)):
            return TensorGuards
        reason = "its check gives another result"
    except (ImportError, TypeError, AttributeError, RuntimeError) as error:
        reason = repr(error)
    _log.warning(
        "sago: the guards of torch %s cannot be used (%s). Tensors are checked in Python instead, with the "
        "same result.",
        torch.__version__,
        reason,
    )
    return None


TensorGuards = _tensor_guards()


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
