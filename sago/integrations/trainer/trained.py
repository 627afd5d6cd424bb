"""Finds the parameters that require grad but are not in the optimizer.

RMU trains three matrices of a model and leaves all others out of its optimizer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sago.integrations import deepspeed
from sago.integrations.copies import may_hold_copies

Named = Sequence[tuple[str, Tensor]]


def check_trains(optimizer: Any) -> None:
    """Raises if the optimizer has no parameter."""
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError(
            "The optimizer should have at least one parameter. Found none, so that nothing would be trained. "
            "If a regular expression selects the parameters, check that it matches their names."
        )


def outside(
    optimizer: Any, model: torch.nn.Module, named: Named, every: Sequence[Tensor]
) -> list[tuple[str, Tensor]]:
    """The parameters that the optimizer does not train.

    Args:
        optimizer: The trainer's optimizer, or None if the trainer has no optimizer.
        model: The model, or the DeepSpeed engine of the model.
        named: The parameters that require grad.
        every: All parameters of the model, frozen ones included. They are not read from the model, because
            FSDP2 puts unsharded parameters into its modules after a forward.
    """
    if deepspeed.is_engine(model):
        trained = deepspeed.trained(model)
        return [(name, p) for name, p in named if not trained(p)]
    if optimizer is None:
        return []
    check_trains(optimizer)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    if may_hold_copies(tensors, every):
        return []
    held = {id(p) for p in tensors}
    return [(name, p) for name, p in named if id(p) not in held]


class Dropped:
    """Gives the parameters no gradient, until `close` is called or the object is dropped.

    Attributes:
        ids: The ids of the parameters.
        close: Removes the hooks.
    """

    def __init__(self, named: Named, count: int) -> None:
        self.ids = [id(p) for _, p in named]
        hooks = [p.register_post_accumulate_grad_hook(_drop) for _, p in named]
        self.close = weakref.finalize(self, _remove, hooks)
        if named:
            logging.getLogger("sago").warning(
                "sago: %d of the %d parameters that require grad are not in the optimizer. Their gradients "
                "are dropped. The first of them is `%s`.",
                len(named),
                count,
                named[0][0],
            )


def _remove(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _drop(p: Tensor) -> None:
    p.grad = None
