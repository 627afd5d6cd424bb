"""The dimensions of models, the shapes of their gradients, and models with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Shapes = Sequence[tuple[int, ...]]


class Decoder(NamedTuple):
    """A decoder-only transformer with a gated MLP.

    `keys` is the width of all key heads together, and `head` that of one head. If the model is `tied`, its
    embedding is also its head.
    """

    hidden: int
    layers: int
    vocabulary: int
    mlp: int
    keys: int
    head: int = 128
    tied: bool = False


LLAMA_3_8B = Decoder(4096, 32, 128256, 14336, 1024)
ZEPHYR_7B = Decoder(4096, 32, 32000, 14336, 1024)  # a fine-tuned Mistral-7B
LLAMA_3_2_1B = Decoder(2048, 16, 128256, 8192, 512, head=64, tied=True)
PHI_3_MINI = Decoder(3072, 32, 32064, 8192, 3072, head=96)
SMOLLM2_135M = Decoder(576, 30, 49152, 1536, 192, head=64, tied=True)
# The proportions of Llama-3-8B: four heads to a key, an MLP 3.5 times wider, an embedding of 7 %.
SMALL = Decoder(512, 8, 4096, 1792, 128)


def linears(m: Decoder) -> Shapes:
    """The weights `[out, in]` of a layer: query, key, value, output, gate, up, down."""
    h = m.hidden
    return [(h, h), (m.keys, h), (m.keys, h), (h, h), (m.mlp, h), (m.mlp, h), (h, m.mlp)]


def fused_linears(m: Decoder) -> Shapes:
    """The weights of a layer of Phi-3, which fuses query, key and value, and fuses gate and up."""
    h = m.hidden
    return [(h + 2 * m.keys, h), (h, h), (2 * m.mlp, h), (h, m.mlp)]


def decoder(m: Decoder, layer: Shapes) -> Shapes:
    """The embedding, the layers with two norms each, the last norm, and a head unless it is tied."""
    embedding, norm = (m.vocabulary, m.hidden), (m.hidden,)
    return [embedding, *[*layer, norm, norm] * m.layers, norm, *([] if m.tied else [embedding])]


def lora(m: Decoder, rank: int) -> Shapes:
    """The adapters of every linear layer: `[rank, in]`, then `[out, rank]`."""
    return [s for rows, columns in linears(m) for s in ((rank, columns), (rows, rank))] * m.layers


LEAST = 16  # of a dimension that was shrunk: inner products of fewer elements have any sign

WORKLOADS: dict[str, Shapes] = {
    "one": [(1 << 15, 1 << 15)],
    "llama-3-8b": decoder(LLAMA_3_8B, linears(LLAMA_3_8B)),
    "zephyr-7b": decoder(ZEPHYR_7B, linears(ZEPHYR_7B)),
    "llama-3.2-1b": decoder(LLAMA_3_2_1B, linears(LLAMA_3_2_1B)),
    "phi-3-mini": decoder(PHI_3_MINI, fused_linears(PHI_3_MINI)),
    "rmu": [(ZEPHYR_7B.hidden, ZEPHYR_7B.mlp)] * 3,  # the down projections of layers 5, 6 and 7
    "lora": lora(LLAMA_3_8B, 16),
    "tiny": [(64 + 1237 * i % 4033,) for i in range(2000)],  # from 64 to 4096 elements
}
# One flat tensor of each size.
SIZES: dict[str, Shapes] = {f"2^{k}": [(1 << k,)] for k in range(14, 31, 4)}


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def shrink(shapes: Shapes, most: int) -> Shapes:
    """Halves every dimension, down to 16, until the list has at most `most` elements."""
    while elements(shapes) > most and any(d > LEAST for shape in shapes for d in shape):
        shapes = [tuple(max(min(d, LEAST), d // 2) for d in shape) for shape in shapes]
    return shapes


def llama(m: Decoder, dtype: torch.dtype, device: str, attention: str = "eager") -> torch.nn.Module:
    """Makes a Llama of transformers with random weights. `attention` is an implementation of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=m.vocabulary,
        hidden_size=m.hidden,
        intermediate_size=m.mlp,
        num_hidden_layers=m.layers,
        num_attention_heads=m.hidden // m.head,
        num_key_value_heads=m.keys // m.head,
        tie_word_embeddings=m.tied,
        rms_norm_eps=1e-5,
        rope_theta=1e5,  # that of SmolLM2; it changes no cost
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)
