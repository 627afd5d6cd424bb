"""The formulation of the released SAGO code, rewritten as a peer for benchmarks and for tests of agreement.

It issues, tensor by tensor, the torch operations of `src/trainer/unlearn/grad_surgery.py` in
github.com/sustech-nlp/SAGO, and keeps their numerical traits: products are rounded to the dtype of the
gradients before they are summed, an absolute epsilon is added, and an inner product over all tensors is
accumulated in float32 for every dtype. It leaves out the code around the synthesis (copies of the gradients,
engines, emptying of the cache).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-10
RULES = ("sum", "sago", "sago_prefer_retain", "pcgrad", "pcgrad_global", "blur")


def released(
    forget: Sequence[Tensor], retain: Sequence[Tensor], rule: str, gamma: float = 1.0, alpha: float = 1.0
) -> list[Tensor]:
    """Returns the updates of `rule`, as new tensors, by the operations of the released code.

    It is deliberately not improved. The rules of tensor scope compute a conflict mask for each tensor,
    although only two of them use it. Accesses through a boolean index, and `.item()`, wait for the device.

    Args:
        forget, retain: Tensors, pairwise of one shape and dtype. Neither is modified.

    Raises:
        ValueError: For an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"Parameter `rule` should be one of {', '.join(RULES)}. Found {rule!r}.")
    if rule == "pcgrad_global":
        forget = _project_global(forget, retain, only_conflicts=True)
    elif rule == "blur":
        retain = _project_global(retain, forget, only_conflicts=False)
    else:
        return [_tensorwise(f, r, rule, gamma, alpha) for f, r in zip(forget, retain, strict=True)]
    return [gamma * f + alpha * r for f, r in zip(forget, retain, strict=True)]


def _tensorwise(f: Tensor, r: Tensor, rule: str, gamma: float, alpha: float) -> Tensor:
    conflict = torch.sign(f) * torch.sign(r) < 0
    if rule == "pcgrad":
        return gamma * _project(f, r) + alpha * r
    if rule == "sum":
        return gamma * f + alpha * r
    agree = ~conflict
    out = torch.zeros_like(f)
    out[conflict] = alpha * r[conflict]
    if rule == "sago":
        out[agree] = gamma * f[agree]
    else:
        out[agree] = gamma * f[agree] + alpha * r[agree]
    return out


def _project(f: Tensor, r: Tensor) -> Tensor:
    dot = (f * r).sum()
    if not (dot < 0).item():
        return f
    return f - dot / ((r * r).sum() + EPS) * r


def _project_global(
    moved: Sequence[Tensor], fixed: Sequence[Tensor], only_conflicts: bool
) -> Sequence[Tensor]:
    dot = _dot(moved, fixed)
    if only_conflicts and not (dot < 0).item():
        return moved
    coefficient = dot / (_dot(fixed, fixed) + EPS)
    return [m - coefficient * x for m, x in zip(moved, fixed, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = torch.tensor(0.0, device=left[0].device)
    for x, y in zip(left, right, strict=True):
        total += (x * y).sum()
    return total
