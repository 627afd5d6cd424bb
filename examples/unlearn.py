"""Unlearning with `sago.GradientBuckets`: one gradient for each loss, and the update that a rule computes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import sago
from examples.losses import Batch, Losses


def unlearn(
    model: Any,
    losses: Losses,
    batches: Iterable[tuple[Batch, Batch]],
    rule: str | sago.Rule,
    lr: float,
    gamma: float = 1.0,
    alpha: float = 1.0,
    max_norm: float | None = None,
    retain_floor: float = 0.0,
) -> Iterator[dict[str, float]]:
    """Trains the parameters that `losses` names, in place: a step of AdamW for each pair of batches.

    After each step, yields the losses before it, the summary of its synthesis over all parameters, and the
    `seconds` that it took.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval() if losses.compares else None
    params = losses.params(model)
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_()
    buckets = sago.GradientBuckets(params)
    optimizer = torch.optim.AdamW(params, lr=lr)
    try:
        for forget_batch, retain_batch in batches:
            start = time.perf_counter()
            with buckets.forget():
                forget_loss = losses.forget_loss(model, frozen, forget_batch)
                forget_loss.backward()
            with buckets.retain():
                retain_loss = losses.retain_loss(model, frozen, retain_batch)
                retain_loss.backward()
            report = buckets.synthesize_(rule, gamma, alpha, max_norm, retain_floor=retain_floor)
            optimizer.step()
            buckets.zero_()
            yield {
                "forget_loss": forget_loss.item(),
                "retain_loss": retain_loss.item(),
                **report.summary(),
                "seconds": time.perf_counter() - start,
            }
    finally:
        model.requires_grad_()
