"""Twenty steps of GRU and of MUDMAN, with `GradientBuckets` and as their authors publish them, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sago
from tests.support.training import Run, batches, losses_of, whole

STEPS, DECAY, RATE = 20, 0.9, 2e-2


def trained(
    model: nn.Module,
    rule: str,
    share: tuple[int, int] = (0, 1),
    retain_decay: float | None = DECAY,
    **options: Any,
) -> dict[str, Tensor]:
    """The parameters after all steps on the share `(i, n)` of every batch."""
    buckets = sago.GradientBuckets(model, retain_decay=retain_decay, **options)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(STEPS):
        forget, retain = losses_of(model, Run(rule), batches(step, 0, *share))
        with buckets.forget():
            forget().backward()
        with buckets.retain():
            retain().backward()
        buckets.synthesize_(rule)
        optimizer.step()
        buckets.zero_()
    return {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}


def by_hand(model: nn.Module, rule: str) -> dict[str, Tensor]:
    """The update of the published code: a mean that begins with zero, and a new weight of `1 - DECAY`."""
    params = [p for p in model.parameters() if p.requires_grad]
    memory = [torch.zeros_like(p) for p in params]
    for step in range(STEPS):
        forget, retain = (
            torch.autograd.grad(loss(), params) for loss in losses_of(model, Run(rule), batches(step, 0))
        )
        memory = [DECAY * m + (1 - DECAY) * r for m, r in zip(memory, retain, strict=True)]
        with torch.no_grad():
            for p, u in zip(params, UPDATES[rule](forget, memory), strict=True):
                p -= RATE * u
    return {name: p.detach() for name, p in model.named_parameters()}


def gru(forget: Sequence[Tensor], memory: Sequence[Tensor]) -> list[Tensor]:
    """The forget gradient without its part along the memory, if their inner product is negative."""
    f, m = (torch.cat([t.flatten() for t in side]) for side in (forget, memory))
    k = (f @ m) / (m @ m) if f @ m < 0 else 0.0
    return [f - k * m for f, m in zip(forget, memory, strict=True)]


def mudman(forget: Sequence[Tensor], memory: Sequence[Tensor]) -> list[Tensor]:
    """The forget gradient where it has the sign of the memory."""
    return [f * (f.sign() == m.sign()) for f, m in zip(forget, memory, strict=True)]


UPDATES: dict[str, Callable[..., list[Tensor]]] = {"gru": gru, "mudman": mudman}


def assert_as_by_hand(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # A step turns an error of 1e-16 into a few of them, and no element of a mean is that near to 0.
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-11)
