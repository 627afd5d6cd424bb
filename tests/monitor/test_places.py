"""Layers and kinds of parameters from their names."""

import pytest

from sago.monitor.places import places

NAMES = {
    "Llama": (
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.11.mlp.up_proj.weight",
        ],
        [(None, "model.embed_tokens.weight"), (0, "mlp.up_proj.weight"), (11, "mlp.up_proj.weight")],
    ),
    "GPT-2": (
        ["transformer.h.3.attn.c_attn.bias", "ln_f.bias"],
        [(3, "attn.c_attn.bias"), (None, "ln_f.bias")],
    ),
    "adapters": (["base.model.layers.2.q_proj.lora_A.default.weight"], [(2, "q_proj.lora_A.default.weight")]),
    "experts": (
        ["layers.1.experts.0.w.weight", "layers.1.experts.17.w.weight"],
        [(1, "experts.*.w.weight"), (1, "experts.*.w.weight")],
    ),
    "two lists of layers": (
        ["encoder.layers.0.fc.weight", "decoder.layers.0.fc.weight", "head.weight"],
        [(0, "encoder.layers.fc.weight"), (0, "decoder.layers.fc.weight"), (None, "head.weight")],
    ),
    "Sequential": (["0.weight", "2.weight"], [(0, "weight"), (2, "weight")]),
    "two lists of layers as groups": (
        ["encoder.layers.0", "decoder.layers.0"],
        [(0, "encoder.layers"), (0, "decoder.layers")],
    ),
    "a number in a word": (["layer0", "layer0.weight"], [(None, "layer0"), (None, "layer0.weight")]),
    "layers as groups": (["layers.4", "layers.5", "embed"], [(4, ""), (5, ""), (None, "embed")]),
    "numbers": ([0, 7], [(0, ""), (7, "")]),
    "other keys": (
        ["all", ("a", 1), "conv2d.weight"],
        [(None, "all"), (None, "('a', 1)"), (None, "conv2d.weight")],
    ),
    "a name that appears twice": (["layers.0.w (1)"], [(0, "w (1)")]),
    "none": ([], []),
}


@pytest.mark.parametrize("names", NAMES)
def test_places(names):
    groups, expected = NAMES[names]
    assert places(groups) == expected
