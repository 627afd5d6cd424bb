"""`retain_floor`: which elements conflict, in every way that a synthesis is called.

The arithmetic on every backend is in `tests/support/checks.py`, beside wrong kernels that it catches.
"""

import pytest
import torch

import sago
from sago.core.report import NOISE
from sago.rules import RULES, scaled, where
from tests.support import inputs
from tests.support.properties import assert_equal_bits
from tests.support.windows import ANY, BF16, FP32, FP64, assert_equal_results, bucketed

FLOOR = 0.73
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}


def lists(dtype=FP32):
    sizes = (3, 300, inputs.CHUNK + 5, 1, 0, 77)
    forget, retain = zip(*(inputs.pair(n, seed=n) for n in sizes), strict=True)
    return [[t.to(dtype) for t in side] for side in (forget, retain)]


def by_formula(forget, retain, keys):
    """The update of `sago`, from root mean squares in fp64."""
    updates = []
    for f, r, key in zip(forget, retain, keys, strict=True):
        group = torch.cat([t.double() for t, k in zip(retain, keys, strict=True) if k == key])
        conflict = (f.sign() * r.sign() < 0) & (r.double().abs() >= FLOOR * group.square().mean().sqrt())
        updates.append(torch.where(conflict, 1.5 * r.float(), 0.75 * f.float()).to(r.dtype))
    return updates


@pytest.mark.parametrize("keys", [range(6), [0, 1, 0, 1, 2, 2], [0] * 6], ids=["each", "some", "all"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_elements_below_the_floor_do_not_conflict(backend, dtype, keys):
    forget, retain = lists(dtype)
    expected = by_formula(forget, retain, keys)
    for stats in (True, False):
        updates, report = backend(
            forget, retain, retain_floor=FLOOR, groups=list(keys), stats=stats, **WEIGHTS
        )
        assert_equal_bits(updates, expected)
    assert "conflict_fraction" in report.absent


GATED = [name for name, rule in RULES.items() if rule.classes > 1]


@pytest.mark.parametrize("rule", GATED)
def test_noise_leaves_the_forget_gradient(backend, rule):
    """Or the rule is refused, because it would leave out every element of the forget gradient."""
    f, r = (t.float() for t in inputs.pair(300))
    options = {"rule": rule, "retain_floor": 1e-3, "alpha": 0.0}
    if rule in ("cautious", "mudman"):
        with pytest.raises(ValueError, match=rf"leaves the forget gradient out .*with '{rule}'"):
            backend([f], [r], **options)
        return
    (found,), report = backend([f], [r * 2.0**-26], **options)
    # `ties` halves the elements that agree, and takes the larger one where r counts as 0.
    assert_equal_bits([found], [f])
    assert report.conflict_fraction.item() == 0.0


def gated_and_global(ff, fr, rr, gamma, alpha):
    return 0.0, alpha, gamma, 0.0 * scaled(alpha, where(rr > ff, 1.0, 2.0))


def test_a_rule_of_global_scope_has_one_floor_for_all_groups(backend):
    rule = sago.Rule("gated_and_global", gated_and_global, "global", gated=True)
    forget, retain = lists()
    retain[0] *= 100.0
    expected, _ = sago.reference.synthesize(forget, retain, rule, retain_floor=FLOOR)
    for keys in (None, [0, 1, 0, 1, 2, 2], list(range(6))):
        found, _ = backend(forget, retain, rule, retain_floor=FLOOR, groups=keys)
        assert_equal_bits(found, expected)
        assert_equal_bits(
            sago.reference.synthesize(forget, retain, rule, retain_floor=FLOOR, groups=keys)[0], expected
        )


@pytest.mark.parametrize("rule", ["sago", "ties"])
def test_a_plan_and_lists_that_were_seen_before(backend, rule):
    forget, retain = ([backend.place(t) for t in side] for side in lists())
    out = [torch.empty_like(t) for t in retain]
    options = {"out": out, "backend": backend.name, "retain_floor": FLOOR}
    plan = sago.Plan(forget, retain, rule, **options)
    for scale in (1.0, 2.0):
        for r in retain:
            r *= scale
        sago.synthesize_(forget, retain, rule, **options)
        expected = [t.clone() for t in out]
        plan.synthesize_()
        assert_equal_bits(out, expected)


@pytest.mark.parametrize("rule", ["sago", "ties"])
def test_buckets(backend, rule):
    """One call, a buffer at a time in the backward, and a gradient at a time with one copy."""
    forget, retain = lists()
    expected, _ = sago.reference.synthesize(forget, retain, rule, retain_floor=FLOOR)
    for stats in (True, False):
        options = {"retain_floor": FLOOR, "stats": stats}
        whole = bucketed(backend, forget, retain, rule, **options)
        assert_equal_bits(whole[0], expected)
        for made in ({}, {"one_copy": True}):
            found = bucketed(backend, forget, retain, rule, made, in_backward=True, **options)
            assert_equal_results(found, whole)


def test_groups_of_buckets_with_one_copy(backend):
    """The gradients of a group wait for each other, because its norm needs all of them."""
    forget, retain = lists()
    made = {"groups": [0, 1, 0, 1, 2, 2]}
    whole = bucketed(backend, forget, retain, "sago", made, retain_floor=FLOOR)
    assert_equal_bits(
        whole[0],
        sago.reference.synthesize(forget, retain, "sago", groups=made["groups"], retain_floor=FLOOR)[0],
    )
    found = bucketed(backend, forget, retain, "sago", {**made, "one_copy": True}, True, retain_floor=FLOOR)
    assert_equal_results(found, whole)


def test_a_group_over_several_buffers_is_refused_in_the_backward():
    """Its norm is not complete before the last buffer, when the update of the first one is written."""
    forget, retain = lists()
    made = {"groups": [0] * 6, "bucket_cap_mb": 1e-6}
    expected, _ = sago.reference.synthesize(forget, retain, groups=made["groups"], retain_floor=FLOOR)
    assert_equal_bits(bucketed(ANY, forget, retain, "sago", made, retain_floor=FLOOR)[0], expected)
    with pytest.raises(ValueError, match=r"Group 0 should lie in one buffer"):
        bucketed(ANY, forget, retain, "sago", made, in_backward=True, retain_floor=FLOOR)
    bucketed(ANY, forget, retain, "sago", made, in_backward=True)  # without a floor, nothing has to wait


def test_clipping_uses_the_norm_of_the_floored_update(backend):
    forget, retain = lists(FP64)
    expected, _ = sago.reference.synthesize(forget, retain, retain_floor=FLOOR)
    params = [torch.nn.Parameter(torch.zeros_like(t)) for t in expected]
    for p, u in zip(params, expected, strict=True):
        p.grad = u
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    updates, report = bucketed(backend, forget, retain, "sago", retain_floor=FLOOR, max_norm=1.0)
    # Each sum has an error of at most 1e-6, and the norm is a root of their sum.
    torch.testing.assert_close(report.total_norm.cpu(), norm, rtol=1e-6, atol=0.0)
    for u, p in zip(updates, params, strict=True):
        torch.testing.assert_close(u, p.grad, rtol=1e-6, atol=0.0)


def test_sums_over_shards(backend):
    """Two halves of each gradient, whose sums a function adds up, as two ranks do."""
    f, r = (t.float() for t in inputs.pair(2 * 500))
    expected, whole = sago.reference.synthesize([f], [r], retain_floor=FLOOR)
    halves = list(zip(f.chunk(2), r.chunk(2), strict=True))
    tables = [[], []]

    def run(half, reduce_gram):
        return backend([halves[half][0]], [halves[half][1]], retain_floor=FLOOR, reduce_gram=reduce_gram)

    # The first round collects the norms of both halves, and the second one their other sums.
    for _ in range(3):
        found = []
        for half in range(2):
            calls = iter(range(3))

            def reduce_gram(table, half=half, calls=calls):
                call = next(calls)
                del tables[half][call:]
                tables[half].append(table.clone())
                other = tables[1 - half]
                return table + other[call] if call < len(other) else table

            found.append(run(half, reduce_gram))
    assert_equal_bits([torch.cat([updates[0] for updates, _ in found])], expected)
    assert found[0][1].conflict_fraction.item() == whole.conflict_fraction.item()


@pytest.mark.parametrize("rule", ["sum", "pcgrad", "pcgrad_global", "blur"])
def test_a_rule_without_a_gate_is_refused(rule):
    f, r = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=rf"`retain_floor` should be 0 .* Found 0\.1 with '{rule}'"):
        sago.synthesize_(f, r, rule, retain_floor=0.1)
    assert (r == 1.0).all()


@pytest.mark.parametrize(
    ("floor", "error"),
    [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("0.1", TypeError)],
)
def test_floors_that_are_refused(floor, error):
    f, r = torch.ones(3), torch.ones(3)
    for call in (sago.synthesize_, sago.synthesize, sago.Plan, sago.reference.synthesize):
        with pytest.raises(error, match="Parameter `retain_floor` should be"):
            call([f], [r], retain_floor=floor)
    assert (r == 1.0).all()


def test_the_report_warns_of_a_retain_gradient_that_is_noise():
    f, r = (t.float() for t in inputs.pair(300))
    report = sago.synthesize([f, f, f], [r * NOISE / 4, r, r * 0.0])[1]
    (warning,) = report.warnings()
    assert "retain_floor" in warning
    assert "1 of 3 groups" in warning
    assert warning in report.table()
    assert sago.synthesize([f], [r])[1].warnings() == []
    inf = f.clone()
    inf[3] = torch.inf
    assert sago.synthesize([inf], [r])[1].warnings() == []
    assert sago.synthesize([f], [r * NOISE / 4], stats=False)[1].warnings() == []
