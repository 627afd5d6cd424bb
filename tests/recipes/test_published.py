"""The recipes for GRU, MUDMAN and BLUR against the algorithms by hand, in fp64 over several steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.recipes import LENGTH, VOCABULARY, blur, gru, make_batches, mudman
from tests.support.oracle import rounding_error

STEPS = 8


class Model(nn.Module):
    """Predicts the next token from the present one, all in fp64.

    The embedding of a token that is in no text of a side has a gradient of exactly 0 on that side.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, VOCABULARY)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, input_ids, labels):
        logits = self.layers(input_ids)[:, :-1]
        return SimpleNamespace(loss=cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def trained(step, batches, **options):
    model = Model()
    step(model, batches, **options)
    return [p.detach() for p in model.parameters()]


def distance(found, expected):
    return max((p - q).abs().max().item() for p, q in zip(found, expected, strict=True))


def assert_same(found, expected):
    """An element of a step is below 1, and comes from inner products and losses that round some 1000 times.

    An error of the weights reaches the gradients of the later steps, at most some 100 times as large.
    """
    assert distance(found, expected) < STEPS * 100 * rounding_error(1000, torch.float64)


def texts(in_conflict=False):
    """In every second window, retain has other labels for the tokens of forget. Some of these pairs agree.

    With `in_conflict`, all texts of both sides are nearly equal, and the cosine is below -0.5.
    """
    batches = make_batches(STEPS)
    for i, (forget, retain) in enumerate(batches):
        if in_conflict:
            retain["input_ids"][:, 1:] = forget["input_ids"][:, 1:]
            retain["labels"] = retain["input_ids"]
        elif i % 4 > 1:  # both micro-batches of a window of GRU
            retain["input_ids"] = forget["input_ids"]
            retain["labels"] = (forget["labels"] + 1) % VOCABULARY
    return batches


def inner_product(forget_batch, retain_batch):
    model = Model()
    losses = -model(**forget_batch).loss, model(**retain_batch).loss
    forget, retain = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    return sum((f * r).sum().item() for f, r in zip(forget, retain, strict=True))


def test_the_gradients_have_both_signs():
    assert {inner_product(*pair) > 0 for pair in texts()} == {True, False}


CASES = [
    pytest.param(gru, {}, {}, id="gru"),
    pytest.param(gru, {"lowest_cosine": -0.5}, {"lowest_cosine": -1.0}, id="gru-clipped"),
    pytest.param(mudman, {}, {}, id="mudman"),
    pytest.param(blur, {"forget_lower": True}, {"forget_lower": False}, id="blur"),
    pytest.param(blur, {"forget_lower": False}, {"forget_lower": True}, id="blur-forget-upper"),
]


@pytest.mark.parametrize(("recipe", "options", "others"), CASES)
def test_as_published(recipe, options, others):
    batches = texts(in_conflict="lowest_cosine" in options)
    expected = trained(recipe.before, batches, **options)
    assert distance(expected, Model().parameters()) > 1e-3
    assert_same(trained(recipe.after, batches, **options), expected)
    if others != options:  # the option matters
        assert distance(trained(recipe.before, batches, **others), expected) > 1e-4


@pytest.mark.parametrize("recipe", [gru, mudman])
def test_the_mean_matters(recipe, monkeypatch):
    """With a mean of the last gradient only, both end elsewhere."""
    batches = texts()
    expected = trained(recipe.before, batches)
    name, value = ("MOVING_AVG", 1 - 1e-9) if recipe is gru else ("MOMENTUM", 1e-9)
    monkeypatch.setattr(recipe, name, value)
    assert distance(trained(recipe.after, batches), expected) > 1e-4


def test_mudman_drops_forget_where_retain_is_zero():
    """As published: the embedding of a token that only the forget text has does not move."""
    forget, retain = (torch.full((1, LENGTH), token) for token in (3, 5))
    sides = tuple({"input_ids": ids, "labels": ids} for ids in (forget, retain))
    for step in (mudman.before, mudman.after):
        embedding, *_ = trained(step, [sides])
        start, *_ = Model().parameters()
        moved = (embedding != start).any(dim=1).nonzero().flatten().tolist()
        assert moved == [5]
