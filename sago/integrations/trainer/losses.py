"""Replacements for the `compute_loss` of a trainer during a training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sago.integrations.trainer.weights import Weight, weights_of


def weighed(
    trainer: Any,
    weights: dict[str, Weight],
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:
    """The loss of a trainer with `compute_losses`, which may also set the weights."""
    forget, retain = trainer.compute_losses(model, inputs)
    weights.update(weights_of(trainer, default=1.0))
    return weights["gamma"] * forget + weights["alpha"] * retain


def without_count(compute_loss: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """The `compute_loss` of a trainer from before transformers 4.46, in a form that later ones can call.

    Later versions pass `num_items_in_batch`, which is dropped. None if the function has this parameter.
    """
    parameters = inspect.signature(compute_loss).parameters
    if "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None

    def called(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        return compute_loss(*args, **kwargs)

    return called


class LossesApart:
    """The losses of a trainer with `compute_forget_loss` and `compute_retain_loss`, for one micro-batch.

    The trainer's own step computes the forget loss only. A 0 stands for the retain loss, so that the
    trainer's backward leaves its scale at the product with `alpha`.

    Attributes:
        weighed: The retain loss times its weight, once it is computed.
    """

    def __init__(self, trainer: Any, weights: dict[str, Weight]) -> None:
        self._trainer, self._weights = trainer, weights
        self._arguments: dict[str, Any] = {}  # of `compute_retain_loss`
        self._shape = torch.Size()
        self.weighed: Tensor | float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not isinstance(inputs, Mapping) or not {"forget", "retain"} <= inputs.keys():
            found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                'A batch should be a mapping with the keys "forget" and "retain", which are the inputs of '
                f"compute_forget_loss and compute_retain_loss. Found {found}. For other batches, define "
                "`compute_losses(model, inputs)`."
            )
        loss = self._trainer.compute_forget_loss(model=model, forget_inputs=inputs["forget"])
        _check_loss("compute_forget_loss", loss)
        self._weights.update(weights_of(self._trainer, default=1.0))
        self._arguments = {"model": model, "retain_inputs": inputs["retain"]}
        # The stand-in is at least fp32, because the retain loss may be wider than the forget loss.
        wide = torch.promote_types(loss.dtype, torch.float32)
        self._shape = loss.shape
        stand_in = torch.zeros_like(loss, dtype=wide, requires_grad=True)
        return self._weights["gamma"] * loss + self._weights["alpha"] * stand_in

    def retain_loss(self) -> Tensor:
        arguments, self._arguments = self._arguments, {}
        with self._trainer.compute_loss_context_manager():
            loss = self._trainer.compute_retain_loss(**arguments)
        _check_loss("compute_retain_loss", loss)
        for name, weight in weights_of(self._trainer, default=1.0).items():
            if weight != self._weights[name]:
                raise ValueError(
                    f"`self.{name}` should not change in compute_retain_loss, because the trainer has used "
                    f"it by then. Found {float(weight)} after {float(self._weights[name])}. Set it in "
                    "compute_forget_loss, or define `compute_losses(model, inputs)`."
                )
        if loss.shape != self._shape:
            raise ValueError(
                f"compute_retain_loss should return a loss of the shape {tuple(self._shape)}, as "
                f"compute_forget_loss does. Found {tuple(loss.shape)}. Return the mean over the batch in "
                "both."
            )
        self.weighed = float(self._weights["alpha"]) * loss.detach().mean()
        return loss


def _check_loss(method: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        found = "one without a gradient" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"{method} should return a tensor that depends on the parameters, the loss as minimised. Found "
            f"{found}. Return the loss alone, without outputs and without its weight."
        )
