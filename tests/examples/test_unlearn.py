"""The loop: what it takes its gradients of, what it promises, and that it forgets."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from examples.losses import OfAnswers, answers
from examples.objectives import FORGET, RETAIN, grad_diff, nll
from examples.unlearn import unlearn
from examples.worlds.invented import Invented
from tests.support.oracle import rounding_error

# Raised inside of torch when torch.compile is first used.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

SEED, STEPS, BATCH = 0, 12, 12
SMALL = Invented(
    people=10, islands=4, digits=3, vocab=512, hidden=64, layers=1, train_steps=300, train_lr=1e-2
)


@pytest.fixture(scope="module")
def world(one_thread):
    world = SMALL.untrained(SEED)
    SMALL.teach(world, SEED, quiet=True)
    return world


def pairs(world):
    return world.batches(STEPS, BATCH, SEED)


def unlearned(world, losses, rule, lr=3e-3, **options):
    """The model, and what was seen at each step."""
    model = copy.deepcopy(world.model)
    return model, list(unlearn(model, losses, pairs(world), rule, lr, **options))


def test_the_world_is_known(world):
    known = world.known(world.model)
    assert all(seen["answers"] >= 0.9 for seen in known.values())


WAYS = [("GradDiff", "sago"), ("NPO", "sum"), ("NPO", "pcgrad"), ("SimNPO", "pcgrad_global")]


def test_the_ways_have_every_loss():
    assert {objective for objective, _ in WAYS} == set(FORGET)


@pytest.mark.parametrize(("objective", "rule"), WAYS)
def test_every_loss_and_every_rule_forgets(world, objective, rule):
    before = world.known(world.model)
    model, seen = unlearned(world, OfAnswers(objective), rule)
    after = world.known(model)
    assert len(seen) == STEPS
    assert after["forget"]["probability"] < before["forget"]["probability"] - 0.1
    assert after["forget"]["answers"] < before["forget"]["answers"]
    assert after["forget"]["probability"] < after["general"]["probability"]
    if rule != "sum":
        assert all(step["cos_update_retain"] >= 0 for step in seen)


@pytest.mark.parametrize("retain", RETAIN)
def test_retain_losses_hold_the_model_back(world, retain):
    lost = {}
    for alpha in (0.0, 1.0):
        model, _ = unlearned(world, OfAnswers("GradDiff", retain), "sum", alpha=alpha)
        lost[alpha] = world.known(model)["retain"]["loss"]
    assert lost[1.0] < lost[0.0]


def test_the_sum_is_the_plain_loop(world):
    """As it was before: one loss, one backward.

    In fp64: AdamW divides by roots of squares near 0, which magnifies a rounding by up to some 1e6. The
    weights move by 0.01.
    """
    world = replace(world, model=copy.deepcopy(world.model).double())
    plain = copy.deepcopy(world.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for forget_batch, retain_batch in pairs(world):
        loss = 2.0 * grad_diff(answers(plain, forget_batch), None) + nll(answers(plain, retain_batch), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model, _ = unlearned(world, OfAnswers("GradDiff"), "sum", lr=1e-3, gamma=2.0)
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)


def test_before_is_the_model_before_unlearning(world):
    """At the first step nothing has changed: NPO is 2/beta * log 2, KL is 0. Later both have."""
    _, seen = unlearned(world, OfAnswers("NPO", "KL"), "sum")
    few = rounding_error(16, torch.float32)  # of losses that are means of a few terms of one size
    assert seen[0]["forget_loss"] == pytest.approx(20 * math.log(2), rel=few)
    assert seen[0]["retain_loss"] == pytest.approx(0, abs=few)
    assert seen[-1]["forget_loss"] < seen[0]["forget_loss"]
    assert seen[-1]["retain_loss"] > 1e-3


def test_all_parameters_require_a_gradient_afterwards(world):
    """A loop that ends early leaves the model as it found it, too."""
    model = copy.deepcopy(world.model)
    steps = unlearn(model, OfAnswers("GradDiff"), pairs(world), "sago", 1e-3)
    next(steps)
    steps.close()
    assert all(p.requires_grad for p in model.parameters())


def test_the_gradients_are_clipped(world):
    """AdamW's first step does not depend on the norm of the update, but the report does not change either."""
    _, free = unlearned(world, OfAnswers("NPO"), "sago")
    _, clipped = unlearned(world, OfAnswers("NPO"), "sago", max_norm=0.1)
    assert clipped[0] == pytest.approx({**free[0], "seconds": clipped[0]["seconds"]})
    assert clipped[-1]["forget_loss"] != free[-1]["forget_loss"]
