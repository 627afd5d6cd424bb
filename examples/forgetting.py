"""Unlearning with a pair of losses and any rule.

A pair of losses is a function of the model, the model before unlearning, a forget and a retain batch. It
returns `(forget_loss, retain_loss)`, both as minimised and unweighted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

import sago
from examples.corpus import Batch
from examples.objectives import Answers, Objective, answers_of, grad_diff, nll, npo, simnpo

Losses = Callable[[Any, Any, Batch, Batch], tuple[Tensor, Tensor]]


def answers(model: Any, batch: Batch) -> Answers:
    """Every text of the batch, as an answer to nothing."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return answers_of(logits, batch["labels"])


def token_nll(model: Any, batch: Batch) -> Tensor:
    told = answers(model, batch)
    return nll(told, lambda: told)


class OfTexts(NamedTuple):
    """Two objectives of `examples.objectives` on whole texts.

    `compares`: whether they ask what the model gave before unlearning, so that it has to be kept.
    """

    forget: Objective
    retain: Objective = nll
    compares: bool = True

    def __call__(self, model: Any, frozen: Any, forget: Batch, retain: Batch) -> tuple[Tensor, Tensor]:
        def before(batch: Batch) -> Answers:
            with torch.no_grad():
                return answers(frozen, batch)

        return (
            self.forget(answers(model, forget), lambda: before(forget)),
            self.retain(answers(model, retain), lambda: before(retain)),
        )


class RMU:
    """Activations behind a layer: of forget texts to a random vector, of retain texts to what they were.

    arXiv 2403.03218 (WMDP), section 4, where only `down_proj` of this layer and the two below are trained.

    Args:
        layer: The layer, from 0.
        steering: Norm of the vector.
    """

    def __init__(self, layer: int = 7, steering: float = 6.5, seed: int = 0) -> None:
        self.layer, self.steering, self.seed = layer, steering, seed

    def params(self, model: Any) -> list[Tensor]:
        layers = model.model.layers
        if not 0 <= self.layer < len(layers):
            raise ValueError(f"Parameter `layer` should lie below {len(layers)}. Found {self.layer}.")
        return [layer.mlp.down_proj.weight for layer in layers[max(self.layer - 2, 0) : self.layer + 1]]

    def __call__(self, model: Any, frozen: Any, forget: Batch, retain: Batch) -> tuple[Tensor, Tensor]:
        found = self._activations(model, forget)
        generator = torch.Generator().manual_seed(self.seed)
        control = torch.rand(found.shape[-1], generator=generator)
        control = (self.steering / control.norm() * control).to(found)
        with torch.no_grad():
            kept = self._activations(frozen, retain)
        return mse_loss(found, control.expand_as(found)), mse_loss(self._activations(model, retain), kept)

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


OF_TEXTS = {
    "grad_diff": OfTexts(grad_diff, compares=False),
    "npo": OfTexts(npo),
    "simnpo": OfTexts(simnpo, compares=False),
}


def unlearn(
    model: Any,
    losses: Losses,
    batches: Sequence[tuple[Batch, Batch]],
    rule: str | sago.Rule = "sago",
    gamma: float = 1.0,
    alpha: float = 1.0,
    lr: float = 5e-5,
    max_norm: float | None = None,
) -> dict[str, float]:
    """Trains `model` in place, a step for each pair of batches. Returns the summary of the last report.

    Only `losses.params(model)` are trained, if `losses` has that.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval() if getattr(losses, "compares", True) else None
    params = list(losses.params(model) if hasattr(losses, "params") else model.parameters())
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_()
    buckets = sago.GradientBuckets(params)
    optimizer = torch.optim.AdamW(params, lr=lr)
    report = None
    for forget_batch, retain_batch in tqdm(batches, desc=str(rule), unit="step", file=sys.stderr):
        forget_loss, retain_loss = losses(model, frozen, forget_batch, retain_batch)
        with buckets.forget():
            forget_loss.backward()
        with buckets.retain():
            retain_loss.backward()
        report = buckets.synthesize_(rule, gamma, alpha, max_norm=max_norm)
        optimizer.step()
        buckets.zero_()
    model.requires_grad_()
    return {} if report is None else report.summary()
