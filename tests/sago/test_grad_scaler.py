"""`torch.amp.GradScaler` around a synthesis: unscaled before or after, and nothing infinite gets through."""

from unittest import mock

import pytest
import torch

import sago
from tests.support import inputs, properties
from tests.support.windows import (
    ANY,
    BF16,
    FP16,
    FP32,
    INF,
    WEIGHTS,
    bucketed,
    fresh,
    grads,
    losses,
    model_of,
    thin,
    window,
)


def scaler_on(backend, **options):
    return torch.amp.GradScaler(backend.device, **{"init_scale": 2.0**10, "growth_interval": 1, **options})


def scaled(scaler, p, gradient):
    """A backward that gives `p` the gradient times the scale."""
    scaler.scale((p * gradient.to(p)).sum()).backward()


def trained(backend, rule, scaler, before, dtype=FP32, **options):
    """The parameters after two steps whose gradients are unscaled before or after the synthesis."""
    model = model_of(dtype, backend.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    buckets = sago.GradientBuckets(model, backend=backend.name)
    for step in range(2):
        for capture, loss in zip((buckets.forget, buckets.retain), losses(model, step), strict=True):
            with capture():
                scaler.scale(loss).backward()
        if before:
            buckets.unscale_(scaler, optimizer)
        buckets.synthesize_(rule, **WEIGHTS, **options)
        scaler.step(optimizer)
        scaler.update()
        buckets.zero_()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad", "blur"])
def test_a_loss_scale_changes_no_bit(backend, rule):
    """Scales are powers of two, here 2^10 and then 2^11: every step of the way is exact in the factor."""
    for dtype, options in thin(backend, ((BF16, {}), (FP32, {"max_norm": 0.1, "eps": 1e-3})), rule):
        expected = trained(backend, rule, scaler_on(backend, enabled=False), True, dtype, **options)
        # Clipping and eps mean unscaled gradients.
        for before in (True,) if options else (True, False):
            scaler = scaler_on(backend)
            properties.assert_equal_bits(trained(backend, rule, scaler, before, dtype, **options), expected)
            assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("side", ["forget", "retain", "neither"])
@pytest.mark.parametrize("before", [True, False], ids=["unscaled before", "unscaled after"])
def test_an_overflow_that_the_rule_leaves_out_skips_the_step(backend, before, side):
    """sago drops a forget element in conflict and a retain element out of conflict."""
    f, r = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([-1.0, 2.0, -3.0])
    (f if side == "forget" else r)[0 if side == "forget" else 1] *= 1.0 if side == "neither" else INF
    p = torch.ones(3, device=backend.device, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), scaler_on(backend)
    buckets = sago.GradientBuckets([p], backend=backend.name)
    for repetition in (1, 2):
        for capture, g in ((buckets.forget, f), (buckets.retain, r)):
            with capture():
                scaled(scaler, p, g)
        if before:
            buckets.unscale_(scaler, optimizer)
        buckets.synthesize_("sago")
        scaler.step(optimizer)
        scaler.update()
        buckets.zero_()
        moved = repetition * torch.tensor([-1.0, 1.0, -1.0]) if side == "neither" else 0.0
        assert torch.equal(p.detach().cpu(), torch.ones(3) - moved)
        assert scaler.get_scale() == 2.0 ** (10 + (repetition if side == "neither" else -repetition))


def test_fp16_gradients_are_unscaled_before_if_they_are_accumulated_in_fp32():
    """Bit for bit: the gradients are normal numbers of fp16, scaled or not."""
    found = []
    for enabled in (True, False):
        forget, retain = ([t.half()] for t in inputs.pair(40))
        (p,), buckets = fresh(ANY, forget, retain, accumulate_dtype=FP32)
        optimizer, scaler = torch.optim.SGD([p], lr=0.5), scaler_on(ANY, enabled=enabled, init_scale=2.0**7)
        for _ in range(2):
            for capture, (g,) in (
                (buckets.forget, forget),
                (buckets.retain, retain),
                (buckets.retain, forget),
            ):
                with capture():
                    scaled(scaler, p, g)
            buckets.unscale_(scaler, optimizer)
            buckets.synthesize_("pcgrad", max_norm=1.0)
            assert p.grad.dtype == FP16
            scaler.step(optimizer)
            scaler.update()
            buckets.zero_()
        found.append([p.detach()])
    assert found[0][0].any()
    properties.assert_equal_bits(*found)


def test_fp16_gradients_that_torch_refuses_to_unscale_are_not_lost():
    forget, retain = ([t.half()] for t in inputs.pair(40))
    params, buckets = fresh(ANY, forget, retain)
    optimizer, scaler = torch.optim.SGD(params, lr=0.5), scaler_on(ANY)
    groups = optimizer.param_groups
    scaler.scale(params[0].sum())
    window(buckets, params, forget, retain)
    with pytest.raises(ValueError, match="FP16"):
        buckets.unscale_(scaler, optimizer)
    assert optimizer.param_groups is groups
    buckets.synthesize_("sago")
    properties.assert_equal_bits(grads(params), bucketed(ANY, forget, retain, "sago")[0])


@pytest.mark.parametrize("bad", [None, "first", "second", "outside"])
@pytest.mark.parametrize("before", [True, False], ids=["unscaled before", "unscaled after"])
def test_several_optimizers_and_a_parameter_outside(before, bad):
    """Each optimizer skips its own step: one with an overflow, in these buckets or beside them."""

    def run(enabled):
        names = ("first", "second", "outside", "not reached")
        named = {name: torch.ones(6, requires_grad=True) for name in names}
        first, *others = named.values()
        optimizers = torch.optim.SGD([first], lr=0.5), torch.optim.SGD(others, lr=0.25)
        scaler = scaler_on(ANY, enabled=enabled)
        buckets = sago.GradientBuckets([first, others[0], others[2]])
        for capture, seed, names in (
            (buckets.forget, 1, ("first", "outside")),
            (buckets.retain, 2, ("first", "second", "outside")),
        ):
            with capture():
                for name in names:
                    g = inputs.normal(6, 10 * seed + len(name))
                    if enabled and name == bad:
                        g[0] = INF
                    scaled(scaler, named[name], g)
        for optimizer in optimizers if before else ():
            buckets.unscale_(scaler, optimizer)
        buckets.synthesize_("sum")
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return [p.detach() for p in named.values()], scaler.get_scale()

    (found, scale), (expected, _) = run(enabled=True), run(enabled=False)
    for i in {None: (), "first": (0,), "second": (1, 2), "outside": (1, 2)}[bad]:
        expected[i] = torch.ones(6)
    properties.assert_equal_bits(found, expected)
    assert torch.equal(found[3], torch.ones(6))
    assert scale == (2.0**11 if bad is None else 2.0**9)


def test_unscale_belongs_between_the_captures_and_the_synthesis():
    f, r = (t.float() for t in inputs.pair(6))
    p = torch.ones(6, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), scaler_on(ANY)
    buckets = sago.GradientBuckets([p])
    for capture, g, says in ((buckets.forget, f, "forget gradient"), (buckets.retain, r, "retain gradient")):
        with pytest.raises(ValueError, match=f"{says} should be captured"):
            buckets.unscale_(scaler, optimizer)
        with capture():
            scaled(scaler, p, g)
            with pytest.raises(ValueError, match="Captures should be closed"):
                buckets.unscale_(scaler, optimizer)
    buckets.unscale_(scaler, optimizer)
    for late in (buckets.forget, buckets.retain, buckets.synthesize_in_backward):
        with pytest.raises(ValueError, match="captured before unscale_"), late():
            pass
    # Nothing is lost by that.
    buckets.synthesize_("sago")
    properties.assert_equal_bits(grads([p]), bucketed(ANY, [f], [r], "sago")[0])
    for end in (buckets.zero_, lambda: buckets.synthesize_("sago")):
        scaler.step(optimizer)
        scaler.update()
        buckets.zero_()
        for capture, g in ((buckets.forget, f), (buckets.retain, r)):
            with capture():
                scaled(scaler, p, g)
        buckets.unscale_(scaler, optimizer)
        end()


def test_gradients_that_are_unscaled_already_are_refused():
    """A scaler for each loss, or one optimizer twice: the second division would be of both sides."""
    f, r = ([t.float()] for t in inputs.pair(6))
    (p,), buckets = fresh(ANY, f, r)
    optimizer, scalers = torch.optim.SGD([p], lr=1.0), [scaler_on(ANY), scaler_on(ANY)]
    for capture, (g,), scaler in zip((buckets.forget, buckets.retain), (f, r), scalers, strict=True):
        with capture():
            scaled(scaler, p, g)
    buckets.unscale_(scalers[0], optimizer)
    before = [g.clone() for g in (*buckets.forget_grads, *buckets.retain_grads)]
    for scaler in scalers:
        with pytest.raises(ValueError, match=r"once a window.*`params\[0\]` are unscaled already"):
            buckets.unscale_(scaler, optimizer)
    properties.assert_equal_bits([*buckets.forget_grads, *buckets.retain_grads], before)
    buckets.synthesize_("sago")
    properties.assert_equal_bits(grads([p]), bucketed(ANY, f, r, "sago")[0])


class Wrapper(torch.optim.Optimizer):
    """As accelerate wraps an optimizer, whose own is what the scaler steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.optimizer.param_groups = groups


@pytest.fixture
def accelerated():
    """The class of accelerate that wraps an optimizer."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.Accelerator(cpu=True)
    yield accelerate.optimizer.AcceleratedOptimizer
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def captured(optimizer):
    """Buckets with a forget gradient of 2 and a retain gradient of 3, times the scale, and the scaler."""
    (p,), buckets = fresh(ANY, [torch.ones(3)], [torch.ones(3)])
    optimizer.add_param_group({"params": [p]})
    scaler = scaler_on(ANY)
    for capture, value in ((buckets.forget, 2.0), (buckets.retain, 3.0)):
        with capture():
            scaled(scaler, p, torch.full((3,), value))
    return p, buckets, scaler


def assert_unscaled_once(wrapper, optimizer):
    p, buckets, scaler = captured(optimizer)
    buckets.unscale_(scaler, wrapper)
    buckets.synthesize_("sum")
    scaler.step(optimizer)
    assert (p.detach() == -5.0).all()


def plain_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_a_wrapped_optimizer_is_unscaled_once():
    optimizer = plain_optimizer()
    assert_unscaled_once(Wrapper(Wrapper(optimizer)), optimizer)


def test_the_wrapper_of_accelerate_is_unscaled_once(accelerated):
    optimizer = plain_optimizer()
    assert_unscaled_once(accelerated(optimizer), optimizer)


@pytest.mark.parametrize("base", ["accelerate", "a class made from it"])
def test_a_wrapper_of_accelerate_without_the_name_is_refused(base):
    """If the wrapper were unscaled instead of its optimizer, `scaler.step` would divide a second time."""

    class Renamed(torch.optim.Optimizer):
        __module__ = "accelerate.optimizer"

        def __init__(self, optimizer):
            self.wrapped = optimizer

        param_groups = property(
            lambda self: self.wrapped.param_groups, lambda self, x: setattr(self.wrapped, "param_groups", x)
        )

    kind = Renamed if base == "accelerate" else type("Renamed", (Renamed,), {"__module__": "mine"})
    optimizer = plain_optimizer()
    p, buckets, scaler = captured(optimizer)
    with pytest.raises(RuntimeError, match=r"accelerate should have the .*`Renamed\.optimizer`.*Install"):
        buckets.unscale_(scaler, kind(optimizer))
    buckets.unscale_(scaler, optimizer)  # nothing was written
    buckets.synthesize_("sum")
    assert (p.grad == 5.0).all()


def test_an_interrupted_unscaling_is_not_repeated():
    """Some gradients may be divided already."""
    optimizer = plain_optimizer()
    p, buckets, scaler = captured(optimizer)
    stopped = mock.patch.object(scaler, "unscale_", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        buckets.unscale_(scaler, optimizer)
    for call in (buckets.synthesize_, lambda: buckets.unscale_(scaler, optimizer)):
        with pytest.raises(ValueError, match=r"should be whole.*KeyboardInterrupt.*Call zero_"):
            call()
    buckets.zero_()
    assert p.grad is None


def test_gradients_of_which_some_are_unscaled_have_no_common_norm():
    gradients = [torch.full((3,), 2.0), torch.full((3,), 3.0)]
    params, buckets = fresh(ANY, gradients, gradients)
    optimizers, scaler = [torch.optim.SGD([p]) for p in params], scaler_on(ANY)
    for capture in (buckets.forget, buckets.retain):
        with capture():
            scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()
    buckets.unscale_(scaler, optimizers[0])
    for options in ({"max_norm": 1.0}, {"eps": 1.0}, {"rule": "blur"}):
        with pytest.raises(ValueError, match=r"All gradients should be unscaled.*`params\[1\]`"):
            buckets.synthesize_(**options)
    buckets.unscale_(scaler, optimizers[1])
    buckets.synthesize_("sum", max_norm=1e6)
    for p, g in zip(params, gradients, strict=True):
        assert torch.equal(p.grad, 2 * g)
