"""`GradientBuckets` of sharded models: as on one process with the batches of all ranks."""

import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import sago
from sago.capture import others
from sago.capture.flat import ALIGNMENT
from sago.distributed import SumOver
from tests.support import inputs
from tests.support.by_hand import ByHand
from tests.support.collectives import Collectives, all_reduces
from tests.support.properties import assert_equal_bits, assert_updates
from tests.support.ranks import FSDP2_ON_CPU, NO_FSDP2, error_of
from tests.support.training import (
    FORWARDS_FIRST,
    INTERLEAVED,
    STEPS,
    WEIGHTS,
    Run,
    assert_as_single,
    assert_equal_reports,
    assert_equal_results,
    assert_equal_tensors,
    assert_scaled,
    batches,
    fields,
    local,
    losses_of,
    mesh_of,
    one_forward,
    optimizer_of,
    parameters,
    runs,
    scaled,
    sharded,
    share,
    single,
    tensor_parallel,
    train,
    transformer,
    whole,
    window,
)
from tests.support.windows import ALONE

# How a model is laid out, on how many ranks, and whether there are replicas.
FSDP2, FSDP4, HSDP = ("fsdp", 2, False), ("fsdp", 4, False), ("hsdp", 4, True)
TP, FSDP_TP = ("tp", 2, True), ("fsdp x tp", 4, True)


def laid_out(layout, **options):
    """The model, the mesh of all ranks, and this rank's share of a batch."""
    rank, world = share()
    model = transformer()
    if layout == "fsdp":
        mesh = mesh_of(shard=world)
        return sharded(model, mesh, **options), mesh, (rank, world)
    if layout == "hsdp":
        mesh = mesh_of(replicate=2, shard=2)
        return sharded(model, mesh, **options), mesh, (rank, world)
    if layout == "tp":
        mesh = mesh_of(tensor=2)
        return tensor_parallel(model, mesh), mesh, (0, 1)
    mesh = mesh_of(shard=2, tensor=2)
    return sharded(tensor_parallel(model, mesh["tensor"]), mesh["shard"], **options), mesh, (rank // 2, 2)


def trained(layout, chosen, **options):
    found = {}
    for run in chosen:
        model, _, part = laid_out(layout, **options)
        found[run] = train(model, run, part)
    return found


@pytest.fixture
def ranks_of(request):
    return lambda world: request.getfixturevalue(f"ranks{world}")


@pytest.mark.parametrize(
    ("layout", "world", "replicas", "order"),
    [
        (*FSDP2, INTERLEAVED),
        (*FSDP2, FORWARDS_FIRST),
        (*FSDP4, FORWARDS_FIRST),
        (*HSDP, INTERLEAVED),
        (*TP, FORWARDS_FIRST),
        (*FSDP_TP, INTERLEAVED),
    ],
)
def test_as_on_one_process(ranks_of, layout, world, replicas, order):
    every = (layout, order) == ("fsdp", FORWARDS_FIRST) and world == 2
    chosen = runs(order) if every else [runs(order)[i] for i in (1, 4, 6)]  # one of each scope
    assert_as_single(ranks_of(world)(trained, layout, chosen), replicas)


def with_one_copy():
    """The parameters and the last reports, of two copies, of one, and of one with steps in the backward."""
    found = []
    for rule, more in (("sago", {}), ("pcgrad", {}), ("sago", {"retain_floor": 0.73})):
        for one_copy, stepping in ((False, False), (True, False), (True, True)):
            model, _, part = laid_out("fsdp")
            buckets = sago.GradientBuckets(model, one_copy=one_copy)
            optimizer = optimizer_of(model, Run(rule))
            each = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}
            options = {"on_update": lambda p, each=each: each[p].step()} if stepping else {}
            for step in range(STEPS):
                forget, retain = losses_of(model, Run(rule), batches(step, 0, *part))
                with buckets.forget():
                    forget().backward()
                if one_copy:
                    with buckets.synthesize_in_backward(rule, **WEIGHTS, **options, **more) as block:
                        retain().backward()
                    report = block.report
                else:
                    with buckets.retain():
                        retain().backward()
                    report = buckets.synthesize_(rule, **WEIGHTS, **more)
                optimizer.step()
                buckets.zero_()
            found.append((parameters(model)[0], fields(report)))
    return found


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, names):
        return sum(getattr(self, name)(x) for name in names)


def reached_other_layers():
    model = fully_shard(Layers(), mesh=mesh_of(shard=2))
    buckets = sago.GradientBuckets(model, one_copy=True)
    with buckets.forget():
        model(torch.ones(2, 4), "ab").sum().backward()

    def backwards():
        with buckets.synthesize_in_backward("sago", stats=False):
            model(torch.ones(2, 4), "ab"[share()[0]]).square().sum().backward()

    return error_of(backwards)


def test_one_copy_where_ranks_reach_other_parameters(ranks2):
    for kind, text in ranks2(reached_other_layers):
        assert kind is ValueError
        assert "should be reached by retain backwards on every rank or on none" in text


def test_one_copy_has_the_updates_of_two(ranks2):
    for found in ranks2(with_one_copy):
        for two, one, stepped in (found[:3], found[3:6], found[6:]):
            assert_equal_tensors(one[0], two[0])
            assert_equal_reports(one[1], two[1])
            assert_equal_bits(list(stepped[0].values()), list(one[0].values()))


def trained_in_other_ways():
    """Where parameters come from, which optimizer steps, and when FSDP2 gathers, makes no difference."""
    run, found = Run("pcgrad", accumulation=3, order=FORWARDS_FIRST), []
    for options, listed, made, stepped in (
        ({}, nn.Module.named_parameters, ALONE, {}),
        ({"reshard_after_forward": False}, nn.Module.parameters, {}, {"foreach": True}),
        ({}, lambda model: model, {}, {"fused": True}),
    ):
        model, _, part = laid_out("fsdp", **options)
        buckets, optimizer = sago.GradientBuckets(listed(model), **made), optimizer_of(model, run, **stepped)
        found.append(train(model, run, part, buckets, optimizer))
        parts = [local(p).nbytes for p in model.parameters()]
        assert buckets.nbytes == 2 * sum(-(-n // ALIGNMENT) * ALIGNMENT for n in parts)
    return found


def test_other_ways_that_make_no_difference(ranks2):
    for results in ranks2(trained_in_other_ways):
        for result in results:
            assert_equal_tensors(result.parameters, single(Run("pcgrad", accumulation=3)).parameters)


class Checkpointed(nn.Module):
    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x):
        return checkpoint(self.module, x, **self.options)


def trained_with_checkpoints():
    found = []
    for reentrant in (False, True):
        model = transformer()
        for block in model.blocks:
            fully_shard(block, mesh=mesh_of(shard=2))
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Checkpointed(block, use_reentrant=reentrant)
        fully_shard(model, mesh=mesh_of(shard=2))
        result = train(model, Run("pcgrad", accumulation=3), share())
        found.append({n.replace("module.", ""): p for n, p in result.parameters.items()})
    return found


def test_activation_checkpoints(ranks2):
    for results in ranks2(trained_with_checkpoints):
        for found in results:
            assert_equal_tensors(found, single(Run("pcgrad", accumulation=3)).parameters)


def one_forward_on_ranks(layout):
    model, _, part = laid_out(layout)
    return one_forward(model, Run("pcgrad"), part)


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 2), ("tp", 2)])
def test_losses_that_share_a_forward_and_captures_within_captures(ranks_of, layout, world):
    for found in ranks_of(world)(one_forward_on_ranks, layout):
        assert_equal_tensors(found, one_forward(transformer(), Run("pcgrad")))


def read_late():
    """Reports of elementwise rules, whose sums over the ranks nothing has waited for, read in the end."""
    model, run = laid_out("fsdp")[0], Run("sago")
    buckets, optimizer, reports = sago.GradientBuckets(model), optimizer_of(model, run), []
    for step in range(STEPS):
        window(model, buckets, run, batches(step, 0, *share()))
        reports.append(buckets.synthesize_("sago", **WEIGHTS))
        optimizer.step()
        buckets.zero_()
    return [fields(report) for report in reports] if dist.get_rank() == 0 else None


def read_early():
    """The same at once, while the other rank has yet to come."""
    model, run = laid_out("fsdp")[0], Run("sago")
    buckets = sago.GradientBuckets(model)
    window(model, buckets, run, batches(0, 0, *share()))
    buckets.synthesize_("sago", **WEIGHTS)  # the ranks have compared their lists
    buckets.zero_()
    window(model, buckets, run, batches(0, 0, *share()))
    if dist.get_rank() == 1:
        time.sleep(1)
    return fields(buckets.synthesize_("sago", **WEIGHTS))


def test_a_report_that_is_read_early_waits_for_the_others(ranks2):
    for report in ranks2(read_early):
        assert_equal_reports(report, single(Run("sago")).reports[0])


def test_reports_that_are_read_late_and_on_one_rank_only(ranks2):
    reports, _ = ranks2(read_late)
    for report, expected in zip(reports, single(Run("sago")).reports, strict=True):
        assert_equal_reports(report, expected)


PLAIN = [Run(rule) for rule in ("sago", "pcgrad", "pcgrad_global")]


def by_hand(layout, over, chosen=PLAIN):
    found = {}
    for run in chosen:
        model, mesh, part = laid_out(layout)
        found[run] = train(model, run, part, ByHand(model, mesh, over))
    return found


@pytest.mark.parametrize(("layout", "world", "replicas"), [FSDP2, HSDP, TP, FSDP_TP])
def test_sums_over_all_ranks_by_hand_are_as_on_one_process(ranks_of, layout, world, replicas):
    """The harness finds nothing wrong with plain torch that is right."""
    assert_as_single(ranks_of(world)(by_hand, layout, "ranks"), replicas)


# An update is wrong only where a coefficient is: what is counted twice in fr and in rr cancels.
@pytest.mark.parametrize(
    ("layout", "over", "spoilt"),
    [
        (FSDP2, "nothing", ("pcgrad", "pcgrad_global")),
        (HSDP, "replicate", ("pcgrad", "pcgrad_global")),
        (HSDP, "replicas", ()),
        (TP, "replicas", ("pcgrad_global",)),
        (FSDP_TP, "shard", ("pcgrad", "pcgrad_global")),
        (FSDP_TP, "tensor", ("pcgrad", "pcgrad_global")),
        (FSDP_TP, "replicas", ("pcgrad_global",)),
    ],
)
def test_wrong_sums_are_noticed(ranks_of, layout, over, spoilt):
    name, world, _ = layout
    for rank in ranks_of(world)(by_hand, name, over, PLAIN[1:]):
        for run, result in rank.items():
            right = single(run)
            with pytest.raises(AssertionError, match="not close"):
                assert_equal_reports(result.reports[0], right.reports[0])
            if run.rule in spoilt:
                with pytest.raises(AssertionError, match="not close"):
                    assert_equal_results(result, right)


def counted(layout):
    """The all-reduces of a synthesis, for each set of options."""
    model, _, part = laid_out(layout)
    buckets, found = sago.GradientBuckets(model), []
    # The first synthesis compares what the ranks have.
    for options in ({"rule": "pcgrad"}, *OPTIONS):
        window(model, buckets, Run("pcgrad"), batches(0, 0, *part))
        with Collectives() as synthesis:
            report = buckets.synthesize_(**options)
            report.to_dict()
        buckets.zero_()
        found.append(all_reduces(synthesis.found))
    return found[1:]


OPTIONS = (
    {"rule": "pcgrad"},
    {"rule": "pcgrad", "stats": False},
    {"rule": "pcgrad_global", "max_norm": 1.0},
    {"rule": "sago"},
    {"rule": "sago", "stats": False, "max_norm": 1.0},
    {"rule": "sago", "stats": False, "nonfinite": "zero_update"},
    {"rule": "sago", "stats": False},
    {"rule": "sum", "stats": False},
)


@pytest.mark.parametrize(("layout", "world", "replicas"), [FSDP2, FSDP_TP])
def test_one_all_reduce_of_a_small_table_a_synthesis_or_none(ranks_of, layout, world, replicas):
    rows = len(list(transformer().parameters()))
    for found in ranks_of(world)(counted, layout):
        for number, sizes in enumerate(found, start=2):
            assert number not in (2, 4, 8) or sizes.pop(0) == 2 * 56 * 9  # two flags a bit of nine values
        assert all(sizes.pop(0) == 4 * rows for sizes in found)  # which parameters each rank reached
        assert [len(sizes) for sizes in found] == [1, 1, 1, 1, 1, 1, 0, 0]
        assert all(size <= 9 * rows for sizes in found for size in sizes)


class Halves(nn.Module):
    """Two layers of one shape, whose gradients FSDP2 would take for each other's."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.first, self.second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))


def reached_on_some_ranks(layout):
    """A window in which one rank goes through another layer than the others, and one after it."""
    model, x = Halves(), torch.ones(2, 4, dtype=torch.float64)
    if layout == "tp":
        parallelize_module(
            model, mesh_of(tensor=2), {"first": ColwiseParallel(), "second": ColwiseParallel()}
        )
    else:
        fully_shard(model, mesh=mesh_of(shard=2) if layout == "fsdp" else mesh_of(replicate=2, shard=2))
    buckets, found = sago.GradientBuckets(model), []
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    model.forward = lambda x, layer: getattr(model, layer)(x)
    for layer in ("second" if dist.get_rank() == 1 else "first", "second"):
        with buckets.forget():
            model(x, "first").sum().backward()
        with buckets.retain():
            model(x, layer).sum().backward()
        held = [local(g) for g in (*buckets.forget_grads, *buckets.retain_grads) if g is not None]
        found.append(error_of(buckets.unscale_, scaler, optimizer))
        found.append(error_of(buckets.synthesize_, "sago"))
        if layer == "second" and found[-1] is None:
            found.append([name for name, p in model.named_parameters() if p.grad is None])
        else:
            now = [local(g) for g in (*buckets.forget_grads, *buckets.retain_grads) if g is not None]
            assert_equal_bits(now, held)
        buckets.zero_()
    return found


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 2), ("hsdp", 4), ("tp", 2)])
def test_a_parameter_that_is_reached_on_some_ranks_only_is_an_error_on_all(ranks_of, layout, world):
    for mixed, lost, *after in ranks_of(world)(reached_on_some_ranks, layout):
        assert mixed[0] is lost[0] is ValueError
        assert "`first.weight` should be reached by retain backwards on every rank or on none" in mixed[1]
        assert "Found that retain backwards reached `first.weight` on some ranks only" in lost[1]
        assert after == [None, None, []]


def part_of_a_sharded_model():
    """The first capture comes after the forward, when FSDP2 has whole parameters in its modules."""
    model = Halves()
    model.forward = lambda x: model.second(model.first(x))
    fully_shard(model, mesh=mesh_of(shard=2))
    buckets = sago.GradientBuckets(list(model.first.parameters()))
    loss = model(torch.ones(2, 4, dtype=torch.float64)).sum()

    def capture():
        with buckets.forget():
            loss.backward()

    return error_of(capture), [name for name, p in model.named_parameters() if p.grad is not None]


def test_a_sharded_parameter_that_was_not_given_is_an_error(ranks2):
    for (error, text), left in ranks2(part_of_a_sharded_model):
        assert error is ValueError
        assert "`second.weight` should be given to the buckets" in text
        assert left == []


def with_inf(layout, world):
    """An inf in the part of one gradient that one rank alone holds."""
    found = []
    for rule, policy in (("sago", "propagate"), ("pcgrad", "propagate"), ("pcgrad", "zero_update")):
        model, _, part = (transformer(), None, (0, 1)) if world == 1 else laid_out(layout)
        buckets, run = sago.GradientBuckets(model), Run(rule)
        forget, retain = losses_of(model, run, batches(0, 0, *part))
        with buckets.forget():
            forget().backward()
            if world == 1 or dist.get_rank() == 0:
                grad = model.blocks[0].mlp.up.weight.grad
                (grad if world == 1 else grad.to_local())[0, 0] = torch.inf
        with buckets.retain():
            retain().backward()
        report = buckets.synthesize_(rule, nonfinite=policy, **WEIGHTS)
        found.append(({n: whole(p.grad) for n, p in model.named_parameters()}, fields(report)))
    return found


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 2), ("fsdp x tp", 4)])
def test_an_inf_on_one_rank_is_one_on_all(ranks_of, layout, world):
    expected = with_inf(layout, 1)
    for found in ranks_of(world)(with_inf, layout, world):
        for (updates, report), (right, of_one) in zip(found, expected, strict=True):
            assert_equal_tensors(updates, right)
            assert report["nonfinite_forget"].sum() == 1
            assert report["nonfinite_forget"].tolist() == of_one["nonfinite_forget"].tolist()
    assert not any(update.any() for update in expected[2][0].values())
    assert expected[0][0]["blocks.0.mlp.up.weight"].isnan().sum() == 1


def in_low_precision():
    """Gradients and updates in fp32, of backwards in bf16 that are reduced in fp32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    found = []
    for rule in ("sago", "pcgrad"):
        model = sharded(transformer(torch.float32), mesh_of(shard=dist.get_world_size()), mp_policy=policy)
        batch = [[t.float() for t in batches(0, micro, *share())] for micro in range(2)]
        plain, buckets = ByHand(model), sago.GradientBuckets(model)
        for each in (plain, buckets):
            for x, y, z, w in batch:
                forget, retain = model(x), model(z)
                with each.forget():
                    (-nn.functional.mse_loss(forget.float(), y)).backward()
                with each.retain():
                    nn.functional.mse_loss(retain.float(), w).backward()
        grads = [[whole(g) for g in plain.sides[side]] for side in ("forget", "retain")]
        assert_equal_bits([whole(g) for g in buckets.forget_grads], grads[0])
        assert_equal_bits([whole(g) for g in buckets.retain_grads], grads[1])
        buckets.synthesize_(rule, **WEIGHTS)
        found.append((rule, *grads, [whole(p.grad) for p in model.parameters()]))
    return found


def test_mixed_precision(ranks2):
    """Accumulators hold what FSDP2 itself would have put into `p.grad`, bit for bit."""
    for results in ranks2(in_low_precision):
        for rule, forget, retain, updates in results:
            assert {u.dtype for u in updates} == {torch.float32}
            assert any((u.bfloat16() != u).any() for u in forget)
            assert_updates(updates, forget, retain, rule, **WEIGHTS)


def in_wider_accumulators():
    """Gradients in bf16, added up in fp32: those of each backward, their sums, and the updates."""
    model = sharded(transformer(torch.bfloat16), mesh_of(shard=2))
    batch = [[t.bfloat16() for t in batches(0, micro, *share())] for micro in range(3)]
    buckets = sago.GradientBuckets(model, accumulate_dtype=torch.float32)
    grads = []
    for x, y, z, w in batch:
        plain = ByHand(model)
        for each in (plain, buckets):
            with each.forget():
                (-nn.functional.mse_loss(model(x), y)).backward()
            with each.retain():
                nn.functional.mse_loss(model(z), w).backward()
        grads.append([[whole(g) for g in plain.sides[side]] for side in ("forget", "retain")])
    found = [[whole(g) for g in side] for side in (buckets.forget_grads, buckets.retain_grads)]
    buckets.synthesize_("sago", **WEIGHTS)
    return grads, found, [whole(p.grad) for p in model.parameters()]


def test_wider_accumulators(ranks2):
    for grads, found, updates in ranks2(in_wider_accumulators):
        for i, side in enumerate(found):
            expected = [sum(t.float() for t in each) for each in zip(*(g[i] for g in grads), strict=True)]
            assert_equal_bits(side, expected)
        like = [torch.empty_like(u) for u in updates]
        sago.reference.synthesize_(*found, "sago", out=like, **WEIGHTS)
        assert_equal_bits(updates, like)
        assert {u.dtype for u in updates} == {torch.bfloat16}


def test_cpu_offload(ranks2):
    """Parameters and gradients on the CPU, beside the accelerator: here it is the CPU, too."""
    # Memory is pinned for an accelerator, and there may be none.
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    chosen = [Run("sago", accumulation=3), Run("pcgrad"), Run("pcgrad_global", "sgd", max_norm=0.5)]
    assert_as_single(ranks2(trained, "fsdp", chosen, **options), replicas=False)


def without_sync(layout):
    """Backwards that FSDP does not reduce; then, after `zero_`, the run as ever."""
    model, _, part = laid_out(layout)
    buckets, run, errors = sago.GradientBuckets(model), Run("pcgrad", "sgd"), []
    for switch in (model.set_requires_gradient_sync, model.set_requires_all_reduce):
        for switched_on_again in (False, True):
            errors.append(error_of(held_back, model, buckets, switch, switched_on_again, part))
            switch(True)
            buckets.zero_()
        switch(False)
        errors.append(error_of(buckets.forget().__enter__))
        switch(True)
    return errors, train(model, run, part, buckets)


def held_back(model, buckets, switch, on_again, part):
    """A capture with a backward that FSDP does not reduce, or not over the replicas."""
    with buckets.forget():
        switch(False)
        losses_of(model, Run("pcgrad"), batches(5, 0, *part))[0]().backward()
        switch(on_again)


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 2), ("hsdp", 4)])
def test_gradients_that_are_held_back_are_an_error_that_names_the_way_out(ranks_of, layout, world):
    for errors, result in ranks_of(world)(without_sync, layout):
        if layout == "fsdp":  # which has no all-reduce, so that nothing is held back when it is on again
            assert errors.pop(4) is None
        for error, text in errors:
            assert error is ValueError
            assert "set_requires_gradient_sync(True)" in text
            assert "sync_each_batch=True" in text
        assert_equal_results(result, single(Run("pcgrad", "sgd")))


class Branches(nn.Module):
    """Parameters that are frozen, of forget alone, of retain alone, of none, and an embedding of few rows."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed, self.never = nn.Embedding(7, 5), nn.Linear(5, 2)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.heads = nn.ModuleDict({"forget": nn.Linear(5, 2), "retain": nn.Linear(5, 2)})
        self.double()

    def forward(self, tokens, head):
        return self.heads[head](torch.tanh(self.frozen(self.embed(tokens))))


def branched(rule, world):
    model, rank = Branches(), 0 if world == 1 else dist.get_rank()
    if world > 1:
        for module in (model.heads["forget"], model.heads["retain"], model.never, model):
            fully_shard(module, mesh=mesh_of(shard=world))
    buckets = sago.GradientBuckets(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, reports = torch.optim.AdamW(params, lr=1e-2), []
    for step in range(3):
        tokens = (inputs.normal(2 * 8, 400 + step).abs() * 2).long().clamp(max=5).view(2, 8)
        tokens = tokens.chunk(world, dim=1)[rank]
        with buckets.forget():
            (-(model(tokens[0], "forget") ** 2).mean()).backward()
        with buckets.retain():
            ((model(tokens[1], "retain") - 1) ** 2).mean().backward()
        reports.append(fields(buckets.synthesize_(rule, **WEIGHTS)))
        there = {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        buckets.zero_()
    return {name: whole(p) for name, p in model.named_parameters()}, reports, there


def branched_on_ranks(rules):
    return [branched(rule, dist.get_world_size()) for rule in rules]


def test_parameters_that_are_frozen_or_not_reached(ranks2):
    """AdamW would decay the one that is never reached, if it had a gradient of zeros."""
    rules = "sago", "pcgrad", "blur"
    for results in ranks2(branched_on_ranks, rules):
        for rule, (found, reports, there) in zip(rules, results, strict=True):
            expected, right, there_on_one = branched(rule, 1)
            assert there == there_on_one
            assert not any(name.startswith(("never", "frozen")) for name in there)
            assert_equal_tensors(found, expected)
            for report, of_one in zip(reports, right, strict=True):
                assert_equal_reports(report, of_one)


def after_an_evaluation():
    """A forward without a backward leaves the parameters of the root unsharded."""
    model, _, part = laid_out("fsdp")
    run = Run("pcgrad")
    optimizer = optimizer_of(model, run)
    with torch.no_grad():
        losses_of(model, run, batches(0, 0, *part))[0]()
    refused = error_of(lambda: sago.GradientBuckets(list(model.parameters())))
    return refused, train(model, run, part, optimizer=optimizer)


def test_buckets_that_are_made_after_an_evaluation(ranks2):
    for (error, text), result in ranks2(after_an_evaluation):
        assert error is ValueError
        assert "call reshard() on the FSDP modules" in text
        assert_equal_results(result, single(Run("pcgrad")))


def after_an_evaluation_of_one_group():
    """FSDP2 shards all parameters together, so that a forward leaves none of them sharded."""
    found = []
    for listed in (nn.Module.parameters, nn.Module.named_parameters, lambda model: model[0]):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        fully_shard(model, mesh=mesh_of(shard=2))
        with torch.no_grad():
            model(torch.ones(2, 4))
        found.append(error_of(lambda model=model, listed=listed: sago.GradientBuckets(listed(model))))
        model.reshard()
        found.append(error_of(lambda model=model: sago.GradientBuckets(model.parameters())))
    return found


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
def test_unsharded_parameters_alone_are_refused(ranks2):
    for found in ranks2(after_an_evaluation_of_one_group):
        assert found[1::2] == [None] * 3
        for error, text in found[::2]:
            assert error is ValueError
            assert "call reshard() on the FSDP modules" in text


def scaled_on_ranks():
    return scaled(laid_out("fsdp")[0], share())


def test_unscale_under_grad_scaler(ranks2):
    assert_scaled(ranks2(scaled_on_ranks))


def unscaled():
    """The scale after a step in which one rank alone has an inf in its part of a gradient."""
    model, _, part = laid_out("fsdp")
    buckets, optimizer = sago.GradientBuckets(model), optimizer_of(model, Run("pcgrad", "sgd"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = parameters(model)[0]
    losses = losses_of(model, Run("pcgrad"), batches(0, 0, *part))
    for capture, loss in zip((buckets.forget, buckets.retain), losses, strict=True):
        with capture():
            scaler.scale(loss()).backward()
            if dist.get_rank() == 0:
                model.blocks[0].mlp.up.weight.grad.to_local()[0, 0] = torch.inf
    buckets.unscale_(scaler, optimizer)
    buckets.synthesize_("sago", **WEIGHTS)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), before, parameters(model)[0]


def test_unscale_finds_on_all_ranks_what_is_on_one(ranks2):
    for scale, before, after in ranks2(unscaled):
        assert scale == 2.0**9
        assert all(torch.equal(after[name], p) for name, p in before.items())


def comparisons_of_a_window():
    """The all-reduces that compare flags, of `unscale_` and of the synthesis after it."""
    model, _, part = laid_out("fsdp")
    buckets, optimizer = sago.GradientBuckets(model), optimizer_of(model, Run("pcgrad", "sgd"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = losses_of(model, Run("pcgrad"), batches(0, 0, *part))
    for capture, loss in zip((buckets.forget, buckets.retain), losses, strict=True):
        with capture():
            scaler.scale(loss()).backward()
    found = []
    with mock.patch.object(SumOver, "agree", autospec=True, side_effect=SumOver.agree) as agree:
        for call in (lambda: buckets.unscale_(scaler, optimizer), lambda: buckets.synthesize_("sago")):
            agree.reset_mock()
            call()
            found.append(agree.call_count)
    return found


def test_reached_parameters_are_compared_once_a_window(ranks2):
    """The synthesis of the first window compares its arguments."""
    assert ranks2(comparisons_of_a_window) == [[1, 1]] * 2


def of_fsdp1():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated
        model = FullyShardedDataParallel(transformer(), device_id=torch.device("cpu"), use_orig_params=True)
    return [error_of(sago.GradientBuckets, x) for x in (model, list(model.parameters()))]


def test_fsdp1_is_refused_by_name(ranks2):
    for errors in ranks2(of_fsdp1):
        for error, text in errors:
            assert error is ValueError
            assert "fully_shard" in text
            assert "fsdp_version" in text


def beside_sharded():
    """A trained parameter that FSDP2 was told to leave alone, and that nothing reduces."""
    model = transformer()
    mesh = mesh_of(shard=2)
    fully_shard(model, mesh=mesh, ignored_params={model.temperature})
    error = error_of(sago.GradientBuckets, model)
    model.temperature.requires_grad_(False)
    return error, error_of(sago.GradientBuckets, model)


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
def test_a_trained_parameter_that_is_not_sharded_is_refused(ranks2):
    for (error, text), frozen in ranks2(beside_sharded):
        assert error is ValueError
        assert "`temperature` should be sharded" in text
        assert frozen is None


class OwnSetattr(nn.Linear):
    def __setattr__(self, name, value):
        super().__setattr__(name, value)


def searched():
    """The number of searches for other parameters, in three steps of a layer with its own `__setattr__`."""
    model = nn.Sequential(OwnSetattr(4, 4), OwnSetattr(4, 2))
    for module in (*model, model):
        fully_shard(module, mesh=mesh_of(shard=2))
    buckets = sago.GradientBuckets(model)
    with mock.patch.object(others, "_beside", wraps=others._beside) as search:
        for _ in range(3):
            for capture in (buckets.forget, buckets.retain):
                with capture():
                    model(torch.ones(2, 4)).sum().backward()
            buckets.synthesize_()
            buckets.zero_()
    return search.call_count


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
def test_unsharding_a_parameter_is_no_registration(ranks2):
    assert ranks2(searched) == [1, 1]


def summed_by_hand():
    """Buckets of shards whose sums are added up by a `reduce_gram`: the elements that it counts."""
    model = sharded(transformer(), mesh_of(shard=2))
    buckets = sago.GradientBuckets(model)
    window(model, buckets, Run("pcgrad"), batches(0, 0, *share()))
    return buckets.synthesize_("pcgrad", reduce_gram=SumOver()).numel.sum().item()


def test_elements_are_counted_once_with_reduce_gram(ranks2):
    whole = sum(p.numel() for p in transformer().parameters())
    assert ranks2(summed_by_hand) == [whole, whole]
