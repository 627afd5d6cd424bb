"""The rules against the formulation of the released code: where they agree, and where and why they differ.

Agreement is to rounding: both formulations are within `4 * eps * (|f| + |r|)`, norms over the projection's
group, of the exact result; the inner products of the released code are plain sums in the gradients' dtype.
"""

import pytest
import torch

from benchmarks.released import EPS, RULES, released
from tests.support import inputs, oracle
from tests.support.backends import GLOBAL

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}
FEW = oracle.rounding_error(16, FP64)  # a quotient of two exact sums, products and a sum


def lists(dtype, scale=1.0):
    """Tensors in conflict as a whole, and some that are not."""
    forget = [inputs.normal(n, i, scale).to(dtype) for i, n in enumerate((50, 3, 128, 1000))]
    retain = [
        (inputs.normal(f.numel(), 9 + i, scale) - (i % 3 > 0) * f.double()).to(dtype)
        for i, f in enumerate(forget)
    ]
    return forget, retain


def differences(found, expected):
    """The largest difference of each tensor, relative to the largest element."""
    return [
        ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
        for x, y in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "error"), [(FP32, 2e-6), (FP64, 1e-14)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_agreement(backend, rule, dtype, error, scale):
    """At scales where the released epsilon does not bite, and is given as `eps` all the same."""
    forget, retain = lists(dtype, scale)
    updates, _ = backend(forget, retain, rule, eps=EPS, **WEIGHTS)
    if rule in GLOBAL:
        error = 2e-6  # the released code adds up these inner products in fp32, whatever the gradients are
    assert max(differences(updates, released(forget, retain, rule, **WEIGHTS))) < error


def test_the_lists_have_both_signs():
    forget, retain = lists(FP64)
    signs = {(f @ r).sign().item() for f, r in zip(forget, retain, strict=True)}
    assert signs == {-1.0, 1.0}
    assert sum(f @ r for f, r in zip(forget, retain, strict=True)) < 0


def pair(s, dtype=FP64):
    return [torch.tensor([s, 0.0], dtype=dtype)], [torch.tensor([-s, s], dtype=dtype)]


@pytest.mark.parametrize("s", [1.0, 1e-6, 1e-8])
def test_the_epsilon_switches_the_projection_off_at_small_scales(backend, s):
    # <f,r> = -s^2, <r,r> = 2 s^2: the projection adds r/2, of which 2s^2 / (2s^2 + 1e-10) is left.
    forget, retain = pair(s)
    (theirs,) = released(forget, retain, "pcgrad")
    whole = forget[0] + 1.5 * retain[0]
    share = ((theirs - forget[0] - retain[0]) / (0.5 * retain[0]))[1].item()
    # What is left of the projection is the difference of two numbers that are up to 5e5 times as large.
    assert share == pytest.approx(2 * s**2 / (2 * s**2 + EPS), rel=1e6 * FEW)
    (ours,), _ = backend(forget, retain, "pcgrad")
    torch.testing.assert_close(ours, whole, rtol=FEW, atol=0)
    (with_eps,), _ = backend(forget, retain, "pcgrad", eps=EPS)  # parity, if wanted
    torch.testing.assert_close(with_eps, theirs, rtol=FEW, atol=0)


def test_a_saturated_forget_loss_with_blur(backend):
    """`blur` divides by `<f,f>`, here as small as the epsilon: the released code leaves out half of it."""
    forget, retain = ([inputs.normal(1000, i) for i in seeds] for seeds in ((1, 2), (3, 4)))
    retain = [r - f for f, r in zip(forget, retain, strict=True)]
    forget = [f * (EPS / 2000) ** 0.5 for f in forget]
    theirs = released(forget, retain, "blur")
    with_eps, _ = backend(forget, retain, "blur", eps=EPS)
    without, _ = backend(forget, retain, "blur")
    assert max(differences(with_eps, theirs)) < 2e-6  # as in `test_agreement`
    assert min(differences(without, theirs)) > 0.1


def test_a_hidden_inf_is_the_same_but_counted(backend):
    f, r = torch.tensor([torch.inf, 2.0]), torch.tensor([-1.0, 1.0])
    (theirs,) = released([f], [r], "sago", alpha=2.0)
    (ours,), report = backend([f], [r], "sago", alpha=2.0)
    assert theirs.tolist() == ours.tolist() == [-2.0, 2.0]
    assert report.nonfinite_forget.item() == 1


def test_bf16_products_are_not_rounded(backend):
    """Theirs are, and so is their sum: the projection is off by more than the update is rounded by."""
    f = (inputs.normal(4000, 1) + 0.25).to(BF16)
    r = (inputs.normal(4000, 2) - 0.25).to(BF16)
    k = ((f.double() @ r.double()) / (r.double() @ r.double())).item()
    exact = -k * r.double()

    def error(update):  # of the projection: gamma 1, alpha 0
        return ((update.double() - f.double() - exact).norm() / exact.norm()).item()

    (ours,), _ = backend([f.float()], [r.float()], "pcgrad", alpha=0.0)
    dot = (f * r).sum()  # as released, in bf16
    theirs = -(dot / ((r * r).sum() + EPS)).item() * r.double() + f.double()
    assert error(ours) < 1e-5
    assert error(theirs) > 1e-4
    (rounded,), _ = backend([f], [r], "pcgrad", alpha=0.0)
    (released_update,) = released([f], [r], "pcgrad", alpha=0.0)
    expected = oracle.expect([f], [r], "pcgrad", alpha=0.0).updates[0]
    ours_off, theirs_off = (abs(oracle.array(u) - expected).mean() for u in (rounded, released_update))
    assert ours_off < theirs_off


def test_none_is_a_zero_gradient_and_crashes_there(backend):
    r = torch.tensor([1.0, -2.0])
    with pytest.raises(TypeError):
        released([None], [r], "sum")
    (update,), _ = backend([None], [r], "sum", alpha=2.0)
    assert torch.equal(update, 2 * r)


def test_squares_that_underflow(backend):
    """Where the products are 0 in fp32, neither projects."""
    f, r = torch.full((3,), 1e-30), torch.full((3,), -1e-30)
    (update,), _ = backend([f], [r], "pcgrad", gamma=2.0)
    if backend.name != "reference":  # whose sums are float64 and see them
        assert torch.equal(update, released([f], [r], "pcgrad", gamma=2.0)[0])
