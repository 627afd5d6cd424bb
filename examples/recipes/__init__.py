"""Loops in the shape of other codebases, before and after: `docs/recipes.md` shows the differences.

Each module has a `before` that adds two weighted losses, or combines two gradients by hand, and an `after`
that synthesizes the gradients. The model is a Llama with random weights, the texts are random tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]

GAMMA, ALPHA, LR = 0.5, 2.0, 0.1
VOCABULARY, LENGTH = 64, 12


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batches(steps: int, seed: int = 0, size: int = 2) -> list[tuple[Batch, Batch]]:
    """Pairs of a forget and a retain batch, whose texts differ in the first quarter only: they conflict."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        forget, retain = torch.randint(VOCABULARY, (2, size, LENGTH), generator=generator)
        retain[:, LENGTH // 4 :] = forget[:, LENGTH // 4 :]
        batches.append(tuple({"input_ids": ids, "labels": ids.clone()} for ids in (forget, retain)))
    return batches
