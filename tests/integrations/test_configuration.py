"""The options of a synthesis as a configuration file gives them."""

import pickle

import pytest
import torch

import sago
from sago.integrations.trainer.configuration import dtype_of, groups_of, rule_of
from sago.integrations.transformers import Synthesis

MINE = sago.Rule("mine", lambda ff, fr, rr, gamma, alpha: (gamma, alpha), "element")
HERE = __name__


def made(share=0.5):
    return sago.Rule("made", lambda ff, fr, rr, gamma, alpha: (share * gamma, alpha), "element")


def test_rules():
    assert rule_of("pcgrad") is sago.rules.RULES["pcgrad"]
    assert rule_of(MINE) is rule_of(f"{HERE}:MINE") is MINE
    assert rule_of({"name": "cagrad", "radius": 0.25}).name == sago.rules.cagrad(0.25).name
    f, r = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -4.0])
    for config, rule in (
        ({"name": "cagrad", "radius": 0.25}, sago.rules.cagrad(0.25)),
        ({"name": f"{HERE}:made", "share": 0.125}, made(0.125)),
        ({"name": f"{HERE}:made"}, made()),
    ):
        assert torch.equal(sago.synthesize(f, r, rule_of(config))[0], sago.synthesize(f, r, rule)[0])


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("sagoo", ValueError, "should be one of sum, sago.*Found 'sagoo'.* has the form 'module:name'"),
        (3, TypeError, "a name or a sago.Rule. Found int"),
        ({"radius": 0.4}, ValueError, r"a key 'name'.*\['radius'\]"),
        ({"name": "sago"}, ValueError, "function that makes a rule. Found 'sago'"),
        ({"name": "evaluate"}, ValueError, "function that makes a rule. Found 'evaluate'"),
        ({"name": "cagrad", "width": 1}, TypeError, "width"),
        ({"name": f"{HERE}:dtype_of", "value": None}, TypeError, "should make a sago.Rule. Found NoneType"),
        ("no_such_module:rule", ValueError, "'no_such_module:rule', which raises ModuleNotFoundError"),
        (f"{HERE}:absent", ValueError, "which raises AttributeError"),
        (f"{HERE}:made", TypeError, "Found function at .*write {name: "),
    ],
)
def test_rules_that_are_refused(value, error, says):
    with pytest.raises(error, match=says):
        rule_of(value)


def test_an_expression_has_to_match_a_name():
    groups = groups_of(r"layers\.\d+")
    groups.check(["embed", "layers.3.weight"])
    with pytest.raises(ValueError, match=r"`groups` should be a regular expression.*layers.*matches none"):
        groups.check(["embed", "head"])


def test_dtypes():
    assert dtype_of("float32") is dtype_of("torch.float32") is dtype_of(torch.float32) is torch.float32
    assert dtype_of(None) is None
    for wrong in ("fp33", "nn", 32, "int32"):
        with pytest.raises(ValueError, match=f"name of a floating dtype.*Found {wrong!r}"):
            dtype_of(wrong)


NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.layers.0.norm.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("layer", [0, 1, 1, 1, 2, 3, 4]),
        ("module", [0, 1, 1, 2, 3, 4, 5]),
        (r"up_proj|q_proj", [0, 1, 1, 2, 3, 1, 4]),
        (r"\.(\d)\d*\..*(weight|bias)", [0, 1, 2, 1, 3, 3, 4]),
        (lambda name: name[-4:], [0, 0, 1, 0, 0, 0, 0]),
        (".+", [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=["layer", "module", "words", "digits", "function", "each parameter"],
)
def test_groups(value, expected):
    keys = [groups_of(value)(name) for name in NAMES]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    assert [numbers[key] for key in keys] == expected


def test_groups_that_are_refused():
    assert groups_of(None) is None
    with pytest.raises(ValueError, match=r"regular expression\. Found '\(', which is not an expression"):
        groups_of("(")
    for word in ("layers", "mlp", ""):
        with pytest.raises(ValueError, match=rf"'layer', 'module' or .* Found '{word}'"):
            groups_of(word)
    assert groups_of("(?:mlp)")("a.mlp.b") == "mlp"
    with pytest.raises(ValueError, match=r"'expert', which matches none|matches none"):
        groups_of("(?:expert)").check(NAMES)
    groups_of("layer").check(NAMES)


def test_the_keys_of_groups():
    """A layer has its name up to its number. What is in no layer is a group of its own."""
    layers = ["model.embed_tokens.weight", *["model.layers.0"] * 3, "model.layers.10", "model.layers.1"]
    assert [groups_of("layer")(name) for name in NAMES] == [*layers, "lm_head.weight"]
    assert groups_of("module")(NAMES[1]) == "model.layers.0.mlp.up_proj"
    assert [groups_of(".+")(name) for name in NAMES] == list(NAMES)


def test_layers_of_a_sequential_are_groups():
    assert [groups_of("layer")(name) for name in ("0.weight", "0.bias", "12.weight")] == ["0", "0", "12"]


@pytest.mark.parametrize("value", ["layer", "module", r"up_proj|q_proj"])
def test_groups_can_be_pickled(value):
    again = pickle.loads(pickle.dumps(groups_of(value)))
    assert [again(name) for name in NAMES] == [groups_of(value)(name) for name in NAMES]
    with pytest.raises(TypeError, match="Found list"):
        groups_of(["layer"])


def test_options():
    config = {"rule": "pcgrad", "groups": "layer", "accumulate_dtype": "float32", "stats": False}
    found = Synthesis.of(config)
    assert found.rule is sago.rules.RULES["pcgrad"]
    assert found.groups(NAMES[1]) == "model.layers.0"
    assert (found.accumulate_dtype, found.stats, found.one_copy) == (torch.float32, False, False)
    assert Synthesis.of(found) is found
    with pytest.raises(ValueError, match=r"options among rule, groups.*Found 'rulle'"):
        Synthesis.of({"rulle": "sago"})
    for name, way_out in (
        ("gamma", "are attributes of the trainer"),
        ("alpha", "are attributes of the trainer"),
        ("max_norm", "clips by `max_grad_norm`"),
    ):
        with pytest.raises(ValueError, match=rf"options among rule.*Found '{name}'.*{way_out}"):
            Synthesis.of({name: 2})
    with pytest.raises(TypeError, match=r"a Synthesis or a mapping\. Found str"):
        Synthesis.of("sago")
