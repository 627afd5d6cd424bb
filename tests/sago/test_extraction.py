"""Captures of `GradientBuckets`: what they accumulate, and every way to use them wrongly.

What random schedules accumulate is tested in tests/fuzz. The gradients here are known beforehand:
`(p * g).sum().backward()` gives `p` the gradient `g`.
"""

import gc

import pytest
import torch
from torch import nn

import sago
from tests.support.backends import DTYPES
from tests.support.captures import BF16, FORMS, FP32, FP64, SIDES, Window, refused
from tests.support.properties import assert_equal_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FORMS)
def window(request):
    return Window(*FORMS[request.param])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_keep_their_signs(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)
    buckets = sago.GradientBuckets([p])
    for _ in range(2):
        with buckets.forget():
            p.backward(zeros)
        with buckets.retain():
            p.backward(-zeros)
        assert_equal_bits([*buckets.forget_grads, *buckets.retain_grads], [zeros, -zeros])
        buckets.zero_()


@pytest.mark.parametrize("options", [{}, {"accumulate_dtype": FP64}, {"bucket_cap_mb": 1e-6}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulators_are_aligned_and_laid_out_like_their_parameters(dtype, options):
    tensors = [
        torch.randn(()),
        torch.randn(3, 7).t(),
        torch.randn(0, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1),
        torch.randn(5, 4, 3).permute(1, 2, 0),
        torch.randn(33),
    ]
    params = [nn.Parameter(t.to(dtype)) for t in tensors]
    buckets = sago.GradientBuckets(params, **options)
    losses = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    for side, gradients in zip(SIDES, losses, strict=True):
        with getattr(buckets, side)():
            torch.autograd.backward(params, gradients)
    for side, gradients in zip(SIDES, losses, strict=True):
        found = getattr(buckets, f"{side}_grads")
        assert_equal_bits([g.to(dtype) for g in found], gradients)
        for g, p in zip(found, params, strict=True):
            assert g.stride() == p.stride()
            assert g.data_ptr() % 16 == 0
    buckets.synthesize_("sago", alpha=2.0)
    expected, _ = sago.reference.synthesize(*losses, "sago", alpha=2.0)
    assert_equal_bits([p.grad for p in params], expected)
    assert [p.grad.stride() for p in params] == [p.stride() for p in params]


def test_accumulation_in_fp32_loses_nothing_that_bf16_would():
    steps = [1.0, *[2.0**-9] * 64]
    found = {}
    for accumulate_dtype in (None, FP32):
        p = nn.Parameter(torch.ones(2, dtype=BF16))
        buckets = sago.GradientBuckets([p], accumulate_dtype=accumulate_dtype)
        for side in SIDES:
            with getattr(buckets, side)():
                for step in steps:
                    (p * step).sum().backward()
        buckets.synthesize_("sum", alpha=0.0)
        found[accumulate_dtype] = p.grad[0].item()
    assert found == {None: 1.0, FP32: 1.125}


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_is_over_the_captures_that_had_a_backward(form):
    window = Window(*FORMS[form], accumulation="mean")
    window.capture("forget", w=4.0)
    with window.open("forget"):
        window.backward("forget", w=1.0)
        window.backward("forget", w=1.0)  # two backwards, one capture
    with window.open("retain"):  # a frame for others, with no backward of its own
        window.capture("retain", w=-5.0)
        window.capture("retain", w=1.0)
    window.check()
    window.buckets.synthesize_("sum")
    assert torch.equal(
        window.params["w"].grad, torch.full_like(window.params["w"], (4 + 2) / 2 + (-5 + 1) / 2)
    )
    assert window.params["v"].grad is None


def test_a_capture_within_one_of_the_other_side(window):
    with window.open("forget"):
        window.backward("forget", w=1.0)
        with window.open("retain"):
            window.backward("retain", w=2.0, v=4.0)
            with window.open("forget"):
                window.backward("forget", w=8.0)
            window.backward("retain", w=16.0)
        window.backward("forget", v=32.0)
    window.finish()


def test_a_forward_that_both_sides_share(window):
    x = window.params["w"] * 2
    with window.open("forget"):
        x.sum().backward(retain_graph=True)
    with window.open("retain"):
        (-x).sum().backward(retain_graph=True)
    (f, _), (r, _) = window.buckets.forget_grads, window.buckets.retain_grads
    assert_equal_bits([f, r], [torch.full_like(f, 2.0), torch.full_like(r, -2.0)])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_create_graph(window):
    w = window.params["w"]
    for _ in range(2):
        for side, sign in zip(SIDES, (1, -1), strict=True):
            with window.open(side):
                (sign * w * w).sum().backward(create_graph=True)
                (sign * w * w * w).sum().backward()
    for side, sign in zip(SIDES, (1, -1), strict=True):
        g = getattr(window.buckets, f"{side}_grads")[0]
        assert_equal_bits([g], [torch.full_like(w, sign * 10.0, dtype=window.wide, requires_grad=False)])
        assert not g.requires_grad
    window.buckets.synthesize_()
    assert not w.grad.requires_grad


ERRORS = (RuntimeError("stop"), KeyboardInterrupt("stop"))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_after_an_exception_ahead_of_any_backward_the_window_goes_on(window, error):
    window.capture("forget", w=2.0)
    for side in SIDES:
        with refused(window.buckets, "stop", type(error)):
            window.fail(error, side)
        window.check()
    window.finish()


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("side", SIDES)
def test_after_an_exception_behind_a_backward_only_zero_helps(window, error, side):
    window.capture("forget", w=2.0)
    window.capture("retain", w=2.0)
    with pytest.raises(type(error), match="stop"):
        window.fail(error, side, w=1.0)
    assert window.grads() == [None, None]
    for call in (window.buckets.synthesize_, *window.entries()):
        with refused(window.buckets, f"{side} capture ended in {type(error).__name__}.*stop.*zero_"):
            call()
        assert window.grads() == [None, None]
    window.zero_()
    window.finish()


def stop(*_):
    raise RuntimeError("stop")


def test_an_exception_in_a_backward_that_had_reached_a_parameter(window):
    window.capture("retain", w=2.0)
    w, v = window.params.values()
    x = v * 1.0
    x.register_hook(stop)
    loss = (x.sum() * w).sum()
    with pytest.raises(RuntimeError, match="stop"), window.open("forget"):
        loss.backward()
    assert window.buckets.forget_grads[0] is not None
    assert window.grads() == [None, None]
    with refused(window.buckets, "forget capture ended in.*stop"):
        window.enter("forget")
    window.zero_()
    window.finish()


def test_an_exception_in_a_backward_that_had_reached_none(window):
    window.capture("retain", w=2.0)
    loss = window.loss(w=1.0)
    loss.register_hook(stop)
    with refused(window.buckets, "stop", RuntimeError), window.open("forget"):
        loss.backward()
    window.finish()


def test_an_exception_within_a_nested_capture_reaches_those_around_it(window):
    error = RuntimeError("stop")
    with refused(window.buckets, "stop", RuntimeError), window.open("forget"):
        window.fail(error, "retain")
    window.check()
    window.capture("forget", w=1.0)
    outer = window.open("forget")
    outer.__enter__()
    window.loss(w=1.0).backward()
    with pytest.raises(RuntimeError, match="stop"):
        window.fail(error, "retain")
    outer.__exit__(RuntimeError, error, None)
    assert window.grads() == [None, None]
    with refused(window.buckets, "forget capture ended in"):
        window.enter("retain")


@pytest.mark.parametrize("side", SIDES)
def test_a_capture_without_a_backward(window, side):
    window.capture("forget", w=2.0)
    other = nn.Parameter(torch.ones(2))
    with refused(window.buckets, f"A {side} capture should have a backward.*none"), window.open(side):
        pass
    with refused(window.buckets, f"A {side} capture should have a backward.*none"), window.open(side):
        other.sum().backward()
    with refused(window.buckets, f"A {side} capture"), window.open("forget"), window.open(side):
        pass
    window.finish()


def test_a_zero_grad_to_none_is_no_backward(window):
    window.capture("retain", w=2.0)
    optimizer = torch.optim.SGD(window.params.values(), 0.1)
    with refused(window.buckets, "A forget capture should have a backward.*none"), window.open("forget"):
        optimizer.zero_grad(set_to_none=True)
    window.finish()


def test_a_zero_grad_to_zero_counts_as_a_gradient_of_zeros():
    """It writes to the accumulators, as a backward does."""
    window = Window()
    with window.open("forget"):
        torch.optim.SGD(window.params.values(), 0.1).zero_grad(set_to_none=False)
    assert all((g == 0).all() for g in window.buckets.forget_grads)
    window.capture("retain", w=2.0)
    window.buckets.synthesize_("sum")
    assert [p.grad.tolist() for p in window.params.values()] == [[2.0] * 3, [0.0] * 5]


def test_a_synthesis_ahead_of_both_captures(window):
    for captured, missing in ((None, "forget"), ("forget", "retain")):
        if captured:
            window.capture(captured, w=2.0)
        with refused(window.buckets, f"{missing} gradient should be captured.*buckets.{missing}"):
            window.buckets.synthesize_()
    window.finish()
    window.capture("retain", v=2.0)
    with refused(window.buckets, "forget gradient should be captured"):
        window.buckets.synthesize_()
    window.finish()


@pytest.mark.parametrize("side", SIDES)
def test_a_synthesis_and_zero_within_a_capture(window, side):
    window.capture("forget", w=2.0)
    window.capture("retain", w=2.0)
    capture = window.open(side)
    capture.__enter__()
    for call in (window.buckets.synthesize_, window.buckets.zero_):
        with refused(window.buckets, rf"Captures should be closed.*open {side}\(\)"):
            call()
    window.backward(side, v=4.0)  # the capture is still open
    capture.__exit__(None, None, None)
    window.finish()


def test_a_second_synthesis_in_a_row(window):
    window.capture("forget", w=2.0)
    window.capture("retain", w=3.0)
    window.buckets.synthesize_("sum")
    update = window.params["w"].grad
    with refused(window.buckets, "should be captured.*since the last synthesis"):
        window.buckets.synthesize_("sum")
    assert window.params["w"].grad is update
    assert torch.equal(update, torch.full_like(update, 5.0))


def test_the_next_capture_with_the_update_still_there(window):
    optimizer = torch.optim.SGD(window.params.values(), 0.1)
    window.capture("forget", w=2.0)
    window.capture("retain", w=3.0)
    window.buckets.synthesize_("sum")
    update = window.params["w"].grad
    for expected in (5.0, 0.0):
        for side in SIDES:
            with refused(window.buckets, r"last update.*zero_\(\).*`w.grad`"):
                window.enter(side)
            assert window.params["w"].grad is update
            assert torch.equal(update, torch.full_like(update, expected))
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad(set_to_none=True)
    window.start_anew()
    window.finish()


@pytest.mark.parametrize("place", ["ahead", "between", "behind"])
def test_a_backward_outside_of_captures_is_noticed_and_kept_apart(window, place):
    if place != "ahead":
        window.capture("forget", w=2.0)
    if place == "behind":
        window.capture("retain", w=3.0)
    window.loss(v=7.0).backward()
    stray = window.params["v"].grad
    calls = window.entries()
    if place == "behind":
        calls.append(window.buckets.synthesize_)
    for call in calls:
        with refused(window.buckets, "Backwards should run within.*`v.grad`.*None"):
            call()
        assert window.params["v"].grad is stray
        assert torch.equal(stray, torch.full_like(stray, 7.0))
    window.params["v"].grad = None
    window.finish()


def out_of_order(window):
    """The inner capture, still open when the one around it has been closed."""
    window.capture("forget", w=1.0)
    outer, inner = window.open("forget"), window.open("retain")
    outer.__enter__()
    inner.__enter__()
    window.loss(w=5.0).backward()
    with pytest.raises(ValueError, match=r"closed in reverse order.*forget capture"):
        outer.__exit__(None, None, None)
    assert_equal_bits(window.buckets.forget_grads, window.totals["forget"])
    assert window.grads() == [None, None]
    for call in (window.buckets.synthesize_, *window.entries()):
        with refused(window.buckets, "forget capture was closed before one within it.*zero_"):
            call()
    return inner


def test_captures_closed_out_of_order(window):
    inner = out_of_order(window)
    with refused(window.buckets, "closed in reverse order"):
        inner.__exit__(None, None, None)
    window.zero_()
    window.finish()


@pytest.mark.parametrize("late", ["closed", "closed by an exception", "collected as garbage"])
def test_captures_closed_out_of_order_and_in_another_window(window, late):
    inner = out_of_order(window)
    window.zero_()
    window.capture("forget", w=1.0)
    window.capture("retain", w=1.0, v=2.0)
    window.check()
    if late == "closed":
        with refused(window.buckets, "closed in reverse order"):
            inner.__exit__(None, None, None)
    elif late == "closed by an exception":
        error = RuntimeError("stop")
        inner.__exit__(RuntimeError, error, None)
    del inner
    gc.collect()
    window.finish()


CHANGES = {
    "cast": (lambda p: p.to(FP64), "torch.float64"),
    "resized": (lambda p: torch.ones(4, dtype=p.dtype), r"\(4,\)"),
    "moved": (lambda p: p.to("cuda"), "cuda"),
}
CHANGE_PARAMS = [pytest.param(c, marks=pytest.mark.gpu) if c == "moved" else c for c in CHANGES]


@pytest.mark.parametrize("change", CHANGE_PARAMS)
@pytest.mark.parametrize("captures", [0, 1, 2])
def test_a_parameter_that_is_another_than_it_was(window, change, captures):
    for side in SIDES[:captures]:
        window.capture(side, w=2.0, v=1.0)
    v, (apply, says) = window.params["v"], CHANGES[change]
    before = v.data
    v.data = apply(before)
    calls = window.entries()
    if captures == 2:
        calls.append(window.buckets.synthesize_)
    for call in calls:
        with refused(window.buckets, f"`v` should be as it was.*Found.*{says}.*new GradientBuckets"):
            call()
        assert window.grads() == [None, None]
    v.data = before
    window.finish()


def test_a_parameter_that_is_unfrozen():
    w, v = (nn.Parameter(torch.ones(2)) for _ in range(2))
    v.requires_grad_(False)
    buckets = sago.GradientBuckets([("w", w), ("v", v)])
    with buckets.forget():
        w.sum().backward()
    v.requires_grad_(True)
    with refused(buckets, "`v` should be frozen"):
        buckets.retain().__enter__()
    v.requires_grad_(False)
    with buckets.retain():
        w.sum().backward()
    buckets.synthesize_()


def test_a_parameter_that_is_added():
    model = nn.Sequential(nn.Linear(2, 2))
    buckets = sago.GradientBuckets(model)
    for change in (lambda: model.append(nn.Linear(2, 2)), lambda: setattr(model[0], "bias", None)):
        change()
        with refused(buckets, "parameters that it had.*new GradientBuckets"):
            buckets.forget().__enter__()
        buckets = sago.GradientBuckets(model)
        with buckets.forget():
            model(torch.ones(1, 2)).sum().backward()
        buckets.zero_()


def test_a_parameter_that_is_frozen_later(window):
    window.capture("forget", w=1.0, v=4.0)
    v = window.params["v"].requires_grad_(False)
    window.capture("retain", w=2.0, v=9.0)
    window.totals["retain"][1] = None
    window.check()
    window.buckets.synthesize_("sum", gamma=2.0)
    assert torch.equal(v.grad, torch.full_like(v, 8.0))
    window.zero_()
    for side in SIDES:
        window.capture(side, w=2.0)
    window.buckets.synthesize_("sum")
    assert v.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
def test_sparse_gradients(form, side):
    dtype, accumulate_dtype = FORMS[form]
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "words": nn.Embedding(5, 2, sparse=True)}).to(dtype)
    buckets = sago.GradientBuckets(model, accumulate_dtype=accumulate_dtype)
    if side == "retain":
        with buckets.forget():
            model["dense"](torch.ones(1, 2, dtype=dtype)).sum().backward()
    with (
        refused(buckets, "`words.weight` should be dense.*sparse=False", TypeError),
        getattr(buckets, side)(),
    ):
        model["words"](torch.tensor([1, 1])).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with getattr(buckets, side)():
        model["dense"](torch.ones(1, 2, dtype=dtype)).sum().backward()


class Copies(torch.autograd.Function):
    """Copies of the inputs. If a loss uses one of them only, autograd has no gradient for the others."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


@pytest.mark.parametrize(
    ("options", "in_backward"),
    [
        *(({}, x) for x in (False, True)),
        *(({"accumulate_dtype": FP64}, x) for x in (False, True)),
        *(({"retain_decay": 0.5}, x) for x in (False, True)),
        ({"one_copy": True}, True),
    ],
)
def test_a_parameter_for_which_autograd_has_no_gradient_is_not_reached(options, in_backward):
    p, q, neither = params = [torch.ones(3, requires_grad=True) for _ in range(3)]
    buckets = sago.GradientBuckets(params, **options)
    for _ in range(2):
        with buckets.forget():
            Copies.apply(*params)[0].sum().backward()
        with buckets.synthesize_in_backward("sago") if in_backward else buckets.retain():
            Copies.apply(*params)[1].sum().backward()
        if not in_backward:
            buckets.synthesize_("sago")
        assert torch.equal(p.grad, torch.ones(3))
        assert torch.equal(q.grad, torch.zeros(3))  # sago leaves out r where f is 0
        assert neither.grad is None
        buckets.zero_()


def test_one_buffer_for_all_of_a_kind():
    window = Window(bucket_cap_mb=float("inf"))
    window.finish()
    assert "1 buffers a side" in repr(window.buckets)


@pytest.mark.parametrize(
    ("error", "says", "reduce_gram"),
    [(RuntimeError, "stop", stop), (ValueError, "`reduce_gram`", lambda t: t[:, :1])],
    ids=["raises", "is wrong"],
)
def test_a_synthesis_with_a_wrong_reduction_can_be_called_again(window, error, says, reduce_gram):
    window.capture("forget", w=2.0)
    window.capture("retain", w=-3.0, v=1.0)
    with refused(window.buckets, says, error):
        window.buckets.synthesize_(reduce_gram=reduce_gram)
    window.finish()
