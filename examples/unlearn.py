"""Unlearning with `sago.GradientBuckets`: a gradient of each loss, and what a rule makes of the two."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from transformers import LlamaForCausalLM

import sago
from examples.learn import Batch, Examples, logits_of
from examples.objectives import Answers, Objective, answers_of
from examples.people import Collator


def answers(model: LlamaForCausalLM, batch: Batch) -> Answers:
    return answers_of(logits_of(model, batch), batch["labels"])


@torch.no_grad()
def answers_before(frozen: LlamaForCausalLM, batch: Batch) -> Answers:
    return answers(frozen, batch)


def unlearn(
    model: LlamaForCausalLM,
    batches: Iterable[tuple[Batch, Batch]],
    forget: Objective,
    retain: Objective,
    rule: str,
    lr: float,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Iterator[dict[str, float]]:
    """A step of AdamW for each pair of a forget and a retain batch, in place. After each step, yields the
    losses before it, and the cosines and the share of conflicts of its gradients over the whole model."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    buckets = sago.GradientBuckets(model)
    for forget_batch, retain_batch in batches:
        with buckets.forget():
            forget_loss = forget(
                answers(model, forget_batch), lambda batch=forget_batch: answers_before(frozen, batch)
            )
            forget_loss.backward()
        with buckets.retain():
            retain_loss = retain(
                answers(model, retain_batch), lambda batch=retain_batch: answers_before(frozen, batch)
            )
            retain_loss.backward()
        report = buckets.synthesize_(rule, gamma, alpha).summary()
        optimizer.step()
        buckets.zero_()
        yield {
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "cos_forget_retain": report["cos_forget_retain"],
            "cos_update_retain": report["cos_update_retain"],
            "cos_update_forget": report["cos_update_forget"],
            "conflict_fraction": report["conflict_fraction"],
        }


def batches_of(
    examples: Examples, collator: Collator, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Batch]:
    """`steps` batches: one pass over the shuffled examples after the other."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        yield collator([examples[i] for i in order[:batch_size]])
        del order[:batch_size]
