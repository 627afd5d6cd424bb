"""Plain torch code for the same updates, on lists of tensors; `benchmarks.released` has the paper's code.

Each function takes `(forget, retain, gamma, alpha)` and returns the updates. A function whose name ends in an
underscore writes them into `retain`. The formula compares a product with 0, which may underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def formula(f: Tensor, r: Tensor, gamma: float, alpha: float) -> Tensor:
    return torch.where(f * r < 0, alpha * r, gamma * f)


def sago_(f: Tensor, r: Tensor, gamma: float, alpha: float) -> None:
    r.copy_(formula(f, r, gamma, alpha))


def sum_(f: Tensor, r: Tensor, gamma: float, alpha: float) -> None:
    r.copy_(gamma * f + alpha * r)


def pcgrad_(f: Tensor, r: Tensor, gamma: float, alpha: float) -> None:
    x, y = f.float(), r.float()
    k = torch.clamp((x * y).sum() / (y * y).sum(), max=0.0)
    r.copy_(gamma * (x - k * y) + alpha * y)


FORMULAS = {"sum": sum_, "sago": sago_, "pcgrad": pcgrad_}


def add_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    """`f + r` in place. It reads and writes as many bytes as `sago`."""
    for f, r in zip(forget, retain, strict=True):
        torch.add(f, r, out=r)
    return retain


def foreach_add_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    torch._foreach_add_(retain, forget)
    return retain


def where(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    return [formula(f, r, gamma, alpha) for f, r in zip(forget, retain, strict=True)]


def foreach_sum_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    torch._foreach_mul_(retain, alpha)
    torch._foreach_add_(retain, forget, alpha=gamma)
    return retain


def foreach_sago_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    """torch has no foreach variant of `where`. The mask is a factor: -1 in conflict and 0 elsewhere."""
    mask = torch._foreach_sign(forget)
    torch._foreach_mul_(mask, torch._foreach_sign(retain))
    torch._foreach_clamp_max_(mask, 0.0)
    torch._foreach_mul_(retain, -alpha)
    torch._foreach_mul_(retain, mask)
    torch._foreach_add_(mask, 1.0)
    torch._foreach_mul_(mask, gamma)
    torch._foreach_mul_(mask, forget)
    torch._foreach_add_(retain, mask)
    return retain


def foreach_pcgrad_(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    products = torch._foreach_mul(forget, retain)
    fr = torch.stack([p.sum(dtype=torch.float32) for p in products])
    del products
    rr = torch.stack(torch._foreach_norm(retain, dtype=torch.float32)).square()
    weights = alpha - gamma * torch.clamp(fr / rr, max=0.0)
    torch._foreach_mul_(retain, list(weights.to(retain[0].dtype).unbind()))
    torch._foreach_add_(retain, forget, alpha=gamma)
    return retain


FOREACH = {"sum": foreach_sum_, "sago": foreach_sago_, "pcgrad": foreach_pcgrad_}


def compiled(formula: Callable[..., Any]) -> Callable[..., Tensors]:
    """Compiles `formula(f, r, gamma, alpha)` again, and calls it once for each tensor.

    The tensors are passed as flat views, for which torch.compile generates its fastest code.
    """
    run = torch.compile(_anew(formula))

    def each(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
        found = [run(_flat(f), _flat(r), gamma, alpha) for f, r in zip(forget, retain, strict=True)]
        return retain if found[0] is None else [u.view(r.shape) for u, r in zip(found, retain, strict=True)]

    return each


def compiled_list(formula_: Callable[..., None]) -> Callable[..., Tensors]:
    """Compiles one function again that calls `formula_` on every tensor of a list."""

    def every(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> None:
        for f, r in zip(forget, retain, strict=True):
            formula_(f, r, gamma, alpha)

    run = torch.compile(_anew(every), dynamic=False)

    def whole(forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
        run(forget, retain, gamma, alpha)
        return retain

    return whole


def _flat(t: Tensor) -> Tensor:
    return t.view(-1)


def _anew(function: Any) -> Any:
    # torch.compile limits the number of variants of a code object, so that each use needs its own.
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
