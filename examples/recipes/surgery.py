"""Hand-written gradient surgery: gradients are cloned, combined in a loop over parameters, written back.

The shape of the code released with the paper (github.com/sustech-nlp/SAGO, `GradSurgeryMixin`), and of most
code that does this by hand. Only the combination is replaced here; `sago.GradientBuckets` would replace the
clones too, as in the other recipes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

import sago
from examples.recipes import ALPHA, GAMMA, LR, Batch


def before(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    params = [p for p in model.parameters() if p.requires_grad]
    for forget_batch, retain_batch in batches:
        (-model(**forget_batch).loss).backward()
        forget_grads = [p.grad.clone() for p in params]
        optimizer.zero_grad()
        model(**retain_batch).loss.backward()
        retain_grads = [p.grad.clone() for p in params]
        combined = []
        for f, r in zip(forget_grads, retain_grads, strict=True):
            conflicts = torch.sign(f) * torch.sign(r) < 0
            result = torch.zeros_like(f)
            result[conflicts] = ALPHA * r[conflicts]
            result[~conflicts] = GAMMA * f[~conflicts]
            combined.append(result)
        for p, gradient in zip(params, combined, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def after(model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]], rule: str = "sago") -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    params = [p for p in model.parameters() if p.requires_grad]
    for forget_batch, retain_batch in batches:
        (-model(**forget_batch).loss).backward()
        forget_grads = [p.grad.clone() for p in params]
        optimizer.zero_grad()
        model(**retain_batch).loss.backward()
        retain_grads = [p.grad.clone() for p in params]
        sago.synthesize_(forget_grads, retain_grads, rule, GAMMA, ALPHA)
        for p, gradient in zip(params, retain_grads, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
