"""Trains a small Llama to know facts by heart."""

from __future__ import annotations

import math
import sys

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from examples.objectives import IGNORE_INDEX
from examples.worlds.facts import Collator, Examples, logits_of

# At this running loss nearly all answers are known by heart. At the minimum itself the NLL gradients of the
# two splits would cancel, and a forget gradient that is a multiple of the retain gradient shows nothing.
KNOWN = 0.03


def make_model(vocab_size: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights. `hidden` is a multiple of 32, the width of a head."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    examples: Examples,
    collator: Collator,
    steps: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    quiet: bool = False,
) -> int:
    """AdamW on the answers until they are known (`KNOWN`) or `steps` are done. Returns the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step, running = 0, math.inf
    with tqdm(total=steps, desc="training", unit="step", file=sys.stderr, disable=quiet) as bar:
        while step < steps and running >= KNOWN:
            for index in torch.randperm(len(examples), generator=generator).split(batch_size):
                if step == steps or running < KNOWN:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / 20) * (0.02 + 0.98 * (1 - step / steps))
                batch = collator([examples[i] for i in index])
                labels = batch["labels"][:, 1:].flatten().to(model.device)
                logits = logits_of(model, batch)[:, :-1].flatten(0, 1)
                loss = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                running = loss.item() if step == 1 else 0.9 * running + 0.1 * loss.item()
                bar.update()
                bar.set_postfix(loss=f"{running:.3f}")
    return step
