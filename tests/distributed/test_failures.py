"""What goes wrong between ranks is an error on all that it concerns, and no rank waits for ever."""

import os
import time
from contextlib import suppress
from datetime import timedelta
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sago
from sago.distributed import SumOver
from sago.rules import RULES, ratio, where
from tests.support import inputs
from tests.support.ranks import RankError, Ranks, error_of
from tests.support.training import (
    WEIGHTS,
    Run,
    assert_equal_results,
    batches,
    mesh_of,
    sharded,
    share,
    single,
    train,
    transformer,
    window,
)
from tests.support.windows import FP32, FP64

LATE = 10.0  # seconds, beyond which a group does not wait; ranks of a busy machine need some of them


def shards_of(numel=9, dtype=FP64, seed=0):
    mesh = mesh_of(shard=dist.get_world_size())
    return [distribute_tensor(t.to(dtype), mesh, [Shard(0)]) for t in inputs.pair(numel, seed)]


def fails(kind, how):
    """The last rank dies, raises in a capture or is late, in the second window of a training."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model = transformer()
    model = DistributedDataParallel(model) if kind == "ddp" else sharded(model, mesh_of(shard=share()[1]))
    buckets = sago.GradientBuckets(model)
    window(model, buckets, Run("pcgrad"), batches(0, 0, *share()))
    buckets.synthesize_("pcgrad").table()
    buckets.zero_()
    if last and how == "raises":
        with buckets.forget():
            raise ZeroDivisionError
    if last and how == "is late":
        time.sleep(2 * LATE)
    window(model, buckets, Run("pcgrad"), batches(1, 0, *share()))
    if last and how == "dies":
        os._exit(3)
    buckets.synthesize_("pcgrad").table()


IN_CI = [(2, "ddp", "dies"), (2, "fsdp", "dies")]
FAILURES = [
    pytest.param(*case, marks=[] if case in IN_CI else pytest.mark.long)
    for case in product((2, 4), ("ddp", "fsdp"), ("dies", "raises", "is late"))
]


@pytest.mark.parametrize(("count", "kind", "how"), FAILURES)
def test_a_rank_that_fails_is_an_error_on_the_others(count, kind, how):
    ranks = Ranks(count, timeout=30.0 if how == "dies" else LATE)
    try:
        ranks(int)
        store = ranks._folder.name
        with pytest.raises(RankError) as caught:
            ranks(fails, kind, how)
        *others, last = caught.value.errors
        for error in others:
            assert error.splitlines()[-1].startswith("RuntimeError")
            assert "synthesize_" in error or kind == "fsdp"  # whose forward and backward communicate, too
        waited = ["timed out" in error.lower() for error in others]
        # The neighbours of a dead rank notice it at once. Other ranks wait for these neighbours.
        assert any(waited) if how != "dies" else not all(waited)
        expected = {"dies": "died, exit code 3", "raises": "ZeroDivisionError", "is late": "RuntimeError"}
        assert expected[how] in last
        assert not os.path.exists(store)
        assert ranks(int) == [0] * count  # a new group
    finally:
        ranks.stop()


def is_late():
    """One rank waits elsewhere, for as long as the other waits for it. What the other is told."""
    group = dist.new_group(timeout=timedelta(seconds=LATE))
    f, r = inputs.pair(9)
    sago.synthesize_(f, r, "pcgrad", reduce_gram=SumOver(group))
    error = None
    if dist.get_rank() == 0:
        error = error_of(sago.synthesize_, f, r, "pcgrad", reduce_gram=SumOver(group))
    dist.barrier()
    return error


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout_of_the_group(ranks2):
    (error, text), _ = ranks2(is_late)
    assert error is RuntimeError
    assert "timed out" in text.lower()


def mismatched():
    """Lists that are not the same on both ranks."""
    second = dist.get_rank() == 1
    mesh = mesh_of(shard=2)
    f, r = shards_of(9)
    g, s = shards_of(6, seed=1)
    narrow = [t.to(FP32) for t in (f, r)]
    whole = [distribute_tensor(t.full_tensor(), mesh, [Replicate()]) for t in (f, r)]
    others = {
        "fewer": [[f], [r]],
        "another order": [[g, f], [s, r]],
        "another dtype": [[narrow[0], g], [narrow[1], s]],
        "another placement": [[whole[0], g], [whole[1], s]],
        "another shape": [[shards_of(11)[0], g], [shards_of(11)[1], s]],
    }
    found = {}
    for name, other in others.items():
        lists = other if second else [[f, g], [r, s]]
        before = [t.to_local().clone() for side in lists for t in side]
        found[name] = error_of(sago.synthesize_, *lists, "pcgrad")
        assert all(torch.equal(t.to_local(), b) for t, b in zip((*lists[0], *lists[1]), before, strict=True))
    groups = ["a", "b"] if second else ["a", "a"]
    found["other groups"] = error_of(sago.synthesize_, [f, g], [r, s], "pcgrad", groups=groups)
    found["the same"] = error_of(sago.synthesize_, [f, g], [r, s], "pcgrad")
    return found


def test_lists_that_differ_are_an_error_on_every_rank(ranks2):
    for found in ranks2(mismatched):
        assert found.pop("the same") is None
        for name, (error, text) in found.items():
            assert error is ValueError, name
            assert "the same on every rank" in text, name


def grouped_otherwise():
    """Buckets of one model with other groups on each rank, though as many."""
    model = sharded(transformer(), mesh_of(shard=2))
    count, first = len(list(model.parameters())), 10 + dist.get_rank()
    buckets = sago.GradientBuckets(model, groups=["a"] * first + ["b"] * (count - first))
    window(model, buckets, Run("pcgrad"), batches(0, 0, *share()))
    return error_of(buckets.synthesize_, "pcgrad")


def test_buckets_with_other_groups_are_an_error_on_every_rank(ranks2):
    for error, text in ranks2(grouped_otherwise):
        assert error is ValueError
        assert "the same on every rank" in text


def steeper(ff, fr, rr, gamma, alpha):
    """Twice the projection of `pcgrad`."""
    return gamma, alpha - 2.0 * gamma * where(fr < 0.0, ratio(fr, rr), 0.0)


# The beginning of the error, and the arguments of the last rank.
OTHER_ARGUMENTS = [
    ("Parameter `rule`", {"rule": "a_gem"}),
    ("The rule 'pcgrad'", {"rule": sago.Rule("pcgrad", RULES["pcgrad"].coefficients, "global")}),
    ("The rule 'pcgrad'", {"rule": sago.Rule("pcgrad", steeper, "tensor")}),
    ("Parameter `gamma`", {"gamma": 0.75000001}),
    ("Parameter `alpha`", {"alpha": torch.tensor(0.5)}),
    ("Parameter `max_norm`", {"max_norm": 1e9}),
    ("Parameter `nonfinite`", {"nonfinite": "zero_update"}),
    ("Parameter `eps`", {"eps": 1e-10}),
    ("Parameter `stats`", {"stats": False}),
]


def synthesized_otherwise(kind):
    """Errors of other arguments on the last rank, in two windows of a training that goes on after them."""
    run, found, last = Run("pcgrad"), [], dist.get_rank() == dist.get_world_size() - 1
    model = transformer()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        model = sharded(model, mesh_of(replicate=2, shard=2) if kind == "hsdp" else mesh_of(shard=2))

    def attempts(buckets):
        if len(found) < 2:
            given = {"rule": "pcgrad", **WEIGHTS}
            attempts = [given | other if last else given for _, other in OTHER_ARGUMENTS]
            found.append([error_of(buckets.synthesize_, **attempt) for attempt in attempts])

    return found, train(model, run, share(), look=attempts)


@pytest.mark.parametrize(("count", "kind"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "hsdp")])
def test_other_arguments_on_a_rank_are_an_error_on_every_rank(ranks2, ranks4, count, kind):
    for rank, (windows, result) in enumerate((ranks2 if count == 2 else ranks4)(synthesized_otherwise, kind)):
        assert len(windows) == 2
        for found in windows:
            for (text, _), (error, message) in zip(OTHER_ARGUMENTS, found, strict=True):
                assert error is ValueError, text
                assert message.startswith(f"{text} should be the same on every rank"), message
                assert f"on rank {rank}" in message
        assert_equal_results(result, single(Run("pcgrad")))


def drawn_at_another_step():
    """The second rank has loaded another step of the random gate."""
    buckets = sago.GradientBuckets(model := DistributedDataParallel(transformer()))
    window(model, buckets, Run("graddrop"), batches(0, 0, *share()))
    buckets.synthesize_("graddrop")
    buckets.zero_()
    state = buckets.state_dict()
    step = torch.tensor([0, dist.get_rank()])
    buckets.load_state_dict({**state, "draws": {name: t + step for name, t in state["draws"].items()}})
    window(model, buckets, Run("graddrop"), batches(1, 0, *share()))
    return error_of(buckets.synthesize_, "graddrop")


def test_another_step_of_a_random_gate_is_an_error_on_every_rank(ranks2):
    for error, text in ranks2(drawn_at_another_step):
        assert error is ValueError
        assert text.startswith("The rule 'graddrop' should be the same on every rank")


def compared(kind):
    """The windows in which the ranks compare their arguments."""
    model, found = transformer(), []
    model = DistributedDataParallel(model) if kind == "ddp" else sharded(model, mesh_of(shard=2))
    buckets = sago.GradientBuckets(model)
    with patch.object(SumOver, "check_equal", lambda *_: found.append(buckets._reduction.windows + 1)):
        for _ in range(17):
            window(model, buckets, Run("sago"), batches(0, 0, *share()))
            buckets.synthesize_("sago")
            buckets.zero_()
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_arguments_are_compared_less_and_less_often(ranks2, kind):
    assert ranks2(compared, kind) == [[1, 2, 4, 8, 16]] * 2


def alone_in_its_group():
    """The number of comparisons that a rank sends that is the only one of its group."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = DistributedDataParallel(transformer(), process_group=groups[dist.get_rank()])
    buckets, sent = sago.GradientBuckets(model, accumulation="mean"), []
    window(model, buckets, Run("sago"), batches(0, 0, *share()))
    with patch("sago.ranks.sum_over.all_reduce", lambda *arguments: sent.append(arguments)):
        buckets.synthesize_("sago", gamma=1.0 + dist.get_rank())
    return len(sent)


def test_a_rank_alone_compares_nothing(ranks2):
    assert ranks2(alone_in_its_group) == [0, 0]


def misplaced():
    """What cannot be synthesized, wherever it lies."""
    mesh = mesh_of(shard=2, replicate=2)
    f, r = (t.clone() for t in inputs.pair(9))
    partial = [DTensor.from_local(t, mesh, [Shard(0), Partial()], run_check=False) for t in (f, r)]
    placed = [distribute_tensor(t, mesh, [Shard(0), Replicate()]) for t in (f, r)]
    in_order, in_reverse = (
        distribute_tensor(t, DeviceMesh("cpu", ranks), [Shard(0)])
        for t, ranks in ((f, [0, 1, 2, 3]), (r, [3, 2, 1, 0]))
    )
    apart = [distribute_tensor(t, mesh["shard"], [Shard(0)]) for t in (f, r)]
    across = [distribute_tensor(t, mesh["replicate"], [Shard(0)]) for t in (f, r)]
    otherwise = distribute_tensor(r, mesh, [Replicate(), Shard(0)])
    parameter = torch.nn.Parameter(partial[0])
    return {
        "partial": error_of(sago.synthesize_, *partial, "sago"),
        "partial, summed": error_of(sago.synthesize_, *partial, "pcgrad", reduce_gram=SumOver()),
        "partial parameter": error_of(sago.GradientBuckets, [parameter]),
        "mesh": error_of(sago.synthesize_, in_order, in_reverse, "sago"),
        "placements": error_of(sago.synthesize_, placed[0], otherwise, "sago"),
        "plain": error_of(sago.synthesize_, placed[0], r, "sago"),
        "out": error_of(sago.synthesize_, *placed, "sago", out=[r.clone()]),
        "no common mesh": error_of(sago.synthesize_, [apart[0], across[0]], [apart[1], across[1]], "pcgrad"),
        "untouched": torch.equal(r, inputs.pair(9)[1]),
    }


def test_what_is_not_placed_alike_is_refused_with_the_reason(ranks4):
    says = {
        "partial": (ValueError, "should be reduced before"),
        "partial, summed": (ValueError, "should be reduced before"),
        "partial parameter": (ValueError, "should be reduced before"),
        "mesh": (ValueError, "the same mesh and placements"),
        "placements": (ValueError, "the same mesh and placements"),
        "plain": (TypeError, "all be DTensors, or all be plain tensors"),
        "out": (TypeError, "all be DTensors, or all be plain tensors"),
        "no common mesh": (ValueError, "on one mesh or on parts of it"),
    }
    for found in ranks4(misplaced):
        assert found.pop("untouched")
        assert found.keys() == says.keys()
        for name, (error, text) in says.items():
            assert found[name] is not None, name
            assert found[name][0] is error, name
            assert text in found[name][1], name


def beside_the_mesh():
    """DTensors of two ranks of four: the other two are not on the mesh."""
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("shard",))
    f, r = (distribute_tensor(t, mesh, [Shard(0)]) for t in inputs.pair(9))
    return error_of(sago.synthesize_, f, r, "pcgrad")


def test_a_rank_beside_the_mesh_is_an_error(ranks4):
    first, second, *others = ranks4(beside_the_mesh)
    assert first is second is None
    for error, text in others:
        assert error is ValueError
        assert "mesh that has this rank" in text


def spoilt():
    """A capture that fails, and `zero_`: nothing is left of it."""
    model, run = sharded(transformer(), mesh_of(shard=2)), Run("pcgrad")
    buckets = sago.GradientBuckets(model)
    window(model, buckets, run, batches(0, 0, *share()))
    with suppress(ZeroDivisionError), buckets.forget():
        model(batches(1, 0, *share())[0]).sum().backward()
        raise ZeroDivisionError
    error = error_of(buckets.synthesize_, "pcgrad")
    buckets.zero_()
    return error, train(model, run, share(), buckets)


def test_zero_is_the_way_out_of_a_capture_that_failed(ranks2):
    for (error, text), result in ranks2(spoilt):
        assert error is ValueError
        assert "ended in ZeroDivisionError" in text
        assert_equal_results(result, single(Run("pcgrad")))


def other_rows():
    """Plain shards of which one rank has more than the other."""
    rows = 2 + dist.get_rank()
    f, r = ([inputs.pair(9, seed)[side] for seed in range(rows)] for side in (0, 1))
    return error_of(sago.synthesize_, f, r, "pcgrad", reduce_gram=SumOver())


def test_sum_over_tables_of_other_sizes_is_an_error_on_every_rank(ranks2):
    for error, text in ranks2(other_rows):
        assert error is ValueError
        assert "list of gradients should be the same on every rank" in text
