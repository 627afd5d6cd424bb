"""The step of BLUR (arXiv 2506.08164): one gradient, and the other without its part along the first.

`before` is the published algorithm by hand. With `forget_lower`, the retain gradient is made orthogonal to
the forget gradient. Otherwise, the forget gradient is made orthogonal to the retain gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

import sago
from examples.recipes import ALPHA, LR, Batch


def before(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]], forget_lower: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    params = list(model.parameters())
    for forget_batch, retain_batch in batches:
        forget = torch.autograd.grad(-model(**forget_batch).loss, params)
        retain = torch.autograd.grad(model(**retain_batch).loss, params)
        lower = forget if forget_lower else retain
        inner = sum((f * r).sum() for f, r in zip(forget, retain, strict=True))
        k = inner / sum(g.square().sum() for g in lower)
        for p, f, r in zip(params, forget, retain, strict=True):
            p.grad = f + ALPHA * (r - k * f) if forget_lower else f - k * r + ALPHA * r
        optimizer.step()


def after(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]], forget_lower: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    buckets = sago.GradientBuckets(model)
    for forget_batch, retain_batch in batches:
        with buckets.forget():
            (-model(**forget_batch).loss).backward()
        with buckets.retain():
            model(**retain_batch).loss.backward()
        buckets.synthesize_("blur" if forget_lower else "blur_forget_upper", alpha=ALPHA)
        optimizer.step()
        buckets.zero_()
