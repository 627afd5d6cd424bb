"""The formulation of the released SAGO code, written anew: the peer in benchmarks and in agreement tests.

It issues, tensor by tensor, the torch operations of `src/trainer/unlearn/grad_surgery.py` in
github.com/sustech-nlp/SAGO and keeps their numerical traits: products rounded in the dtype of the gradients
before they are summed, an absolute epsilon, an inner product over all tensors that is accumulated in float32
whatever the dtype of the gradients. What surrounds the synthesis there (copies of the gradients, engines,
cache clearing) is left out.
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
    """The updates of `rule`, as new tensors, by the operations of the released code.

    Per tensor, for `sum`, `sago`, `sago_prefer_retain` and `pcgrad` alike: two sign tensors, their product
    and a comparison make the conflict mask, though only two of the rules use it. Then

    - `sum`: two scalings and an addition;
    - `sago`: an inverted mask, a zero-filled result, and for each branch one read and one write through a
      boolean index (each of which waits for the device, since it has to know how many elements are set);
    - `sago_prefer_retain`: the same, with two reads and an addition in the branch without conflict;
    - `pcgrad`: a product and a sum, the sign of which is read with `.item()` (one wait a tensor); where it
      is negative a second product and sum, 1e-10 added to the squared norm, a scaling and a subtraction;
      then the operations of `sum`.

    Over all tensors, without a mask:

    - `pcgrad_global`: a Python loop of products and sums into a float32 scalar, its sign read with
      `.item()`; where it is negative a second loop for the squared norm of retain, plus 1e-10, and the
      projection of each forget gradient; then the operations of `sum`;
    - `blur`: both loops, 1e-10 added to the squared norm of forget, the projection of each retain gradient
      whatever the sign; then the operations of `sum`.

    It serves as the peer to measure against and as an independent formulation to agree with, so it is
    deliberately not improved. `forget` and `retain` hold tensors pairwise of one shape and dtype; neither is
    modified. Raises `ValueError` for an unknown rule.
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
