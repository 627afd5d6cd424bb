"""`retain_decay`, the numbers that rules keep, and their checkpoints."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sago
from sago.rules import gradvac
from sago.testing import check_rule
from tests.support import inputs
from tests.support.properties import assert_equal_bits
from tests.support.running_mean import DECAY, assert_as_by_hand, by_hand, trained
from tests.support.training import transformer


@pytest.mark.parametrize("rule", ["gru", "mudman"])
def test_twenty_steps_as_published(rule):
    expected = by_hand(transformer(), rule)
    assert_as_by_hand(trained(transformer(), rule), expected)
    without = trained(transformer(), rule, retain_decay=None)
    assert any(not torch.allclose(without[name], p, rtol=1e-3) for name, p in expected.items())


def made(**options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(n)) for n in (40, 1000)]
    return params, sago.GradientBuckets(params, **options)


def gradients(seed):
    return [inputs.normal(n, seed + i).float() for i, n in enumerate((40, 1000))]


def capture(buckets, params, side, seed):
    with getattr(buckets, side)():
        torch.autograd.backward(params, gradients(seed))


def step(buckets, params, rule, seed, retains=1, in_backward=False, **options):
    """The update of a window, with `retains` retain captures."""
    capture(buckets, params, "forget", seed)
    for i in range(retains - in_backward):
        capture(buckets, params, "retain", seed + 50 + 5 * i)
    if in_backward:
        with buckets.synthesize_in_backward(rule, **options):
            torch.autograd.backward(params, gradients(seed + 45 + 5 * retains))
    else:
        buckets.synthesize_(rule, **options)
    update = [p.grad.clone() for p in params]
    buckets.zero_()
    return update


@pytest.mark.parametrize("accumulation", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_weights_of_the_mean(accumulation, rule, in_backward):
    """The mean over the windows, or over all captures, in which a past window weighs less."""
    wide = (
        {"accumulate_dtype": torch.float64} if rule == "pcgrad" else {}
    )  # the update has a buffer of its own
    params, buckets = made(retain_decay=DECAY, accumulation=accumulation, **wide)
    total, weight = [torch.zeros(n, dtype=torch.float64) for n in (40, 1000)], 0.0
    for i, retains in enumerate((1, 3, 2)):
        seed = 1000 * i
        update = step(buckets, params, rule, seed, retains, in_backward)
        both = [gradients(seed + 50 + 5 * k) for k in range(retains)]
        total = [DECAY * t + sum(r.double() for r in rs) for t, *rs in zip(total, *both, strict=True)]
        weight = DECAY * weight + (retains if accumulation == "mean" else 1)
        mean = [t / weight for t in total]
        expected, _ = sago.reference.synthesize([f.double() for f in gradients(seed)], mean, rule)
        # The mean is a sum of at most six numbers in fp32, and the update is rounded twice.
        for u, e in zip(update, expected, strict=True):
            torch.testing.assert_close(u.double(), e, rtol=1e-5, atol=1e-5)


def test_the_mean_takes_no_memory():
    _, plain = made()
    params, buckets = made(retain_decay=DECAY)
    assert buckets.nbytes == plain.nbytes
    step(buckets, params, "sago", 0)
    capture(buckets, params, "forget", 1)
    capture(buckets, params, "retain", 2)
    buckets.synthesize_()
    assert {p.grad.data_ptr() for p in params} == {v.data_ptr() for v in buckets._forget.views}


def test_a_parameter_that_is_not_reached_again_keeps_its_mean():
    params, buckets = made(retain_decay=0.5)
    step(buckets, params, "sum", 0)
    (first, _), (second, _) = gradients(0), gradients(50)
    capture(buckets, params[:1], "forget", 0)
    with buckets.retain():
        params[0].backward(torch.zeros(40))
    buckets.synthesize_("sum")
    torch.testing.assert_close(params[0].grad, first + 0.5 * second / 1.5)
    torch.testing.assert_close(params[1].grad, 0.5 * gradients(50)[1] / 1.5)


def test_nan_is_dropped_after_its_window():
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    capture(buckets, params, "forget", 1)
    with buckets.retain():
        bad = gradients(2)
        bad[0][3], bad[1][4] = torch.nan, -torch.inf
        torch.autograd.backward(params, bad)
    report = buckets.synthesize_("sum")
    assert report.nonfinite_retain.tolist() == [1, 1]
    assert params[0].grad[3].isnan()
    buckets.zero_()
    assert buckets._retain.views[0][3] == 0
    assert buckets._retain.views[1][4] == 0
    for update in step(buckets, params, "sum", 3):
        assert update.isfinite().all()


def fail(side, params):
    with side():
        torch.autograd.backward(params, gradients(1))
        raise RuntimeError("stop")


def drop(side, params, later):
    with side():
        for p in params:
            p.grad = None
        if later:
            torch.autograd.backward(params, gradients(1))


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_capture_that_fails(side):
    """An incomplete retain gradient ends the mean. An incomplete forget gradient does not."""
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    before = buckets._retain.past
    with pytest.raises(RuntimeError, match="stop"):
        fail(getattr(buckets, side), params)
    if side == "retain":
        with pytest.warns(RuntimeWarning, match="mean of the retain gradient begins again"):
            buckets.zero_()
        fresh_params, fresh = made(retain_decay=DECAY)
        assert_equal_bits(step(buckets, params, "sum", 2), step(fresh, fresh_params, "sum", 2))
    else:
        buckets.zero_()
        assert buckets._retain.past == before


def test_zero_grad_within_a_capture_is_refused():
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    for later in (False, True):
        with pytest.raises(ValueError, match=r"zero_grad\(set_to_none=True\)"):
            drop(buckets.retain, params, later)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            buckets.zero_()


def test_what_does_not_go_with_a_mean():
    for wrong in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match="retain_decay"):
            made(retain_decay=wrong)
    params, buckets = made(retain_decay=DECAY)
    capture(buckets, params, "forget", 0)
    capture(buckets, params, "retain", 0)
    with pytest.raises(ValueError, match="unscale_ should not be called with `retain_decay`"):
        buckets.unscale_(torch.amp.GradScaler("cpu"), torch.optim.SGD(params, 1.0))
    buckets.synthesize_("ties")  # the weight of the first window is 1
    buckets.zero_()
    capture(buckets, params, "forget", 0)
    capture(buckets, params, "retain", 0)
    with pytest.raises(ValueError, match="only reads signs"):
        buckets.synthesize_("ties")
    buckets.synthesize_("mudman")


def test_gradvac_with_a_mean_is_that_of_torchjd():
    from torchjd.aggregation import GradVac

    decay, params_and_buckets = 0.7, made()
    params, buckets = params_and_buckets
    rule, theirs = gradvac(decay=decay), GradVac(beta=1 - decay, eps=0.0)
    for seed in range(0, 600, 100):
        # A gradient that leans towards the other one more and more, so that the target rises.
        forget = [f + seed / 100 * r for f, r in zip(gradients(seed), gradients(seed + 50), strict=True)]
        retain = gradients(seed + 50)
        for side, grads in ((buckets.forget, forget), (buckets.retain, retain)):
            with side():
                torch.autograd.backward(params, grads)
        report = buckets.synthesize_(rule)
        matrix = torch.stack([torch.cat([t.double().flatten() for t in g]) for g in (forget, retain)])
        expected = theirs(matrix).split([40, 1000])
        for p, e in zip(params, expected, strict=True):
            # The update is rounded to fp32, and a coefficient has a few times the error of a sum, 1e-6.
            torch.testing.assert_close(p.grad.double(), e, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(report.uu.sum().sqrt(), theirs_norm(expected), rtol=1e-5, atol=0.0)
        buckets.zero_()


def theirs_norm(update):
    return torch.cat(list(update)).norm()


def test_the_report_has_the_state_before_the_step():
    params, buckets = made()
    rule = gradvac(0.5, decay=0.5)
    capture(buckets, params, "forget", 0)
    capture(buckets, params, "retain", 50)
    report = buckets.synthesize_(rule)
    exact = sum((p.grad.double() ** 2).sum() for p in params)
    torch.testing.assert_close(report.uu.sum(), exact, rtol=1e-5, atol=0.0)


def kept(ff, fr, rr, gamma, alpha, state):
    count, _ = state
    return gamma, alpha, count + 1.0, fr


def test_numbers_of_each_group_are_kept_unless_they_are_not_finite():
    rule = sago.Rule("kept", kept, "tensor", state=(2.0, 5.0))
    params, buckets = made()
    step(buckets, params, rule, 0)
    products = [(f @ r).item() for f, r in zip(gradients(0), gradients(50), strict=True)]
    found = buckets.state_dict()["rules"]["kept"]
    assert found[:, 0].tolist() == [3.0, 3.0]
    assert found[:, 1].tolist() == pytest.approx(products, rel=1e-4)
    capture(buckets, params, "forget", 0)
    with buckets.retain():
        params[0].backward(torch.full((40,), torch.nan))
    buckets.synthesize_(rule)
    buckets.zero_()
    after = buckets.state_dict()["rules"]["kept"]
    assert after[:, 0].tolist() == [4.0, 4.0]
    assert after[0, 1] == found[0, 1] == pytest.approx(products[0], rel=1e-4)
    check_rule(rule, cases=11)


def test_a_rule_that_keeps_numbers_needs_buckets():
    f, r = (torch.randn(5) for _ in range(2))
    rule = gradvac(decay=0.9)
    with pytest.raises(ValueError, match="keep no numbers"):
        sago.synthesize(f, r, rule)
    with pytest.raises(ValueError, match="keep no numbers"):
        sago.Plan(f, r, rule)
    params, buckets = made()
    capture(buckets, params, "forget", 0)
    with pytest.raises(ValueError, match="keeps numbers of all groups"), buckets.synthesize_in_backward(rule):
        pass
    with pytest.raises(TypeError, match="`state` should be a tuple of numbers"):
        sago.Rule("wrong", kept, "tensor", state=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"3 numbers, because the rule is not gated and keeps 1 numbers"):
        sago.Rule("wrong", lambda ff, fr, rr, gamma, alpha, state: (1.0, 1.0), "tensor", state=(0.0,))


@pytest.mark.parametrize("when", ["before zero_", "after zero_"])
def test_a_run_that_is_continued_from_a_checkpoint(when):
    """The same bits as a run that was not interrupted."""
    runs = {}
    for interrupted in (False, True):
        params, buckets = made(retain_decay=DECAY)
        rule = gradvac(decay=0.8)
        step(buckets, params, rule, 0)
        capture(buckets, params, "forget", 100)
        capture(buckets, params, "retain", 150)
        buckets.synthesize_(rule)
        if when == "after zero_":
            buckets.zero_()
        if interrupted:
            state = copy.deepcopy(buckets.state_dict())
            params, buckets = made(retain_decay=DECAY)
            buckets.load_state_dict(state)
        else:
            buckets.zero_()
        runs[interrupted] = [step(buckets, params, rule, seed) for seed in (200, 300)]
    for found, expected in zip(runs[True], runs[False], strict=True):
        assert_equal_bits(found, expected)


def test_states_that_do_not_fit():
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, gradvac(decay=0.5), 0)
    state = buckets.state_dict()
    before = {name: g.clone() for name, g in state["retain_mean"].items()}
    (name, first), *_ = state["retain_mean"].items()
    wrong = {
        "without `retain_decay`": (made()[1], state),
        "keys": (buckets, {"rules": {}}),
        "which they do not have": (buckets, {**state, "retain_mean": {"other": first}}),
        "should have shape": (buckets, {**state, "retain_mean": {name: first[1:]}}),
    }
    for text, (target, given) in wrong.items():
        with pytest.raises(ValueError, match=text):
            target.load_state_dict(given)
    with pytest.raises(TypeError, match="should be a Tensor"):
        buckets.load_state_dict({**state, "retain_mean": {name: [1.0]}})
    capture(buckets, params, "forget", 0)
    for method, arguments in ((buckets.state_dict, ()), (buckets.load_state_dict, (state,))):
        with pytest.raises(ValueError, match="between two windows"):
            method(*arguments)
    buckets.zero_()
    after = buckets.state_dict()["retain_mean"]
    assert_equal_bits(list(after.values()), list(before.values()))
    assert made()[1].state_dict() == {"retain_mean": {}, "retain_weight": 0.0, "rules": {}, "draws": {}}
