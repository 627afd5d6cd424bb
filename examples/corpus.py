"""Texts as batches of tokens, and a model and a tokenizer that need no download."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Batch = dict[str, Tensor]


def batch_of(texts: Sequence[str], tokenizer: Any, longest: int, device: Any) -> Batch:
    """The first `longest` tokens of each text, padded on the right; labels are -100 on the padding."""
    rows = [tokenizer.encode(text)[:longest] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def batches_of(
    texts: Sequence[str], tokenizer: Any, steps: int, size: int, longest: int, device: Any, seed: int = 0
) -> list[Batch]:
    """`steps` batches of texts in a shuffled order, which starts anew when they are used up."""

    def order() -> Iterator[str]:
        shuffled = list(texts)
        generator = random.Random(seed)
        while True:
            generator.shuffle(shuffled)
            yield from shuffled

    endless = order()
    return [batch_of([next(endless) for _ in range(size)], tokenizer, longest, device) for _ in range(steps)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and every text starts with `<s>`."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def random_model(vocabulary: int = 258, seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama that knows nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)
