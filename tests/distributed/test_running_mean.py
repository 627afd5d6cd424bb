"""A running mean of the retain gradient, on several ranks: as the published code on one process."""

import pytest
from torch.nn.parallel import DistributedDataParallel

import sago
from tests.support.ranks import FSDP2_ON_CPU, NO_FSDP2
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


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
def test_a_sharded_mean_is_restored(ranks2):
    for whole, restored in ranks2(continued):
        assert_equal_tensors(restored, whole)
