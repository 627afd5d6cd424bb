"""The step of GRU (arXiv 2503.09117): the forget gradient, without its part that opposes a mean of retain.

`before` is the published algorithm by hand: it flattens both gradients, keeps a running mean of retain
gradients, and projects. The losses are those of gradient difference.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

import sago
from examples.recipes import LR, Batch

MOVING_AVG, WINDOW = 0.8, 2  # the weight of a new retain gradient in the mean; micro-batches in a step


def before(
    model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]], lowest_cosine: float = -1.0
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    params = list(model.parameters())
    mean = forget = retain = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    for step, (forget_batch, retain_batch) in enumerate(batches, 1):
        grads = torch.autograd.grad(-model(**forget_batch).loss / WINDOW, params)
        forget = forget + torch.cat([g.flatten() for g in grads])
        grads = torch.autograd.grad(model(**retain_batch).loss / WINDOW, params)
        retain = retain + torch.cat([g.flatten() for g in grads])
        if step % WINDOW == 0:
            mean = MOVING_AVG * retain + (1 - MOVING_AVG) * mean
            cosine = (forget @ mean) / (forget.norm() * mean.norm())
            if cosine < 0:
                length = cosine.clamp(min=lowest_cosine) * forget.norm()
                forget = forget - length / mean.norm() * mean
            for p, update in zip(params, forget.split([p.numel() for p in params]), strict=True):
                p.grad = update.view_as(p)
            optimizer.step()
            forget, retain = torch.zeros_like(mean), torch.zeros_like(mean)


def after(
    model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]], lowest_cosine: float = -1.0
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    rule = sago.rules.gru(lowest_cosine)
    buckets = sago.GradientBuckets(model, retain_decay=1 - MOVING_AVG)
    for step, (forget_batch, retain_batch) in enumerate(batches, 1):
        with buckets.forget():
            (-model(**forget_batch).loss / WINDOW).backward()
        with buckets.retain():
            (model(**retain_batch).loss / WINDOW).backward()
        if step % WINDOW == 0:
            buckets.synthesize_(rule)
            optimizer.step()
            buckets.zero_()
