"""Pairs of a forget loss and a retain loss, both as minimised and unweighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from examples.objectives import FORGET, RETAIN, Answers, Objective, answers_of, nll

Batch = Mapping[str, Tensor]


class Losses(Protocol):
    """A pair of losses. `frozen` is the model before unlearning.

    `compares`: whether a loss needs `frozen`, so that a copy of the model has to be kept.
    """

    @property
    def compares(self) -> bool: ...

    def params(self, model: Any) -> list[Tensor]:
        """The parameters that are trained."""

    def forget_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor: ...

    def retain_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor: ...


def answers(model: Any, batch: Batch) -> Answers:
    """The texts of the batch that have labels, as the model gives them."""
    ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
    return answers_of(model(input_ids=ids, attention_mask=mask).logits, labels)


def token_nll(model: Any, batch: Batch) -> Tensor:
    told = answers(model, batch)
    return nll(told, lambda: told)


class OfAnswers(NamedTuple):
    """Two objectives of `examples.objectives`, by name. All parameters are trained."""

    forget: str
    retain: str = "NLL"

    @property
    def compares(self) -> bool:
        return self.forget == "NPO" or self.retain == "KL"

    def params(self, model: Any) -> list[Tensor]:
        return list(model.parameters())

    def forget_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor:
        return self._loss(FORGET[self.forget], model, frozen, batch)

    def retain_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor:
        return self._loss(RETAIN[self.retain], model, frozen, batch)

    @staticmethod
    def _loss(objective: Objective, model: Any, frozen: Any, batch: Batch) -> Tensor:
        def before() -> Answers:
            with torch.no_grad():
                return answers(frozen, batch)

        return objective(answers(model, batch), before)


class RMU:
    """Activations behind a layer: of forget texts to a random vector, of retain texts to what they were.

    arXiv 2403.03218 (WMDP), section 4, where only `down_proj` of this layer and the two below are trained.

    Args:
        layer: The layer, from 0.
        steering: Norm of the vector.
    """

    compares = True

    def __init__(self, layer: int = 7, steering: float = 6.5, seed: int = 0) -> None:
        self.layer, self.steering, self.seed = layer, steering, seed

    def params(self, model: Any) -> list[Tensor]:
        layers = model.model.layers
        if not 0 <= self.layer < len(layers):
            raise ValueError(f"Parameter `layer` should lie below {len(layers)}. Found {self.layer}.")
        return [layer.mlp.down_proj.weight for layer in layers[max(self.layer - 2, 0) : self.layer + 1]]

    def forget_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor:
        found = self._activations(model, batch)
        generator = torch.Generator().manual_seed(self.seed)
        control = torch.rand(found.shape[-1], generator=generator)
        control = (self.steering / control.norm() * control).to(found)
        return mse_loss(found, control.expand_as(found))

    def retain_loss(self, model: Any, frozen: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            kept = self._activations(frozen, batch)
        return mse_loss(self._activations(model, batch), kept)

    def _activations(self, model: Any, batch: Batch) -> Tensor:
        """Behind the layer, `[tokens, hidden]`, without the padding."""
        seen: list[Tensor] = []
        hook = model.model.layers[self.layer].register_forward_hook(
            lambda module, given, made: seen.append(made[0] if isinstance(made, tuple) else made)
        )
        try:
            model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            hook.remove()
        return seen[0][batch["attention_mask"].bool()]
