"""Lists of DTensors, and `SumOver` for shards that are plain tensors: as whole gradients on one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sago
from sago.distributed import SumOver
from tests.support import inputs, oracle, properties
from tests.support.collectives import Collectives, all_reduces
from tests.support.ranks import error_of
from tests.support.training import assert_equal_reports, fields, local, mesh_of, part, whole
from tests.support.windows import BF16, FP32, FP64, RULES, WEIGHTS

LAYOUTS = {"one dimension": {"shard": 2}, "two dimensions": {"replicate": 2, "shard": 2}}
FAMILIES = ("scale_1", "zeros", "one_element", "empty", "missing", "transposed", "tails", "around_a_block")


def placed(gradients, sizes):
    """The same gradients on a mesh of these sizes, each placed in another way; some are no DTensors."""
    mesh = mesh_of(**sizes)
    return [None if t is None else _placed(t, mesh, i) for i, t in enumerate(gradients)]


def _placed(t, mesh, i):
    if t.ndim == 0:
        return distribute_tensor(t, mesh, [Replicate()] * mesh.ndim)
    first, last = Shard(0), Shard(t.ndim - 1)
    if mesh.ndim == 1:
        ways = [first], [last], [Replicate()], None
    else:
        ways = (
            [Replicate(), first],
            [first, last],
            [last, Replicate()],
            [first, first],
            [Replicate()] * 2,
            None,
        )
    way = ways[i % len(ways)]
    if way is not None:
        return distribute_tensor(t, mesh, way)
    # What FSDP2 makes of parameters that tensor parallelism leaves alone: on a part of the mesh.
    return t.clone() if mesh.ndim == 1 or i % 2 else distribute_tensor(t, mesh["shard"], [first])


def synthesized(sizes, forget, retain, rule, form="synthesize_", **options):
    """The updates, whole, and the report."""
    forget, retain = placed(forget, sizes), placed(retain, sizes)
    if form == "synthesize":
        updates, report = sago.synthesize(forget, retain, rule, **options)
    elif form == "forget":
        updates, report = forget, sago.synthesize_(forget, retain, rule, out="forget", **options)
    elif form == "plan":
        updates, weights = retain, {name: options.pop(name) for name in ("gamma", "alpha")}
        report = sago.Plan(forget, retain, rule, **options).synthesize_(**weights)
    else:
        like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
        updates = [None if t is None else torch.empty_like(t) for t in like]
        report = sago.synthesize_(forget, retain, rule, out=updates, **options)
    for u, f, r in zip(updates, forget, retain, strict=True):
        assert isinstance(u, DTensor) == isinstance(r if f is None else f, DTensor)
    return [None if u is None else whole(u) for u in updates], report_of(report)


def report_of(report):
    """What a report is made of: it cannot be sent as it is. None without statistics."""
    if report.conflict_fraction is None:
        return None
    columns = {name: getattr(report, name) for name in (*properties.FIELDS, *properties.COUNTS)}
    columns["conflicts"] = report.conflict_fraction * report.numel
    return {"groups": report.groups, "numel": report.numel, "columns": columns}


class OnRanks:
    """`run` of `tests.support.properties`: all ranks return the same bits."""

    def __init__(self, ranks, layout, form="synthesize_"):
        self.ranks, self.sizes, self.form = ranks, LAYOUTS[layout], form

    def __call__(self, forget, retain, rule, **options):
        found = self.ranks(synthesized, self.sizes, forget, retain, rule, self.form, **options)
        (updates, report), *others = found
        for others_updates, others_report in others:
            properties.assert_equal_bits(others_updates, updates)
            assert (others_report is None) == (report is None)
            if report is not None:
                assert others_report["groups"] == report["groups"]
                assert torch.equal(others_report["numel"], report["numel"])
                for name, column in report["columns"].items():
                    properties.assert_equal_bits([others_report["columns"][name]], [column])
        if report is not None:
            columns = report["columns"]
            report = sago.SynthesisReport(rule, report["groups"], report["numel"], lambda: columns)
        return updates, report


@pytest.fixture(params=LAYOUTS)
def run(request):
    world = 2 if request.param == "one dimension" else 4
    return OnRanks(request.getfixturevalue(f"ranks{world}"), request.param)


def assert_right(run, forget, retain, rule, **options):
    if sago.rules.resolve(rule).scope == "element":
        properties.assert_as_reference(run, forget, retain, rule, **options)
    else:
        properties.assert_as_oracle(run, forget, retain, rule, **options)
    if options.get("stats", True):
        _, report = run(forget, retain, rule, **options)
        properties.assert_report(report, forget, retain, rule, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_and_reports_are_those_of_whole_gradients(run, family):
    """Rules and dtypes take turns."""
    for i, rule in enumerate(RULES):
        dtype = (FP64, FP32, BF16)[(i + FAMILIES.index(family)) % 3]
        forget, retain = inputs.FAMILIES[family](dtype, dtype)
        assert_right(run, forget, retain, rule, **WEIGHTS)


@pytest.mark.parametrize("form", ["synthesize", "forget", "plan"])
def test_every_way_to_synthesize(run, form):
    run.form = form
    for rule in ("sago", "pcgrad", "blur"):
        assert_right(run, *inputs.FAMILIES["tails"](FP32, FP32), rule, **WEIGHTS)


def test_groups_and_no_statistics(run):
    forget, retain = inputs.FAMILIES["tails"](FP64, FP64)
    groups = [("even", "odd")[i % 2] for i in range(len(forget))]
    for rule in RULES:
        assert_right(run, forget, retain, rule, groups=groups, **WEIGHTS)
        assert_right(run, forget, retain, rule, stats=False, **WEIGHTS)


def again(sizes):
    """Other gradients in the same memory: lists that were seen before are not checked again."""
    found = []
    forget, retain = (placed([torch.zeros(33, dtype=FP64), torch.zeros(8, dtype=FP64)], sizes) for _ in "fr")
    plan = sago.Plan(forget, retain, "pcgrad_global")
    for step in range(3):
        for t, value in zip((*forget, *retain), drawn(step), strict=True):
            t.copy_(placed([value], sizes)[0] if isinstance(t, DTensor) else value)
        report = plan.synthesize_() if step == 2 else sago.synthesize_(forget, retain, "pcgrad_global")
        found.append(([whole(t) for t in retain], fields(report)))
    return found


def drawn(step):
    pairs = [inputs.pair(n, 10 * step + n) for n in (33, 8)]
    return [f for f, _ in pairs] + [r for _, r in pairs]


def test_lists_that_were_seen_before(ranks2):
    for results in ranks2(again, {"shard": 2}):
        for step, (updates, report) in enumerate(results):
            forget, retain = drawn(step)[:2], drawn(step)[2:]
            right = sago.synthesize_(forget, retain, "pcgrad_global")
            properties.assert_near(updates, retain, 16 * oracle.SUM_ERROR[FP64])
            assert_equal_reports(report, fields(right))


def counted(sizes):
    forget, retain = (placed(side, sizes) for side in inputs.FAMILIES["tails"](FP64, FP64))
    found = []
    for rule, options in CALLS:
        for _ in range(2):  # the first call compares what the ranks have
            with Collectives() as calls:
                report = sago.synthesize_(forget, retain, rule, **options)
                report.to_dict()
        found.append(all_reduces(calls.found))
    with Collectives() as calls:
        plan = sago.Plan(forget, retain, "pcgrad")
        plan.synthesize_()
        plan.synthesize_()
    return found, all_reduces(calls.found)


CALLS = (
    ("pcgrad", {}),
    ("blur", {"stats": False}),
    ("sago", {}),
    ("sago", {"stats": False}),
    ("sum", {"stats": False}),
)


def test_one_all_reduce_a_call_or_none(run):
    for found, planned in run.ranks(counted, run.sizes):
        assert [len(sizes) for sizes in found] == [1, 1, 1, 0, 0]
        assert len(planned) == 2
        assert max(planned) <= 9 * len(inputs.TAILS)


def first_without_statistics(sizes):
    """An elementwise rule on lists that no rank has seen."""
    forget, retain = (placed(side, sizes) for side in inputs.FAMILIES["around_a_block"](FP64, FP64))
    with Collectives() as calls:
        sago.synthesize_(forget, retain, "sago", stats=False)
    return calls.found


def test_ranks_that_have_nothing_to_say_are_silent(run):
    assert not any(run.ranks(first_without_statistics, run.sizes))


def all_replicated(sizes):
    """DTensors that every rank holds whole, beside a plain tensor."""
    mesh = mesh_of(**sizes)
    forget, retain = inputs.FAMILIES["tails"](FP64, FP64)
    for side in (forget, retain):
        side[1:] = [distribute_tensor(t, mesh, [Replicate()] * mesh.ndim) for t in side[1:]]
    with Collectives() as calls:
        report = sago.synthesize_(forget, retain, "pcgrad_global", **WEIGHTS)
    return calls.found, [whole(t) for t in retain], fields(report)


def test_gradients_that_are_whole_on_every_rank_need_no_sum(run):
    forget, retain = inputs.FAMILIES["tails"](FP64, FP64)
    right = fields(sago.synthesize_(forget, retain, "pcgrad_global", **WEIGHTS))
    for calls, updates, report in run.ranks(all_replicated, run.sizes):
        assert calls == []
        properties.assert_equal_bits(updates, retain)
        assert_equal_reports(report, right)


def by_a_sum_of_ones_own(sizes):
    """`reduce_gram` in the place of the sum that DTensors bring."""
    forget, retain = (placed(side, sizes)[:3:2] for side in inputs.FAMILIES["tails"](FP64, FP64))
    tables = []
    with Collectives() as calls:
        report = sago.synthesize_(forget, retain, "pcgrad", reduce_gram=tables.append)
    return calls.found, len(tables), fields(report), [local(f).square().sum().item() for f in forget]


def test_a_sum_of_ones_own_replaces_the_one_of_dtensors(run):
    for calls, tables, report, ff in run.ranks(by_a_sum_of_ones_own, run.sizes):
        assert calls == []
        assert tables == 1
        assert report["ff"].tolist() == pytest.approx(ff, rel=oracle.rounding_error(2 * 33, FP64))


SHARDS = {
    "the default group": lambda: SumOver(),
    "None": lambda: SumOver(None),
    "a group": lambda: SumOver(dist.group.WORLD),
    "a mesh": lambda: SumOver(mesh_of(replicate=2, shard=2)),
    "one dimension after the other": lambda: SumOver(*(mesh_of(replicate=2, shard=2)[d] for d in DIMS)),
    "both dimensions": lambda: SumOver(mesh_of(replicate=2, shard=2)[DIMS]),
    "shards and replicas": lambda: SumOver(mesh_of(replicate=2, shard=2)["shard"]),
}
DIMS = ("replicate", "shard")


def flat_shards(over):
    """Plain tensors, a piece of each on every rank; or on every rank of one dimension of the mesh."""
    mesh, rank, world = mesh_of(replicate=2, shard=2), dist.get_rank(), 4
    if over == "shards and replicas":
        rank, world = mesh.get_local_rank("shard"), 2
    found = []
    again = [*RULES, *RULES]  # the first time the shapes of the tables are compared, too
    for i, rule in enumerate(again):
        forget, retain = (
            [torch.tensor_split(t, world)[rank].clone() for t in side]
            for side in inputs.FAMILIES["tails"](FP64, FP64)
        )
        with Collectives() as calls:
            report = sago.synthesize_(forget, retain, rule, reduce_gram=SHARDS[over](), **WEIGHTS)
        if i >= len(RULES):
            found.append((rule, retain, fields(report), len(all_reduces(calls.found))))
    return found


@pytest.mark.parametrize("over", SHARDS)
def test_sum_over(ranks4, over):
    found = ranks4(flat_shards, over)
    calls = 2 if over == "one dimension after the other" else 1
    world = 2 if over == "shards and replicas" else 4
    for results in zip(*found, strict=True):
        rule = results[0][0]
        forget, retain = inputs.FAMILIES["tails"](FP64, FP64)
        right = fields(sago.synthesize_(forget, retain, rule, **WEIGHTS))
        for _, _, report, count in results:
            assert count == calls
            assert_equal_reports(report, right)
            assert all(torch.equal(report[name], results[0][2][name]) for name in ("ff", "fr", "rr", "uu"))
        for i, expected in enumerate(retain):
            update = torch.cat([results[rank][1][i] for rank in range(world)])
            properties.assert_near([update], [expected], 16 * oracle.SUM_ERROR[FP64])


def wrong_sums():
    """What a sum over one dimension of two, or over none, makes of the same shards."""
    found = []
    for over in (SumOver(mesh_of(replicate=2, shard=2)["shard"]), None):
        forget, retain = (
            [torch.tensor_split(t, 4)[dist.get_rank()].clone() for t in side]
            for side in inputs.FAMILIES["tails"](FP64, FP64)
        )
        found.append(fields(sago.synthesize_(forget, retain, "pcgrad", reduce_gram=over, **WEIGHTS)))
    return found


def test_sums_over_too_few_ranks_are_noticed(ranks4):
    right = fields(sago.synthesize_(*inputs.FAMILIES["tails"](FP64, FP64), "pcgrad", **WEIGHTS))
    for reports in ranks4(wrong_sums):
        for report in reports:
            with pytest.raises(AssertionError, match="not close"):
                assert_equal_reports({**report, "numel": right["numel"]}, right)


def test_sum_over_without_ranks():
    with pytest.raises(ValueError, match="should be initialised"):
        SumOver()


def sums_over(*wrong):
    return [error_of(SumOver, over) for over in wrong]


def test_sum_over_what_is_no_group(ranks2):
    for errors in ranks2(sums_over, "shard", 1, [0, 1]):
        assert [error for error, _ in errors] == [TypeError] * 3
        assert all("process groups, meshes or None. Found" in text for _, text in errors)


def parts_of(sizes):
    return [
        None if t is None else part(t) for t in placed(list(inputs.FAMILIES["tails"](FP64, FP64)[0]), sizes)
    ]


def test_the_layouts_have_shards_replicas_and_plain_tensors(run):
    """So that what is counted once and what is added up is told apart above."""
    found = run.ranks(parts_of, run.sizes)
    kinds = {tuple(name for name, _ in held) for held in found[0]}
    expected = {(), ("shard",)} if len(run.sizes) == 1 else {(), ("shard",), ("replicate",), DIMS}
    assert kinds == expected
