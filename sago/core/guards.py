"""Checks with the guards of TorchDynamo, in one call for a list, whether the metadata of tensors changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("sago")


def _tensor_guards() -> Any:
    """The private class TensorGuards of torch. None if it is missing or its check gives other results."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        first, like, others = _probes()
        examples = [first, first]
        guards = TensorGuards(*examples, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        missed = [name for name, other in others.items() if guards.check(first, other)]
        if guards.check(first, like) and not missed:
            return TensorGuards
        reason = f"its check accepts another {', '.join(missed)}" if missed else "its check accepts no tensor"
    except (ImportError, TypeError, AttributeError, RuntimeError) as error:
        reason = repr(error)
    _log.warning(
        "sago: the guards of torch %s cannot be used (%s). Tensors are checked in Python instead, with the "
        "same result.",
        torch.__version__,
        reason,
    )
    return None


def _probes() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A tensor, one with the same metadata, and those that differ from it in one property each.

    The device is that of a meta tensor, because a machine may have no other device than the CPU.
    """
    memory = torch.zeros(2, 2, dtype=torch.complex64, device="cpu")
    first, like = memory.imag, memory.clone().imag
    others = {
        "type": torch.nn.Parameter(like, requires_grad=False),
        "dtype": like.view(torch.int32),
        "device": torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta"),
        "shape": like[:1],
        "number of dimensions": like[0],
        "stride": like.t(),
        "requires_grad": like.detach().requires_grad_(),
        "negative bit": memory.conj().imag,
    }
    return first, like, others


TensorGuards = _tensor_guards()


class Guards:
    """Compares types, dtypes, devices, shapes, strides, requires_grad and negative bits of tensors.

    The tensors are not kept alive.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards: Any = None
        if TensorGuards is not None:
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def hold(self, tensors: Sequence[Any]) -> bool:
        """Whether these tensors have the metadata of the given ones. False without TensorGuards."""
        if self._guards is None or len(tensors) != self._count:
            return False
        return bool(self._guards.check(*tensors))
