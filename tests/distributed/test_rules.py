"""Rules with a memory and random gates give the same results on several ranks as on one process."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sago
from tests.support.properties import assert_equal_bits
from tests.support.ranks import FSDP2_ON_CPU, NO_FSDP2, error_of
from tests.support.running_mean import DECAY, assert_as_by_hand, by_hand, trained
from tests.support.training import (
    Run,
    assert_equal_tensors,
    batches,
    mesh_of,
    parameters,
    sharded,
    share,
    transformer,
    whole,
    window,
)

RULES = ("gru", "mudman")


def with_ddp():
    return {rule: trained(DistributedDataParallel(transformer()), rule, share()) for rule in RULES}


def with_fsdp2():
    return {rule: trained(sharded(transformer(), mesh_of(shard=2)), rule, share()) for rule in RULES}


@pytest.mark.parametrize(
    "form",
    [with_ddp, pytest.param(with_fsdp2, marks=pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2))],
)
def test_twenty_steps_as_published(ranks2, form):
    on_ranks = ranks2(form)
    for rule in RULES:
        expected = by_hand(transformer(), rule)
        for found in on_ranks:
            assert_as_by_hand(found[rule], expected)


def continued():
    """The parameters after a run that was interrupted, and after one that was not."""
    found = []
    for interrupted in (False, True):
        model = sharded(transformer(), mesh_of(shard=2))
        buckets = sago.GradientBuckets(model, retain_decay=DECAY)
        for step in range(3):
            if step == 2 and interrupted:
                state = buckets.state_dict()
                buckets = sago.GradientBuckets(model, retain_decay=DECAY)
                buckets.load_state_dict(state)
            window(model, buckets, Run("gru"), batches(step, 0, *share()))
            buckets.synthesize_("gru")
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.01)
            buckets.zero_()
        found.append(parameters(model)[0])
    return found


def loaded_on_one_rank(form):
    model = (
        DistributedDataParallel(transformer()) if form == "ddp" else sharded(transformer(), mesh_of(shard=2))
    )
    buckets = sago.GradientBuckets(model, retain_decay=DECAY)
    for step in range(2):
        window(model, buckets, Run("gru"), batches(step, 0, *share()))
        if step == 0:
            buckets.synthesize_("gru")
            state = buckets.state_dict()
            buckets.zero_()
            if share()[0] == 0:
                buckets.load_state_dict({**state, "retain_weight": 2.0})
    return error_of(buckets.synthesize_, "gru")


@pytest.mark.parametrize(
    "form", ["ddp", pytest.param("fsdp2", marks=pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2))]
)
def test_means_that_differ_between_ranks(ranks2, form):
    for kind, text in ranks2(loaded_on_one_rank, form):
        assert kind is ValueError
        assert "same weight and the same parameters on every rank" in text


def drawn_on_shards():
    """The updates of sharded gradients, whole, and of gradients that are sharded along other dimensions."""
    mesh = mesh_of(shard=2)
    forget, retain = gradients()
    placements = [[Shard(0)], [Replicate()], [Shard(0)]]
    sides = [
        [distribute_tensor(t, mesh, p) for t, p in zip(side, placements, strict=True)]
        for side in (forget, retain)
    ]
    updates, report = sago.synthesize(*sides, sago.rules.graddrop(3))
    columns = [[distribute_tensor(side[0], mesh, [Shard(1)])] for side in (forget, retain)]
    return (
        [whole(u) for u in updates],
        report.to_dict()["uu"],
        error_of(sago.synthesize, *columns, "graddrop"),
    )


def floored_on_shards():
    mesh = mesh_of(shard=2)
    placements = [[Shard(0)], [Replicate()], [Shard(0)]]
    sides = [
        [distribute_tensor(t, mesh, p) for t, p in zip(side, placements, strict=True)] for side in gradients()
    ]
    updates, report = sago.synthesize(*sides, retain_floor=0.73)
    return [whole(u) for u in updates], report.to_dict()


def floored_with_other_groups(stats):
    """Every rank has two groups, but rank 0 and rank 1 put the last two gradients into different ones."""
    mesh = mesh_of(shard=2)
    sides = [[distribute_tensor(t, mesh, [Shard(0)]) for t in side] for side in gradients()]
    groups = [0, 1, 0] if share()[0] == 0 else [0, 0, 1]
    return error_of(sago.synthesize, *sides, groups=groups, stats=stats, retain_floor=0.73)


def gradients():
    shapes = (7, 5), (3,), (1, 4)  # one rank holds no row of the last tensor
    return [[torch.randn(s, generator=torch.manual_seed(i)) for s in shapes] for i in range(2)]


def test_shards_draw_the_numbers_of_the_whole(ranks2):
    expected, report = sago.synthesize(*gradients(), sago.rules.graddrop(3))
    for updates, uu, error in ranks2(drawn_on_shards):
        assert_equal_bits(updates, expected)
        # All terms are positive. Each of the two sums has at most 4 times the error of a sum, 1e-6.
        torch.testing.assert_close(torch.tensor(uu), report.uu.cpu(), rtol=1e-5, atol=0.0, check_dtype=False)
        assert "sharded along their first dimension" in error[1]


def test_shards_have_the_floors_of_the_whole(ranks2):
    expected, report = sago.synthesize(*gradients(), retain_floor=0.73)
    for updates, fields in ranks2(floored_on_shards):
        assert_equal_bits(updates, expected)
        assert fields["conflict_fraction"] == report.to_dict()["conflict_fraction"]


@pytest.mark.parametrize("stats", [True, False])
def test_floors_of_other_groups_on_some_ranks_are_refused(ranks2, stats):
    """The floors alone need sums over the ranks if there are no statistics."""
    for kind, text in ranks2(floored_with_other_groups, stats):
        assert kind is ValueError
        assert "should be the same on every rank" in text


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
def test_a_sharded_mean_is_restored(ranks2):
    for expected, restored in ranks2(continued):
        assert_equal_tensors(restored, expected)
