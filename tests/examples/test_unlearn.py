"""The loop: what it takes its gradients of, what it promises, and that it forgets."""

import copy
import math

import pytest
import torch

from examples.grid import QUICK
from examples.objectives import FORGET, RETAIN, grad_diff, kl, nll, npo
from examples.unlearn import answers, batches_of, unlearn
from examples.world import make_world, pairs, teach
from tests.support.oracle import rounding_error

# Raised inside of torch when torch.compile is first used.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

SEED = 0


@pytest.fixture(scope="module")
def world(one_thread):
    world = make_world(QUICK, SEED)
    teach(QUICK, world, SEED, quiet=True)
    return world


def unlearned(world, forget, rule, lr=3e-3, retain=nll, **weights):
    """The model, and what was seen at each step."""
    model = copy.deepcopy(world.model)
    return model, list(unlearn(model, pairs(QUICK, world, SEED), forget, retain, rule, lr, **weights))


def test_the_world_is_known(world):
    known = world.known(world.model)
    assert all(seen["answers"] >= 0.9 for seen in known.values())


@pytest.mark.parametrize("objective", FORGET)
@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad", "pcgrad_global"])
def test_every_way_forgets(world, objective, rule):
    before = world.known(world.model)
    model, seen = unlearned(world, FORGET[objective], rule)
    after = world.known(model)
    assert len(seen) == QUICK.steps
    assert after["forget"]["probability"] < before["forget"]["probability"] - 0.1
    assert after["forget"]["answers"] < before["forget"]["answers"]
    assert after["forget"]["probability"] < after["general"]["probability"]
    if rule != "sum":
        assert all(step["cos_update_retain"] >= 0 for step in seen)


@pytest.mark.parametrize("retain", RETAIN)
def test_retain_losses_hold_the_model_back(world, retain):
    lost = {}
    for alpha in (0.0, 1.0):
        model, _ = unlearned(world, grad_diff, "sum", retain=RETAIN[retain], alpha=alpha)
        lost[alpha] = world.known(model)["retain"]["loss"]
    assert lost[1.0] < lost[0.0]


def test_the_sum_is_the_plain_loop(world):
    """As it was before: one loss, one backward.

    In fp64: AdamW divides by roots of squares near 0, which magnifies a rounding by up to some 1e6. The
    weights move by 0.01.
    """
    world = world._replace(model=copy.deepcopy(world.model).double())
    plain = copy.deepcopy(world.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for forget_batch, retain_batch in pairs(QUICK, world, SEED):
        loss = 2.0 * grad_diff(answers(plain, forget_batch), None) + nll(answers(plain, retain_batch), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model, _ = unlearned(world, grad_diff, "sum", lr=1e-3, gamma=2.0)
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)


def test_before_is_the_model_before_unlearning(world):
    """At the first step nothing has changed: NPO is 2/beta * log 2, KL is 0. Later both have."""
    _, seen = unlearned(world, npo, "sum", retain=kl)
    few = rounding_error(16, torch.float32)  # of losses that are means of a few terms of one size
    assert seen[0]["forget_loss"] == pytest.approx(20 * math.log(2), rel=few)
    assert seen[0]["retain_loss"] == pytest.approx(0, abs=few)
    assert seen[-1]["forget_loss"] < seen[0]["forget_loss"]
    assert seen[-1]["retain_loss"] > 1e-3


def test_every_fact_comes_once_a_pass():
    examples = [{"input_ids": [i], "labels": [i]} for i in range(6)]

    def collator(chosen):
        return [example["input_ids"][0] for example in chosen]

    def drawn(seed):
        return list(batches_of(examples, collator, 4, 6, torch.Generator().manual_seed(seed)))

    batches = drawn(0)
    flat = [i for batch in batches for i in batch]
    assert [len(batch) for batch in batches] == [4] * 6
    assert all(sorted(flat[i : i + 6]) == list(range(6)) for i in (0, 6, 12, 18))
    assert batches == drawn(0) != drawn(1)
