"""What people write instead, on lists of tensors; see `benchmarks.released` for the code of the paper.

Each takes `(forget, retain, gamma, alpha)` and returns the updates, which are `retain` where the name says in
place. The formula is the plain one: its product underflows for small gradients, where sago's does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

_compiled = cache(torch.compile)


def formula(f: Tensor, r: Tensor, gamma: float, alpha: float) -> Tensor:
    return torch.where(f * r < 0, alpha * r, gamma * f)


def formula_(f: Tensor, r: Tensor, gamma: float, alpha: float) -> None:
    r.copy_(formula(f, r, gamma, alpha))


def add_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    """`f + r` in place: reads and writes what sago does, and is the yardstick."""
    for f, r in zip(forget, retain, strict=True):
        torch.add(f, r, out=r)
    return retain


def where(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    return [formula(f, r, gamma, alpha) for f, r in zip(forget, retain, strict=True)]


def compiled_where(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    return [_compiled(formula)(f, r, gamma, alpha) for f, r in zip(forget, retain, strict=True)]


def compiled_where_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    """On flat views, where torch.compile makes the fastest code."""
    for f, r in zip(forget, retain, strict=True):
        _compiled(formula_)(f.view(-1), r.view(-1), gamma, alpha)
    return retain
