"""`retain_decay`, the numbers that rules keep, and their checkpoints."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

import sago
from sago.rules import graddrop, gradvac, where
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
        # Eight roundings in fp32 of numbers below 16 are 8 * 2^-24 * 16 = 7.6e-6: six of the mean, two of the
        # update. `pcgrad` has accumulators in fp64.
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
    # Three roundings in fp32 of numbers below 8, on either side, are 6 * 2^-24 * 8 = 2.9e-6.
    torch.testing.assert_close(params[0].grad, first + 0.5 * second / 1.5, rtol=0.0, atol=3e-6)
    torch.testing.assert_close(params[1].grad, 0.5 * gradients(50)[1] / 1.5, rtol=0.0, atol=3e-6)


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
    weight = (1.0 + DECAY) * DECAY  # of the windows 0 and 1, which these two elements have lost
    of_forget, of_retain = gradients(3), gradients(3 + 50)
    for i, (u, at) in enumerate(zip(step(buckets, params, "sum", 3), (3, 4), strict=True)):
        # Five roundings of numbers below 8: factor, product and sum there, quotient and sum here.
        expected = of_forget[i][at] + of_retain[i][at] / (weight + 1.0)
        torch.testing.assert_close(u[at], expected, rtol=0.0, atol=5 * 2**-24 * 8)
        assert u.isfinite().all()


def fail(side, params):
    with side():
        torch.autograd.backward(params, gradients(1))
        raise RuntimeError("stop")


def drop(side, params, actions):
    with side():
        for action in actions:
            if action == "zero":
                for p in params:
                    p.grad = None
            else:
                torch.autograd.backward(params, gradients(150))


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_capture_that_fails(side):
    """An incomplete retain gradient ends the mean. An incomplete forget gradient does not."""
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    before = buckets._retain.past
    with pytest.raises(RuntimeError, match="stop"):
        fail(getattr(buckets, side), params)
    if side == "retain":  # the warning is an error, and comes when all is done
        with pytest.raises(RuntimeWarning, match="mean of the retain gradient begins again"):
            buckets.zero_()
        fresh_params, fresh = made(retain_decay=DECAY)
        assert_equal_bits(step(buckets, params, "sum", 2), step(fresh, fresh_params, "sum", 2))
    else:
        buckets.zero_()
        assert buckets._retain.past == before


def test_a_retain_gradient_that_was_not_used_stays_in_the_mean():
    params, buckets = made(retain_decay=0.5)
    capture(buckets, params, "retain", 0)
    with pytest.warns(RuntimeWarning, match="zero_ keeps a retain gradient"):
        buckets.zero_()
    update = step(buckets, params, "sum", 100)
    forget, first, second = gradients(100), gradients(0), gradients(150)
    for u, f, r, s in zip(update, forget, first, second, strict=True):
        # Five roundings in fp32 of numbers below 8, on either side, are 10 * 2^-24 * 8 = 4.8e-6.
        torch.testing.assert_close(u, f + (0.5 * r + s) / 1.5, rtol=0.0, atol=5e-6)


def test_a_clear_that_is_interrupted_ends_the_mean(monkeypatch):
    params, buckets = made(retain_decay=DECAY, bucket_cap_mb=1e-6)
    step(buckets, params, "sum", 0)
    capture(buckets, params, "forget", 100)
    capture(buckets, params, "retain", 150)
    buckets.synthesize_("sum")
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return arguments[0]

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "nan_to_num_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            buckets.zero_()
    with pytest.warns(RuntimeWarning, match="begins again"):
        buckets.zero_()
    fresh_params, fresh = made(retain_decay=DECAY, bucket_cap_mb=1e-6)
    assert_equal_bits(step(buckets, params, "sum", 2), step(fresh, fresh_params, "sum", 2))


@pytest.mark.parametrize("in_backward", [False, True])
def test_without_zero(in_backward):
    """`p.grad = None` instead of `zero_`: the next captures multiply the accumulators."""
    updates = []
    for zero in (False, True):
        params, buckets = made(retain_decay=DECAY)
        buckets.zero_, clear = (buckets.zero_ if zero else lambda: None), buckets.zero_
        for seed in (0, 100):
            updates.append(step(buckets, params, "sago", seed, in_backward=in_backward))
            for p in params:
                p.grad = None
        clear()
    assert_equal_bits(updates[1], updates[3])


def test_a_frozen_parameter_has_no_update():
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    params[1].requires_grad_(False)
    capture(buckets, params[:1], "forget", 100)
    capture(buckets, params[:1], "retain", 150)
    buckets.synthesize_("sum")
    assert params[1].grad is None


def test_zero_grad_within_a_capture():
    """It has no effect before the first backward, and is an error after it."""
    updates = []
    for zeroed in (False, True):
        params, buckets = made(retain_decay=DECAY)
        step(buckets, params, "sum", 0)
        capture(buckets, params, "forget", 100)
        drop(buckets.retain, params, ["zero"] * zeroed + ["backward"])
        buckets.synthesize_("sum")
        updates.append([p.grad.clone() for p in params])
    assert_equal_bits(*updates)
    for late in (["backward", "zero"], ["backward", "zero", "backward"]):
        params, buckets = made(retain_decay=DECAY)
        step(buckets, params, "sum", 0)
        with pytest.raises(ValueError, match=r"zero_grad\(set_to_none=True\) should not be called"):
            drop(buckets.retain, params, late)
        with pytest.warns(RuntimeWarning, match="begins again"):
            buckets.zero_()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradients_that_other_code_replaces():
    """A graph of the gradient, and a clamped gradient: both contain the mean."""
    for replace in ("create_graph", "clamp"):
        params, buckets = made(retain_decay=DECAY)
        step(buckets, params, "sum", 0)
        before = [v.clone() for v in buckets._retain.views]
        with buckets.retain():
            loss = sum((p * g).sum() for p, g in zip(params, gradients(150), strict=True))
            loss.backward(create_graph=replace == "create_graph")
            if replace == "clamp":
                for p in params:
                    p.grad = p.grad.clamp(-1, 1)
        expected = [b + g for b, g in zip(before, gradients(150), strict=True)]
        expected = [e.clamp(-1, 1) for e in expected] if replace == "clamp" else expected
        assert_equal_bits(buckets._retain.views, expected)
        with pytest.warns(RuntimeWarning, match="zero_ keeps"):
            buckets.zero_()


def test_what_does_not_go_with_a_mean(monkeypatch):
    for wrong in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match="retain_decay"):
            made(retain_decay=wrong)
    params, buckets = made(retain_decay=DECAY)
    capture(buckets, params, "forget", 0)
    capture(buckets, params, "retain", 0)
    with pytest.raises(ValueError, match="unscale_ should not be called with `retain_decay`"):
        buckets.unscale_(torch.amp.GradScaler("cpu"), torch.optim.SGD(params, 1.0))
    for rule in ("ties", "graddrop"):
        with pytest.raises(
            ValueError, match=r"only reads signs.*without `retain_decay`, or choose another rule"
        ):
            buckets.synthesize_(rule)
    with monkeypatch.context() as patched:
        patched.setattr("sago.capture.buckets.is_capturing", lambda devices: True)
        with pytest.raises(ValueError, match="`retain_decay` should be None where a CUDA graph"):
            buckets.synthesize_("mudman")
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
            # The update is rounded to fp32, and a coefficient has a few times the error of a sum, 1e-6. So
            # has the norm, because the gradients do not cancel.
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
    # At most 4 times the error of a sum, 1e-6, and the rounding of the update to fp32, 1e-7.
    torch.testing.assert_close(report.uu.sum(), exact, rtol=1e-5, atol=0.0)


def kept(ff, fr, rr, gamma, alpha, state):
    count, _ = state
    return gamma, alpha, count + 1.0, fr


def test_zero_grad_in_a_nested_capture():
    """It drops the forget gradient of that capture, and leaves the mean of the capture around it."""
    updates = []
    for zeroed in (False, True):
        params, buckets = made(retain_decay=DECAY)
        step(buckets, params, "sum", 0)
        with buckets.retain():
            torch.autograd.backward(params, gradients(150))
            drop(buckets.forget, params, ["zero"] * zeroed + ["backward"])
        buckets.synthesize_("sum")
        updates.append([p.grad.clone() for p in params])
    assert_equal_bits(*updates)


def test_numbers_of_each_group_are_kept_unless_they_are_not_finite():
    rule = sago.Rule("kept", kept, "tensor", state=(2.0, 5.0))
    params, buckets = made()
    step(buckets, params, rule, 0)
    products = [(f @ r).item() for f, r in zip(gradients(0), gradients(50), strict=True)]
    found = buckets.state_dict()["rules"]["kept"]
    # The error of a product is 1e-6 of the product of the lengths, which is below 1000.
    assert found[:, 0].tolist() == [3.0, 3.0]
    assert found[:, 1].tolist() == pytest.approx(products, rel=0.0, abs=1e-3)
    capture(buckets, params, "forget", 0)
    with buckets.retain():
        params[0].backward(torch.full((40,), torch.nan))
    buckets.synthesize_(rule)
    buckets.zero_()
    after = buckets.state_dict()["rules"]["kept"]
    assert after[:, 0].tolist() == [4.0, 4.0]
    assert after[0, 1] == found[0, 1] == pytest.approx(products[0], rel=0.0, abs=1e-3)
    check_rule(rule, cases=11)


def test_a_rule_that_keeps_numbers_needs_buckets():
    f, r = (torch.randn(5) for _ in range(2))
    rule = gradvac(decay=0.9)
    with pytest.raises(ValueError, match="keep no numbers"):
        sago.synthesize(f, r, rule)
    with pytest.raises(ValueError, match="keep no numbers"):
        sago.Plan(f, r, rule)
    with pytest.raises(ValueError, match="no random gate for a plan"):
        sago.Plan(f, r, "graddrop")
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    ("rule", "options"),
    [(gradvac(decay=0.8), {}), (gradvac(decay=0.8), {"retain_decay": DECAY}), ("graddrop", {})],
    ids=["numbers", "mean", "step"],
)
def test_a_state_that_a_distributed_checkpoint_loads_after_a_first_window(rule, options, tmp_path):
    """It loads only into the entries that the new state has, and new buckets have none."""
    params, buckets = made(**options)
    for seed in (0, 100):
        step(buckets, params, rule, seed)
    checkpoint.save({"buckets": buckets.state_dict()}, checkpoint_id=tmp_path)
    expected = step(buckets, params, rule, 200)
    params, buckets = made(**options)
    step(buckets, params, rule, 300)
    state = {"buckets": buckets.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path)
    buckets.load_state_dict(state["buckets"])
    assert_equal_bits(step(buckets, params, rule, 200), expected)


def test_a_state_is_loaded_where_it_comes_from():
    params, buckets = made(retain_decay=DECAY)
    step(buckets, params, "sum", 0)
    before = [v.clone() for v in buckets._retain.views]
    buckets.load_state_dict(buckets.state_dict())
    assert_equal_bits(buckets._retain.views, before)
    assert buckets._retain.past == DECAY


def find(memory, rule):
    return memory.state(rule, [0]) if rule.state else memory.draw(rule)


def test_memory_of_rules_is_not_mixed_up(monkeypatch):
    params, buckets = made()
    for rules in ((graddrop(1), graddrop(2)), (gradvac(0.1, decay=0.5), gradvac(0.2, decay=0.5))):
        step(buckets, params, rules[0], 0)
        capture(buckets, params, "forget", 0)
        capture(buckets, params, "retain", 50)
        with pytest.raises(ValueError, match="Give one of them another name"):
            buckets.synthesize_(rules[1])
        buckets.synthesize_(rules[0])
        buckets.zero_()
    _, fresh = made()
    for rule in (graddrop(1), gradvac(decay=0.5)):
        with monkeypatch.context() as patched:
            patched.setattr("sago.capture.memory.is_capturing", lambda devices: True)
            with pytest.raises(ValueError, match="used once before the capture of a CUDA graph"):
                find(fresh._memory, rule)


def test_a_synthesis_that_fails_keeps_the_state(monkeypatch):
    params, buckets = made()
    rule = sago.Rule("kept", kept, "tensor", state=(2.0, 5.0))
    step(buckets, params, rule, 0)
    capture(buckets, params, "forget", 0)
    capture(buckets, params, "retain", 50)

    def fails(*arguments):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("sago.backends.compiled.combine", fails)
        with pytest.raises(MemoryError):
            buckets.synthesize_(rule)
    buckets.zero_()
    assert buckets.state_dict()["rules"]["kept"][:, 0].tolist() == [3.0, 3.0]


def counted(ff, fr, rr, gamma, alpha, state):
    (steps,) = state
    return where(steps > 0.0, gamma, 0.0), alpha, steps + 1.0


def test_numbers_of_an_elementwise_rule():
    """The weight of forget is 0 in the first step. Each group has its own count."""
    rule = sago.Rule("warm-up", counted, "element", state=(0.0,))
    for stats in (True, False):
        params, buckets = made()
        counts = {"rules": {"warm-up": torch.tensor([[0.0], [1.0]], dtype=torch.float64)}}
        buckets.load_state_dict({**buckets.state_dict(), **counts})
        first, second = step(buckets, params, rule, 0, stats=stats)
        assert_equal_bits([first], gradients(50)[:1])
        assert_equal_bits([second], [gradients(0)[1] + gradients(50)[1]])
    for stats in (True, False):
        params, buckets = made()
        first, second = (step(buckets, params, rule, 0, stats=stats) for _ in range(2))
        assert_equal_bits(first, gradients(50))
        assert_equal_bits(second, [f + r for f, r in zip(gradients(0), gradients(50), strict=True)])


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
    of_types = {"should be a Tensor": {name: [1.0]}, "should be a dict": None}
    for text, mean in of_types.items():
        with pytest.raises(TypeError, match=text):
            buckets.load_state_dict({**state, "retain_mean": mean})
    for weight in (torch.nan, -3.0, 0.0):
        with pytest.raises(ValueError, match="retain_weight"):
            buckets.load_state_dict({**state, "retain_weight": weight})
    for change in (
        {"rules": {"gradvac": torch.zeros(1)}},
        {"rules": {"gradvac": [0.0]}},
        {"draws": {"graddrop": torch.zeros(5)}},
        {"draws": {"graddrop": None}},
    ):
        with pytest.raises(ValueError, match=r"should be a tensor, (fp64|int64)"):
            buckets.load_state_dict({**state, **change})
    _, other = made(retain_decay=DECAY)
    other.load_state_dict({**state, "rules": {"gradvac": torch.zeros(7, 1, dtype=torch.float64)}})
    with pytest.raises(ValueError, match=r"should have shape \(1, 1\). Found \(7, 1\)"):
        other._memory.state(gradvac(decay=0.5), [0])
    layers = [nn.Linear(2, 2) for _ in range(2)]
    twice = sago.GradientBuckets(
        [*layers[0].named_parameters(), *layers[1].named_parameters()], retain_decay=0.5
    )
    with pytest.raises(ValueError, match="Found a name twice"):
        twice.state_dict()
    capture(buckets, params, "forget", 0)
    for method, arguments in ((buckets.state_dict, ()), (buckets.load_state_dict, (state,))):
        with pytest.raises(ValueError, match="between two windows"):
            method(*arguments)
    buckets.zero_()
    after = buckets.state_dict()["retain_mean"]
    assert_equal_bits(list(after.values()), list(before.values()))
    assert made()[1].state_dict() == {"retain_mean": {}, "retain_weight": 0.0, "rules": {}, "draws": {}}
