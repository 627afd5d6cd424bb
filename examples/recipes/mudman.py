"""The step of MUDMAN (arXiv 2506.12484), without its adversary: a masked and normalised forget gradient.

A step of retain comes first, along the running mean of its gradients. The mean also gives the mask: an
element of the forget gradient counts only where it has the sign of the mean. `before` is the published
algorithm by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import sago
from examples.recipes import Batch

MOMENTUM, RETAIN_RATE, FORGET_RATE = 0.9, 0.1, 0.05


@torch.no_grad()
def descend(params: Sequence[Tensor], gradients: Sequence[Tensor | None], rate: float | Tensor) -> None:
    for p, g in zip(params, gradients, strict=True):
        if g is not None:
            p -= rate * g


def before(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]]) -> None:
    params = list(model.parameters())
    means = [torch.zeros_like(p) for p in params]
    for forget_batch, retain_batch in batches:
        retain = torch.autograd.grad(model(**retain_batch).loss, params)
        means = [MOMENTUM * m + (1 - MOMENTUM) * r for m, r in zip(means, retain, strict=True)]
        descend(params, means, RETAIN_RATE)
        forget = torch.autograd.grad(-model(**forget_batch).loss, params)
        norm = torch.cat([f.flatten() for f in forget]).norm()
        masked = [torch.where(f.sign() == m.sign(), f, 0) for f, m in zip(forget, means, strict=True)]
        descend(params, masked, FORGET_RATE / norm)


def after(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]]) -> None:
    params = list(model.parameters())
    buckets = sago.GradientBuckets(params, retain_decay=MOMENTUM)
    for forget_batch, retain_batch in batches:
        with buckets.retain():
            model(**retain_batch).loss.backward()
        descend(params, buckets.retain_grads, RETAIN_RATE * (1 - MOMENTUM))
        with buckets.forget():
            (-model(**forget_batch).loss).backward()
        norm = buckets.synthesize_("mudman").ff.sum().sqrt()
        descend(params, [p.grad for p in params], FORGET_RATE / norm)
        buckets.zero_()
