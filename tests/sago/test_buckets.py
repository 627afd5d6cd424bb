"""`GradientBuckets.synthesize_` with its options, and the plans behind it.

Gradients are given to leaves as they are. What an update should be says the reference, or the oracle with its
slack. Captures are the business of `test_extraction`.
"""

import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sago
from sago.core.pipeline import Pipeline
from tests.support import inputs, oracle, properties
from tests.support.backends import DTYPES, ELEMENTWISE, GLOBAL, Backend
from tests.support.windows import (
    ALONE,
    ANY,
    BF16,
    DROPPED,
    FP16,
    FP32,
    FP64,
    GATED,
    INF,
    NAN,
    NORMALIZED,
    RULES,
    WEIGHTS,
    assert_clipped,
    assert_equal_results,
    averaged,
    bucketed,
    clipped,
    fresh,
    grads,
    mean,
    rule_name,
    small,
    thin,
    window,
    with_nan,
)


@pytest.mark.parametrize("rule", RULES)
def test_max_norm_clips_as_torch_does_afterwards(backend, rule):
    for dtype, family in zip(DTYPES, ("missing", "scale_1", "transposed", "scale_1"), strict=True):
        forget, retain = small(dtype, family)
        found = bucketed(backend, forget, retain, rule, max_norm=0.5, **WEIGHTS)
        assert_clipped(found, forget, retain, rule, 0.5, **WEIGHTS)


@pytest.mark.parametrize("rule", ["ties", "mudman", "cautious"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_rules_with_a_gate_of_their_own(backend, rule, max_norm):
    """Small parameters in one buffer, whose gaps hold zeros, which are elements of no class."""
    for scope in ("tensor", "global"):
        found = sago.rules.resolve(rule)
        found = dataclasses.replace(found, scope=scope) if found.by_class else found
        forget, retain = small(FP32, "scale_1")
        expected, report = sago.reference.synthesize(forget, retain, found, **WEIGHTS)
        factor = 1.0
        if max_norm is not None:
            norm = torch.stack([u.double().norm() for u in expected]).norm()
            factor = min(1.0, max_norm / (norm.item() + 1e-6))
        updates, seen = bucketed(backend, forget, retain, found, max_norm=max_norm, **WEIGHTS)
        # The clip has half of the error of a sum, 1e-6, and the update some roundings of fp32. A sum of three
        # classes has 1e-6 of the size of each class.
        for u, e in zip(updates, expected, strict=True):
            torch.testing.assert_close(u, factor * e, rtol=4e-6, atol=1e-12)
        torch.testing.assert_close(seen.uu, report.uu, rtol=4e-6, atol=1e-12)


def test_a_gate_compares_gradients_of_one_scale():
    forget, retain = small(FP32, "scale_1")
    with pytest.raises(ValueError, match=r"only reads signs.*by 2 .forget. and 1 .retain.*'ties'"):
        averaged(ANY, forget, retain, "ties", (2, 1), **WEIGHTS)
    averaged(ANY, forget, retain, "ties", (2, 2), **WEIGHTS)


@pytest.mark.parametrize("rule", [*RULES, GATED], ids=rule_name)
def test_a_norm_below_max_norm_changes_no_bit(backend, rule):
    families = "scale_1", "zeros", "signed_zeros", "scale_1"
    for dtype, family, max_norm in thin(backend, zip(DTYPES, families, (1000, INF) * 2, strict=True), rule):
        forget, retain = small(dtype, family)
        found = bucketed(backend, forget, retain, rule, max_norm=max_norm, **WEIGHTS)
        assert_equal_results(found, bucketed(backend, forget, retain, rule, **WEIGHTS))


def test_max_norm_of_zero_leaves_nothing_and_a_norm_of_zero_is_not_divided_by(backend):
    for rule in (*RULES, GATED):
        updates, report = bucketed(backend, *small(), rule, max_norm=0)
        assert not any(u.any() for u in updates)
        assert report.total_norm > 1.0
    updates, report = bucketed(backend, [torch.zeros(20)], [torch.zeros(20)], "pcgrad", max_norm=1.0)
    assert not updates[0].any()
    assert report.total_norm == 0.0


@pytest.mark.parametrize("max_norm", [-1.0, -INF, NAN, "1", torch.tensor(1.0), 1j, [1.0]], ids=str)
def test_a_max_norm_that_cannot_be_leaves_everything_as_it_was(max_norm):
    assert_refused({"max_norm": max_norm}, ValueError if isinstance(max_norm, float) else TypeError)


@pytest.mark.parametrize("nonfinite", ["zero", "Propagate", "", None, True], ids=str)
def test_a_policy_that_is_not_known_leaves_everything_as_it_was(nonfinite):
    assert_refused({"nonfinite": nonfinite}, ValueError)


def assert_refused(options, error):
    params, buckets = fresh(ANY, *small())
    window(buckets, params, *small())
    with pytest.raises(error, match=f"`{next(iter(options))}` should be"):
        buckets.synthesize_("sago", **options)
    assert grads(params) == [None, None]
    assert_equal_results((buckets.synthesize_("sago"), grads(params))[::-1], bucketed(ANY, *small(), "sago"))


@pytest.mark.parametrize("rule", [GATED, NORMALIZED], ids=rule_name)
def test_max_norm_with_rules_of_ones_own(backend, rule):
    """One takes products and has a branch for conflicts: its norm is that of both branches."""
    for dtype, stats in ((FP32, True), (FP64, False), (BF16, False)):
        forget, retain = small(dtype)
        expected, norm = clipped(forget, retain, rule, 0.5, **WEIGHTS)
        updates, report = bucketed(backend, forget, retain, rule, max_norm=0.5, stats=stats, **WEIGHTS)
        # A coefficient is a quotient of sums and is divided by the norm, which is one of three sums. Each is
        # off by `SUM_ERROR` of its magnitudes, fr and the norm's by more of themselves.
        error = 16 * oracle.SUM_ERROR[FP64 if dtype == FP64 else FP32]
        assert report.total_norm.item() == pytest.approx(norm, rel=error)
        properties.assert_near(updates, expected, error)


def test_max_norm_with_weights_on_the_device_and_weights_of_zero(backend):
    forget, retain = small()
    cases = itertools.cycle(((0.0, 1.0), (0.5, 0.0), (-0.5, 2.0)))
    for rule, (gamma, alpha) in zip(RULES, cases, strict=False):
        weights = {"gamma": gamma, "alpha": alpha}
        by_floats = bucketed(backend, forget, retain, rule, max_norm=0.5, **weights)
        assert_clipped(by_floats, forget, retain, rule, 0.5, **weights)
        weights = {name: torch.tensor(w, device=backend.device) for name, w in weights.items()}
        found = bucketed(backend, forget, retain, rule, max_norm=0.5, **weights)
        for weight in weights.values():
            weight.fill_(3.0)  # what the next step might do, before the report is read
        assert_equal_results(found, by_floats)


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global", "blur"])
def test_max_norm_is_over_all_groups_dtypes_and_buffers(backend, rule):
    groups, dtypes = ["b", "a", "b", "c"], (BF16, FP32, FP16, BF16)
    forget = [inputs.normal(20 + i, i).to(d) for i, d in enumerate(dtypes)]
    retain = [inputs.normal(20 + i, 9 + i).to(d) for i, d in enumerate(dtypes)]
    made = {"groups": groups, **ALONE}
    found = bucketed(backend, forget, retain, rule, made, max_norm=0.5, **WEIGHTS)
    assert found[1].groups == ("b", "a", "c")
    assert_clipped(found, forget, retain, rule, 0.5, groups=groups, **WEIGHTS)
    properties.assert_report(found[1], forget, retain, rule, groups=groups, **WEIGHTS)


def test_max_norm_clips_ahead_of_the_rounding(backend):
    """gamma*f + alpha*r leaves the range of fp16, the clipped update does not; torch would make it 0."""
    f = torch.full((16,), 15 * 2.0**12, dtype=FP16)  # its square has 8 bits, so that all sums are exact
    (update,), report = bucketed(backend, [f], [f], "sum", max_norm=1.0)
    assert report.total_norm.item() == 2 * 15 * 2.0**12 * 4
    assert (update == 0.25).all()


@pytest.mark.parametrize("stats", [True, False])
def test_a_norm_out_of_range_makes_the_whole_update_nan(backend, stats):
    """Squares leave the range of fp64: seen, never hidden, be it by coefficients known to be 0."""
    for rule, weights, f, r in (
        *((rule, {}, [1e200, 1e200], [1e200, 1e200]) for rule in RULES),
        ("sum", {"alpha": 0.0}, [1e200, 1.0], [1.0, 1.0]),
        ("sago", {"gamma": 0.0}, [-1.0, 1.0], [1e200, 1.0]),
        (DROPPED, {}, [1e200, 1.0], [1e200, -1.0]),
    ):
        forget, retain = ([torch.tensor(side, dtype=FP64), torch.ones(3)] for side in (f, r))
        updates, report = bucketed(backend, forget, retain, rule, max_norm=1.0, stats=stats, **weights)
        assert not report.total_norm.isfinite()
        assert all(u.isnan().all() for u in updates), rule


def test_stats_have_no_say_in_the_update(backend):
    """Retain is switched off; that its squares leave the range of the sums is no matter."""
    f, r = torch.ones(9), torch.full((9,), 1e30)
    for rule in ("sum", "sago"):
        options = {"alpha": 0.0, "max_norm": 1.5}
        found, expected = (
            bucketed(backend, [f], [r], rule, stats=stats, **options)[0] for stats in (False, True)
        )
        properties.assert_equal_bits(found, expected)
        assert not found[0].isnan().any()


def test_inf_makes_the_whole_clipped_update_nan(backend):
    """As clip_grad_norm_ would of an update with NaN in it, whatever the rule leaves out."""
    f, r = torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([3.0, -1.0, 2.0])
    for rule, weights, side, at in (
        *(("sago", {}, side, at) for side in (0, 1) for at in (0, 1, 2)),
        ("sago", {"gamma": 0.0}, 0, 2),
        ("sum", {"gamma": 0.0}, 0, 0),
        ("sum", {"alpha": 0.0}, 1, 0),
        ("pcgrad", {"gamma": 0.0}, 0, 0),
        (DROPPED, {}, 1, 0),
    ):
        both = [f.clone(), f], [r.clone(), r]
        both[side][0][at] *= INF
        for stats in (True, False):
            updates, report = bucketed(backend, *both, rule, max_norm=1.0, stats=stats, **weights)
            assert all(u.isnan().all() for u in updates), (rule, weights, side, at)
            assert not report.total_norm.isfinite()


class Called(TorchDispatchMode):
    """The names of the ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad", "blur", GATED], ids=rule_name)
def test_no_option_costs_another_pass_or_waits_for_the_device(device, rule, monkeypatch):
    """A gram where something has to be known ahead of the update, else none; always one combine."""
    from tests.kernels.test_launches import count_launches

    launches = count_launches(monkeypatch)
    forget, retain = small(BF16)
    weights = {name: torch.tensor(w, device=device) for name, w in WEIGHTS.items()}
    by_products = int(sago.rules.resolve(rule).scope != "element")
    for options, accumulation, grams in (
        ({}, "mean", by_products),
        ({"max_norm": 1.0}, "sum", 1),
        ({"max_norm": 1.0, "stats": False}, "mean", 1),
        ({"nonfinite": "zero_update"}, "sum", 1),
        ({"nonfinite": "zero_update", "max_norm": 1.0}, "mean", 1),
    ):
        params, buckets = fresh(Backend("triton", device), forget, retain, accumulation=accumulation)
        window(buckets, params, forget, retain)
        with Called() as called:
            found = launches(lambda b=buckets, o=options: b.synthesize_(rule, **weights, **o))
        assert found == (grams, 1)
        assert called.names
        assert not called.names & {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique2"}


@pytest.mark.parametrize("rule", [*RULES, DROPPED], ids=rule_name)
def test_nan_and_inf_propagate_and_nothing_else_changes(backend, rule):
    """Bit for bit, rules of inner products too: theirs are NaN, or switched off by a weight of 0."""
    for dtype, weights in zip(DTYPES, ((0.75, 1.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)), strict=True):
        forget, retain = small(dtype, "specials")
        expected, _ = sago.reference.synthesize(forget, retain, rule, *weights)
        options = {"gamma": weights[0], "alpha": weights[1], "stats": dtype.itemsize > 2}
        found, report = bucketed(backend, forget, retain, rule, **options)
        properties.assert_equal_bits(found, with_nan(expected, forget, retain))
        if options["stats"]:
            sums = oracle.expect(forget, retain, "sum").sums
            for field in properties.COUNTS:
                assert getattr(report, field).tolist() == sums[field].tolist()


@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad"])
def test_bad_elements_anywhere_in_a_tensor_and_beside_a_missing_gradient(backend, rule):
    """First, in the last whole vector, in the tail behind it; what is in one tensor stays there."""
    for dtype in (BF16, FP64):
        forget, retain = ([t.to(dtype) for _ in range(6)] for t in inputs.pair(33))
        retain[3] = None
        for side, i, at, bad in (
            (forget, 0, 0, NAN),
            (retain, 1, 31, INF),
            (retain, 2, 32, NAN),
            (forget, 3, 5, -INF),
        ):
            side[i] = side[i].clone()
            side[i][at] = bad
        expected = with_nan(sago.reference.synthesize(forget, retain, rule)[0], forget, retain)
        found, _ = bucketed(backend, forget, retain, rule)
        assert all(torch.equal(u.isnan(), right.isnan()) for u, right in zip(found, expected, strict=True))
        if rule in ELEMENTWISE:
            properties.assert_equal_bits(found, expected)
        else:
            properties.assert_equal_bits(found[4:], bucketed(backend, forget[4:], retain[4:], rule)[0])


@pytest.mark.parametrize("rule", [*RULES, GATED, DROPPED], ids=rule_name)
def test_zero_update_is_all_or_nothing(backend, rule):
    """One bad element of one tensor, be it one that the rule leaves out; never just where it is."""
    cases = ((0, 1, NAN, WEIGHTS), (1, 0, INF, {}), (0, 3, -INF, {"gamma": 0.0}), (1, 3, NAN, {"alpha": 0.0}))
    for dtype, (side, i, bad, weights) in thin(backend, zip(DTYPES, cases, strict=True), rule):
        both = small(dtype, "missing")
        if dtype == FP32:
            weights = {"max_norm": 0.5, **weights}
        options = {"nonfinite": "zero_update", **weights}
        expected = bucketed(backend, *both, rule, **weights)
        assert_equal_results(bucketed(backend, *both, rule, **options), expected)
        both[side][i][-1] = bad
        updates, report = bucketed(backend, *both, rule, stats=False, **options)
        properties.assert_equal_bits(updates, [u if u is None else torch.zeros_like(u) for u in expected[0]])
        assert [int(getattr(report, field).sum()) for field in properties.COUNTS] == [1 - side, side]


def test_zero_update_where_finite_gradients_give_no_finite_update(backend):
    """A weight, a product or the norm is not finite, or an element on another rank is not."""

    def reduce_gram(table):
        table[:, 5] += 1
        return table

    for rule, scale, options, count in (
        ("sum", 1.0, {"gamma": INF}, 0),
        ("sago", 1.0, {"alpha": torch.tensor(NAN, device=backend.device)}, 0),
        ("pcgrad", 1e200, {}, 0),
        ("sago", 1e200, {"max_norm": 1.0}, 0),
        ("sago", 1.0, {"reduce_gram": reduce_gram}, 1),
    ):
        gradients = [torch.full((20,), scale, dtype=FP64), torch.ones(20, dtype=FP64)]
        updates, report = bucketed(backend, gradients, gradients, rule, nonfinite="zero_update", **options)
        properties.assert_equal_bits(updates, [torch.zeros(20, dtype=FP64)] * 2)
        assert not report.nonfinite_forget.any()
        assert report.nonfinite_retain.tolist() == [count, count]


def test_options_where_the_arithmetic_is_compiled():
    """Graphs of torch.compile, which could take x - x for 0."""
    f, r = (t.float().to(BF16) for t in inputs.pair(40000))
    found = bucketed(ANY, [f], [r], max_norm=0.5, **WEIGHTS)
    assert_clipped(found, [f], [r], "sago", 0.5, **WEIGHTS)
    f[::5], r[1::5], f[-1] = INF, NAN, -INF
    expected, _ = sago.reference.synthesize([f], [r], **WEIGHTS)
    updates, _ = bucketed(ANY, [f], [r], stats=False, **WEIGHTS)
    properties.assert_equal_bits(updates, with_nan(expected, [f], [r]))


def test_a_window_of_nan_leaves_nothing_in_the_next(backend):
    """Not even between the parameters, where buffers that are synthesized whole have gaps."""
    forget, retain = small()
    params, buckets = fresh(backend, forget, retain)
    for rule, stats in (("sum", False), ("blur", True), ("pcgrad", True), ("sago", False), ("blur", False)):
        options = {"stats": stats, **WEIGHTS}
        window(buckets, params, [t * NAN for t in forget], retain)
        buckets.synthesize_(rule, **options)
        assert all(p.grad.isnan().all() for p in params)
        buckets.zero_()
        window(buckets, params, forget, retain)
        report = buckets.synthesize_(rule, **options)
        assert_equal_results((grads(params), report), bucketed(backend, forget, retain, rule, **options))
        properties.assert_updates(grads(params), forget, retain, rule, **WEIGHTS)
        if rule in ELEMENTWISE:
            expected, _ = sago.reference.synthesize(forget, retain, rule, **WEIGHTS)
            properties.assert_equal_bits(grads(params), expected)
        buckets.zero_()


@pytest.mark.parametrize("rule", [*RULES, GATED, NORMALIZED], ids=rule_name)
def test_the_mean_over_a_power_of_two_changes_no_bit(backend, rule):
    """The factor is in the coefficients, and rounds nothing there."""
    cases = (
        (BF16, (2, 1), {}),
        (FP16, (1, 4), {"max_norm": 0.5}),
        (FP32, (4, 2), {"nonfinite": "zero_update"}),
        (FP64, (2, 8), {"eps": 2.0}),
    )
    for dtype, counts, options in thin(backend, cases, rule):
        forget, retain = small(dtype)
        means = mean(forget, counts[0]), mean(retain, counts[1])
        found = averaged(backend, forget, retain, rule, counts, **WEIGHTS, **options)
        assert_equal_results(found, bucketed(backend, *means, rule, **WEIGHTS, **options))
        if rule in ELEMENTWISE and not options:
            expected, _ = sago.reference.synthesize(*means, rule, **WEIGHTS)
            properties.assert_equal_bits(found[0], expected)


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_over_any_count_is_right_but_for_a_rounding(backend, rule):
    for dtype, wide, counts in ((BF16, FP32, (3, 1)), (FP32, FP32, (5, 6)), (FP64, FP64, (1, 3))):
        forget, retain = small(dtype, "missing")
        updates, report = averaged(backend, forget, retain, rule, counts, **WEIGHTS)
        means = [mean(side, count, wide) for side, count in zip((forget, retain), counts, strict=True)]
        expected = oracle.expect(*means, rule, **WEIGHTS)
        for found, right, slack in zip(updates, expected.updates, expected.slack, strict=True):
            assert (found is None) == (right is None)
            if found is not None:  # twice the slack: the mean rounds here, and its factor there
                properties.assert_between(found, right, 2 * slack)
        properties.assert_report(report, *means, rule, **WEIGHTS)


def test_the_mean_with_a_rule_that_is_homogeneous_in_neither_gradient(backend):
    """The sum over captures would weigh a side by how often it was captured."""
    forget, retain = small(FP64)
    for counts in ((3, 1), (2, 5)):
        means = [mean(side, count) for side, count in zip((forget, retain), counts, strict=True)]
        expected, _ = sago.reference.synthesize(*means, NORMALIZED, **WEIGHTS)
        found, _ = averaged(backend, forget, retain, NORMALIZED, counts, **WEIGHTS)
        # A mean, roots, quotients and products, each off by `SUM_ERROR` at most.
        properties.assert_near(found, expected, 16 * oracle.SUM_ERROR[FP64])
        summed, _ = averaged(backend, forget, retain, NORMALIZED, counts, "sum", **WEIGHTS)
        assert not torch.allclose(summed[0], expected[0], rtol=0.1)


@pytest.fixture
def plans(monkeypatch):
    """Weak references to all plans that buckets make."""
    made = []

    class Counted(Pipeline):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr("sago.capture.pipelines.Pipeline", Counted)
    return made


def test_a_plan_serves_every_window_with_the_same_gradients_missing(plans):
    forget, retain = small(family="missing")
    params, buckets = fresh(ANY, forget, retain)

    def made(rule="sago", side=forget, **options):
        window(buckets, params, side, retain)
        before = len(plans)
        report = buckets.synthesize_(rule, **options)
        new = len(plans) - before
        assert_equal_results((grads(params), report), bucketed(ANY, side, retain, rule, **options))
        buckets.zero_()
        return new

    assert made() == 1
    for options in ({}, WEIGHTS, {"max_norm": 0.5}, {"nonfinite": "zero_update"}, {"stats": False}):
        assert made(**options) == 0
    # Other rules have other rows only if one is for all tensors.
    assert [made(rule) for rule in ("pcgrad", "blur", "sum", "pcgrad_global")] == [0, 1, 0, 0]
    reached = [forget[1], *forget[1:]]
    assert [made(side=side) for side in (reached, forget, reached)] == [1, 0, 0]


def test_groups_have_one_plan_for_all_rules_and_in_backward_one_a_buffer(plans):
    params, buckets = fresh(ANY, *small(), groups=["a", "b"], **ALONE)
    for rule in RULES:
        window(buckets, params, *small())
        assert buckets.synthesize_(rule).groups == ("a", "b")
        buckets.zero_()
    assert len(plans) == 1
    for rule in ("sago", "pcgrad", "sago"):
        window(buckets, params, *small(), {"rule": rule})
        buckets.zero_()
    assert len(plans) == 1 + 2


def test_the_number_of_plans_kept_is_bounded(plans):
    """Of 2^5 patterns of missing gradients the last ones; with the buckets all of them go."""
    params, buckets = fresh(Backend("reference", "cpu"), [torch.ones(3)] * 5, [None] * 5)
    patterns = [p for p in itertools.product((True, False), repeat=5) if any(p)]
    for pattern in [*patterns, patterns[-1]]:
        side = [torch.ones(3) if there else None for there in pattern]
        window(buckets, params, side, side)
        buckets.synthesize_("sum")
        assert [p.grad is not None for p in params] == list(pattern)
        buckets.zero_()
    assert len(plans) == len(patterns)
    gc.collect()
    alive = [plan() is not None for plan in plans]
    assert alive[-1]
    assert sum(alive) <= 16 < len(patterns)
    assert alive == sorted(alive)  # the oldest went first
    del buckets
    gc.collect()
    assert not any(plan() for plan in plans)


def test_reports_are_keyed_by_names_by_positions_or_by_groups():
    """Frozen parameters and those given twice have a position, though no row."""
    a, b, frozen = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True), torch.zeros(5)
    module = torch.nn.ParameterDict({"x": a, "f": torch.nn.Parameter(frozen, False), "y": b})
    a, b = module["x"], module["y"]
    ones = [torch.ones(2), torch.ones(3)]
    for params, groups, keys in (
        (module, None, ("x", "y")),
        (list(module.named_parameters()), None, ("x", "y")),
        ([frozen, a, a, b], None, (1, 3)),
        ([frozen, a, a, b], ["w", "x", "y", ("z", 1)], ("x", ("z", 1))),
        ([frozen, a, a, b], [0, 7, 1, 7], (7,)),
    ):
        for rule in ("sago", "pcgrad", "blur"):
            buckets = sago.GradientBuckets(params, groups=groups)
            in_backward = {"rule": rule} if rule == "sago" else None
            report = window(buckets, [a, b], ones, ones, in_backward) or buckets.synthesize_(rule)
            expected = ("all",) if rule == "blur" and not groups else keys
            assert report.groups == expected
            assert report.numel.tolist() == ([2, 3] if len(expected) == 2 else [5])
            buckets.zero_()


@pytest.mark.parametrize("rule", GLOBAL)
def test_names_as_groups_show_each_parameter_of_a_rule_of_global_scope(rule):
    """All sums are exact, because the gradients are small integers. So the updates have the same bits."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 5))
    named = list(model.named_parameters())
    names, params = zip(*named, strict=True)
    generator = torch.Generator().manual_seed(0)
    forget, retain = (
        [torch.randint(-3, 4, p.shape, generator=generator).float() for p in params] for _ in range(2)
    )
    found = []
    for groups in (None, names):
        buckets = sago.GradientBuckets(named, groups=groups)
        window(buckets, params, forget, retain)
        report = buckets.synthesize_(rule)
        assert report.groups == (groups or ("all",))
        found.append(([p.grad.clone() for p in params], report.summary()))
        buckets.zero_()
    properties.assert_equal_bits(found[0][0], found[1][0])
    assert all(found[0][1][name] == found[1][1][name] for name in ("ff", "fr", "rr", "conflict_fraction"))


@pytest.mark.parametrize("in_backward", [False, True])
def test_versions_of_updates_are_counted(backend, in_backward):
    """Autograd sees that what it saved was overwritten."""
    forget, retain = small()
    params, buckets = fresh(backend, forget, retain)
    window(buckets, params, forget, retain)
    saved = buckets.retain_grads[0]
    weight = torch.ones_like(saved, requires_grad=True)
    loss = (weight * saved).sum()
    if in_backward:
        with buckets.synthesize_in_backward():
            sum((p * 0.0).sum() for p in params).backward()
    else:
        buckets.synthesize_(stats=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
