"""`GradientBuckets` of a DistributedDataParallel module: as on one process with the batches of all ranks."""

import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sago
from tests.support import inputs
from tests.support.by_hand import ByHand
from tests.support.collectives import Collectives, all_reduces
from tests.support.properties import assert_equal_bits
from tests.support.ranks import error_of
from tests.support.training import (
    FORWARDS_FIRST,
    INTERLEAVED,
    WEIGHTS,
    Run,
    assert_as_single,
    assert_equal_reports,
    assert_equal_results,
    assert_equal_tensors,
    assert_scaled,
    batches,
    buckets_of,
    fields,
    losses_of,
    mesh_of,
    one_forward,
    optimizer_of,
    runs,
    scaled,
    share,
    single,
    train,
    transformer,
    window,
)
from tests.support.windows import ALONE, BF16, FP16, FP32, backward

ORDERS = [pytest.param(INTERLEAVED, id="interleaved"), pytest.param(FORWARDS_FIRST, id="forwards_first")]
PLAIN = [Run(rule) for rule in ("sago", "pcgrad", "pcgrad_global")]


def replicated(**options):
    return DistributedDataParallel(transformer(), **options)


def trained(chosen, **options):
    return {run: train(replicated(**options), run, share()) for run in chosen}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("as_view", [False, True])
def test_as_on_one_process(ranks2, order, as_view):
    found = ranks2(trained, runs(order), gradient_as_bucket_view=as_view)
    assert_as_single(found, replicas=True)


def test_as_on_one_process_with_four_ranks(ranks4):
    assert_as_single(ranks4(trained, runs(FORWARDS_FIRST)[1::2]), replicas=True)


def trained_in_other_ways():
    """Where the parameters come from, and what is around the forwards, makes no difference."""
    run = Run("pcgrad", accumulation=3, order=FORWARDS_FIRST)
    ddp = replicated()
    yield train(ddp, run, share(), sago.GradientBuckets(ddp.module.named_parameters()))
    ddp = replicated()
    with ddp.no_sync():
        yield train(ddp, run, share())
    ddp = replicated()
    yield train(ddp, run, share(), buckets_of(ddp, run, **ALONE))


def listed(function):
    return list(function())


def test_where_parameters_come_from_and_no_sync_make_no_difference(ranks2):
    for results in ranks2(listed, trained_in_other_ways):
        for result in results:
            assert_equal_results(result, single(Run("pcgrad", accumulation=3)))


def one_forward_on_ranks():
    return one_forward(replicated(), Run("pcgrad"), share())


def test_losses_that_share_a_forward_and_captures_within_captures(ranks2):
    for found in ranks2(one_forward_on_ranks):
        assert_equal_tensors(found, one_forward(transformer(), Run("pcgrad")))


def wrapped_later(windows):
    """The buckets are there before DDP is, which would reduce the first of two gradients only."""
    model = transformer()
    buckets = sago.GradientBuckets(model)
    for _ in range(windows):
        for capture in (buckets.forget, buckets.retain):
            with capture():
                sum(p.sum() for p in model.parameters()).backward()
        buckets.synthesize_()
        buckets.zero_()
    ddp = DistributedDataParallel(model)
    return [error_of(capture) for capture in (buckets.forget, buckets.retain)], ddp.training


@pytest.mark.parametrize("windows", [0, 1])
def test_a_module_that_is_wrapped_when_the_buckets_are_there_is_refused(ranks2, windows):
    for errors, _ in ranks2(wrapped_later, windows):
        for error, text in errors:
            assert error is ValueError
            assert "Make new GradientBuckets" in text


def by_hand(order):
    """DDP's own reduction, and nothing else."""
    found = {}
    for run in PLAIN:
        ddp, run = replicated(), run._replace(order=order)
        found[run] = train(ddp, run, share(), ByHand(ddp))
    return found


def test_ddp_alone_is_as_on_one_process_interleaved(ranks2):
    """The harness finds nothing wrong with plain torch that is right."""
    assert_as_single(ranks2(by_hand, INTERLEAVED), replicas=True)


def test_ddp_alone_does_not_reduce_the_second_of_two_gradients(ranks2):
    """Forward, forward, backward, backward without the buckets: the reason why they reduce by themselves."""
    for rank in ranks2(by_hand, FORWARDS_FIRST):
        for run, result in rank.items():
            with pytest.raises(AssertionError, match="not close"):
                assert_equal_results(result, single(run))


# In the windows 1, 2, 4 and so on: two flags for each of the 56 bits of nine values that the ranks compare.
ARGUMENTS = 2 * 56 * 9


def counted(order, **options):
    """The all-reduces of a step, of its backwards and of its synthesis, and of reading the report."""
    ddp, run, found = replicated(), Run("pcgrad", accumulation=3, order=order), []
    buckets = buckets_of(ddp, run, **options)
    for step in range(3):
        with Collectives() as backwards:
            for micro in range(run.accumulation):
                window(ddp, buckets, run, batches(step, micro, *share()))
        with Collectives() as synthesis:
            report = buckets.synthesize_(run.rule, max_norm=1.0)
        with Collectives() as reading:
            report.table()
        buckets.zero_()
        found.append((all_reduces(backwards.found), all_reduces(synthesis.found), all_reduces(reading.found)))
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_all_reduces_of_a_step_are_as_many_as_flat_buffers(ranks2, order):
    sizes = [p.numel() for p in transformer().parameters()]
    for rank in ranks2(counted, order):
        for step, (backwards, synthesis, reading) in enumerate(rank):
            assert backwards == reading == []
            assert step == 2 or synthesis.pop(0) == ARGUMENTS
            assert len(synthesis) == 2  # forget and retain
            assert min(synthesis) >= sum(sizes)
    for rank in ranks2(counted, order, **ALONE):
        for step, (backwards, synthesis, reading) in enumerate(rank):
            assert backwards == reading == []
            assert step == 2 or synthesis.pop(0) == ARGUMENTS
            assert len(synthesis) == 2 * len(sizes)
            assert sum(synthesis) >= 2 * sum(sizes)


def counted_with_unscale():
    """The all-reduces of `unscale_` and of the synthesis behind it."""
    ddp, run = replicated(), Run("pcgrad", "sgd")
    buckets, scaler = sago.GradientBuckets(ddp), torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    window(ddp, buckets, run, batches(0, 0, *share()))
    with Collectives() as unscale:
        buckets.unscale_(scaler, optimizer_of(ddp, run))
    with Collectives() as synthesis:
        buckets.synthesize_(run.rule, max_norm=1.0)
    return all_reduces(unscale.found), all_reduces(synthesis.found)


def test_gradients_are_averaged_once(ranks2):
    for unscale, synthesis in ranks2(counted_with_unscale):
        assert len(unscale) == 2
        assert synthesis == [ARGUMENTS]


GIVEN = (7, 1, 33)


def of_rank(rank, dtype):
    """Gradients that a rank has of its own: multiples of 1/8, whose sums over two ranks are exact in fp32."""
    sides = [inputs.normal(sum(GIVEN), 50 + 10 * k + rank) for k in range(2)]
    return [[(8 * t).round().div(8).to(dtype) for t in side.split(GIVEN)] for side in sides]


def given(dtype, pairs=False, **options):
    """Gradients that are known, by a module whose forward is of no concern. `pairs`: DDP in two groups."""
    module = nn.Module()
    module.params = nn.ParameterList(torch.zeros(n, dtype=dtype) for n in GIVEN)
    group = mesh_of(replicate=2, shard=2)["shard"].get_group() if pairs else None
    ddp = DistributedDataParallel(module, process_group=group)
    buckets = sago.GradientBuckets(ddp, **options)
    forget, retain = of_rank(dist.get_rank(), dtype)
    for capture, side in ((buckets.forget, forget), (buckets.retain, retain)):
        with capture():
            backward(list(ddp.parameters()), side)
    buckets.synthesize_("sago", **WEIGHTS)
    return [p.grad.clone() for p in ddp.parameters()]


def updates_of(ranks, dtype, wide):
    """What it should be for two ranks."""
    forget, retain = (
        [(a.to(wide) + b.to(wide)) / 2 for a, b in zip(*sides, strict=True)]
        for sides in zip(*(of_rank(rank, dtype) for rank in ranks), strict=True)
    )
    like = [torch.zeros(n, dtype=dtype) for n in GIVEN]
    sago.reference.synthesize_(forget, retain, "sago", out=like, **WEIGHTS)
    return like


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("wide", [None, FP32])
def test_a_given_pair_is_averaged_and_synthesized_bit_for_bit(ranks2, dtype, wide):
    for found in ranks2(given, dtype, accumulate_dtype=wide):
        assert_equal_bits(found, updates_of((0, 1), dtype, wide or dtype))


def test_ranks_of_the_group_of_ddp_alone_are_averaged(ranks4):
    first, second, third, fourth = ranks4(given, FP32, pairs=True)
    for found, ranks in ((first, (0, 1)), (second, (0, 1)), (third, (2, 3)), (fourth, (2, 3))):
        assert_equal_bits(found, updates_of(ranks, FP32, FP32))


class Branches(nn.Module):
    """Parameters of forget alone, of retain alone, of none, and of rows that may be on some ranks only."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.trunk, self.never = nn.Linear(3, 5), nn.Linear(5, 2)
            self.heads = nn.ModuleDict({"forget": nn.Linear(5, 2), "retain": nn.Linear(5, 2)})
            self.marked = nn.Linear(3, 5)
        self.double()

    def forward(self, x, marks, head):
        y = self.trunk(x)
        if marks.any():
            y = y + marks[:, None] * self.marked(x)
        return self.heads[head](torch.tanh(y))


def branched(rule, module, rank=0, world=1):
    """Some steps in which half of the rows are marked: with two ranks, those of the first."""
    buckets = sago.GradientBuckets(module)
    optimizer, reports = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for step in range(3):
        x = inputs.normal(2 * 8 * 3, 300 + step).view(2, 8, 3)
        marks = (torch.arange(8) < 4).double()
        x, marks = x.chunk(world, dim=1)[rank], marks.chunk(world)[rank]
        with buckets.forget():
            (-(module(x[0], marks, "forget") ** 2).mean()).backward()
        with buckets.retain():
            ((module(x[1], marks, "retain") - 1) ** 2).mean().backward()
        reports.append(fields(buckets.synthesize_(rule, **WEIGHTS)))
        inner = module.module if world > 1 else module
        there = {name for name, p in inner.named_parameters() if p.grad is not None}
        optimizer.step()
        buckets.zero_()
    return {name: p.detach().clone() for name, p in inner.named_parameters()}, reports, there


def branched_on_ranks(rules):
    ddp = [DistributedDataParallel(Branches(), find_unused_parameters=True) for _ in rules]
    return [branched(rule, module, *share()) for rule, module in zip(rules, ddp, strict=True)]


def test_parameters_that_are_not_reached_on_some_ranks_or_on_none(ranks2):
    """AdamW would decay the one that is never reached, if it had a gradient of zeros."""
    rules = "sago", "pcgrad", "blur"
    for results in ranks2(branched_on_ranks, rules):
        for rule, (found, reports, there) in zip(rules, results, strict=True):
            expected, right, there_on_one = branched(rule, Branches())
            assert there == there_on_one == expected.keys() - {"never.weight", "never.bias"}
            assert_equal_tensors(found, expected)
            for report, of_one in zip(reports, right, strict=True):
                assert_equal_reports(report, of_one)


def branched_without_search():
    return error_of(branched, "sago", DistributedDataParallel(Branches()), *share())


def test_a_parameter_that_is_not_reached_is_an_error_where_ddp_does_not_search(ranks2):
    for error, text in ranks2(branched_without_search):
        assert error is ValueError
        assert "find_unused_parameters=True" in text


def scaled_on_ranks():
    return scaled(replicated(), share())


def test_unscale_averages_first_so_that_all_ranks_skip_the_same_step(ranks2):
    assert_scaled(ranks2(scaled_on_ranks))


def refused():
    """Modules whose gradients the buckets cannot reduce as DDP would."""
    hooked = replicated()
    hooked.register_comm_hook(None, lambda state, bucket: bucket.get_future())
    yield error_of(sago.GradientBuckets, hooked)
    yield error_of(sago.GradientBuckets, replicated(static_graph=True))
    ddp = replicated()
    yield error_of(sago.GradientBuckets, [p for p in ddp.parameters() if p.ndim > 1])
    ddp = replicated()
    yield error_of(sago.GradientBuckets, [*ddp.parameters(), nn.Parameter(torch.ones(3))])
    with mock.patch("sago.capture.opening.flatten", side_effect=MemoryError):
        error_of(sago.GradientBuckets, ddp)
    yield ddp.require_backward_grad_sync  # as it was


def changed_later():
    """Captures after the module was given a communication hook or a static graph."""
    hook = lambda state, bucket: bucket.get_future()  # noqa: E731
    for change in (lambda ddp: ddp.register_comm_hook(None, hook), lambda ddp: ddp._set_static_graph()):
        ddp = replicated()
        buckets = sago.GradientBuckets(ddp)
        change(ddp)
        yield error_of(buckets.forget)


def test_a_hook_or_a_static_graph_that_is_set_later_is_refused(ranks2):
    for found in ranks2(listed, changed_later):
        for (error, text), expected in zip(found, ("communication hook", "static_graph"), strict=True):
            assert error is ValueError
            assert expected in text


def in_parts(on_ranks):
    """The update of a model of which two parts are wrapped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    if on_ranks:
        model[0], model[2] = DistributedDataParallel(model[0]), DistributedDataParallel(model[2])
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    buckets = sago.GradientBuckets(model)
    with buckets.forget():
        model(x[0]).square().mean().backward()
    with buckets.retain():
        model(x[1]).sin().mean().backward()
    buckets.synthesize_("pcgrad")
    return {f"{i}": p.grad for i, p in enumerate(model.parameters())}


def test_parts_that_are_wrapped_are_as_on_one_process(ranks2):
    for found in ranks2(in_parts, True):
        assert_equal_tensors(found, in_parts(False))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.first(x), self.second(x)


def one_output_each(on_ranks):
    """The update where each loss uses one output. DDP then has no gradient for the other part."""
    model, x = TwoOutputs(), torch.arange(12, dtype=torch.float64).view(4, 3) / 12
    if on_ranks:
        model = DistributedDataParallel(model, find_unused_parameters=True)
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    buckets = sago.GradientBuckets(model)
    with buckets.forget():
        model(x)[0].square().mean().backward()
    with buckets.retain():
        model(x)[1].sin().mean().backward()
    report = buckets.synthesize_("pcgrad")
    assert report.cos_forget_retain.isnan().all()  # no parameter has both gradients
    return {f"{i}": p.grad for i, p in enumerate(model.parameters())}


def test_outputs_that_a_loss_does_not_use(ranks2):
    for found in ranks2(one_output_each, True):
        assert_equal_tensors(found, one_output_each(False))


def other_groups():
    groups = None, dist.new_group([0, 1])
    parts = [DistributedDataParallel(nn.Linear(2, 2), process_group=group) for group in groups]
    return error_of(sago.GradientBuckets, nn.Sequential(*parts))


def test_parts_in_other_groups_are_refused(ranks2):
    for error, text in ranks2(other_groups):
        assert error is ValueError
        assert "the same process group" in text


def joined():
    """Captures while uneven inputs are allowed for, and when they no longer are."""
    ddp = replicated()
    buckets, found = sago.GradientBuckets(ddp), []
    with warnings.catch_warnings(), ddp.join():  # which changes the filters of warnings
        found += [error_of(buckets.forget), error_of(buckets.retain)]
    ddp.join(enable=False)
    return [*found, error_of(train, ddp, Run("sago"), share(), buckets)]


def test_uneven_inputs_are_refused(ranks2):
    """One rank alone in the average ends gloo's process, and waits for ever with NCCL."""
    for *found, after in ranks2(joined):
        for error, text in found:
            assert error is ValueError
            assert "join() of DistributedDataParallel should not be active" in text
        assert after is None


def state_of_join():
    """The private name that tells whether `join` is in force."""
    ddp, found = replicated(), []
    for enable in (True, False):
        ddp.join(enable=enable)
        found.append(ddp._join_config.enable)
    return found


def test_torch_keeps_the_state_of_join_where_it_is_looked_for(ranks2):
    assert ranks2(state_of_join) == [[True, False]] * 2


def in_backward():
    """The last retain capture and the synthesis in one, which would come ahead of the reduction."""
    ddp = replicated()
    buckets = sago.GradientBuckets(ddp)
    forget, _ = losses_of(ddp, Run("sago"), batches(0, 0, *share()))
    with buckets.forget():
        forget().backward()
    return error_of(buckets.synthesize_in_backward("sago").__enter__)


def test_a_synthesis_within_backward_is_refused(ranks2):
    for error, text in ranks2(in_backward):
        assert error is ValueError
        assert "on one rank" in text


def test_what_ddp_would_reduce_in_another_way_is_refused(ranks2):
    says = "communication hook", "static_graph", "left out", "as the others are"
    for *found, sync in ranks2(listed, refused):
        assert sync
        for (error, text), expected in zip(found, says, strict=True):
            assert error is ValueError
            assert expected in text


def captured_unevenly(retain_decay, at):
    """The last rank has one capture more of the side `at`, and the same gradient otherwise."""
    ddp = replicated()
    buckets, found = sago.GradientBuckets(ddp, accumulation="mean", retain_decay=retain_decay), []
    parameters = list(ddp.parameters())
    for uneven in (False, True):
        for side in ("forget", "retain"):
            for _ in range(1 + (uneven and side == at and dist.get_rank() == 1)):
                with getattr(buckets, side)():
                    backward(parameters, [torch.ones_like(p) for p in parameters])
        found.append(error_of(buckets.synthesize_, "sago"))
        if not uneven:
            buckets.zero_()
    return found


@pytest.mark.parametrize(("retain_decay", "at"), [(None, "forget"), (0.5, "retain")])
def test_a_mean_of_unequal_numbers_of_captures_is_an_error_on_every_rank(ranks2, retain_decay, at):
    for first, (error, text) in ranks2(captured_unevenly, retain_decay, at):
        assert first is None
        assert error is ValueError
        assert text.startswith(f"The number of {at} captures with accumulation='mean' should be the same")


def stepped_outside():
    """Steps with one loss outside of captures: with buckets, with DDP's own reduction, without buckets."""
    ddp = replicated()
    buckets, found = sago.GradientBuckets(ddp), []
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    window(ddp, buckets, Run("sago"), batches(0, 0))
    buckets.synthesize_("sago")
    found.append(error_of(optimizer.step))
    buckets.zero_()
    for reduced in (False, True, False):
        ddp.require_backward_grad_sync = reduced
        loss, *_ = losses_of(ddp, Run("sago"), batches(0, 0, *share()))
        loss().backward()
        sums = [p.grad.sum().item() for p in ddp.parameters()]
        found.append(error_of(optimizer.step))
        optimizer.zero_grad()
        if reduced:
            averaged = sums
            del buckets
    return [*found, averaged]


def test_a_step_with_gradients_that_nothing_averages_warns(ranks2):
    results = ranks2(stepped_outside)
    assert results[0][-1] == results[1][-1]
    for in_window, outside, reduced, without_buckets, _ in results:
        assert in_window is reduced is None
        for error, text in (outside, without_buckets):
            assert error is RuntimeWarning
            assert "a backward outside of captures. Only your own code" in text
