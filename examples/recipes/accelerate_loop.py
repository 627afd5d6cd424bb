"""A loop of one's own with Hugging Face accelerate: accumulation, mixed precision, DDP, clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

import sago
from examples.recipes import ALPHA, GAMMA, LR, Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def before(accelerator: Accelerator, model: torch.nn.Module, batches: Iterable[tuple[Batch, Batch]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    for forget_batch, retain_batch in batches:
        with accelerator.accumulate(model):
            forget_loss = -model(**forget_batch).loss
            retain_loss = model(**retain_batch).loss
            accelerator.backward(GAMMA * forget_loss + ALPHA * retain_loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def after(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[tuple[Batch, Batch]],
    rule: str = "sago",
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    buckets = sago.GradientBuckets(model)
    for forget_batch, retain_batch in batches:
        with accelerator.accumulate(model):
            forget_loss = -model(**forget_batch).loss
            retain_loss = model(**retain_batch).loss
            with buckets.forget():
                accelerator.backward(forget_loss)
            with buckets.retain():
                accelerator.backward(retain_loss)
            if accelerator.sync_gradients:
                buckets.synthesize_(rule, GAMMA, ALPHA, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
