"""Runs windows of `GradientBuckets` on given gradients, and computes the expected results."""

import pytest
import torch

import sago
from sago.rules import ratio, where
from tests.support import inputs, oracle, properties
from tests.support.backends import DTYPES, RULES, Backend

BF16, FP16, FP32, FP64 = DTYPES
NAN, INF = torch.nan, torch.inf
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}
ALONE = {"bucket_cap_mb": 1e-6}  # a buffer a tensor
ANY = Backend("compiled", "cpu")  # for what is the same on all of them


def gated_by_products(ff, fr, rr, gamma, alpha):
    return gamma * ratio(fr, ff), alpha, gamma, where(fr < 0.0, alpha, -alpha) * ratio(ff, rr)


def normalized(ff, fr, rr, gamma, alpha):
    """A rule that uses only the directions of both gradients and the mean of their norms."""
    f, r = ff.sqrt(), rr.sqrt()
    size = (f + r) / 2
    return gamma * size / f, alpha * size / r


GATED = sago.Rule("gated", gated_by_products, scope="tensor", gated=True)
NORMALIZED = sago.Rule("ngdiff", normalized, scope="tensor")
DROPPED = sago.Rule("drop_conflicts", lambda *numbers: (0.0, 0.0, *numbers[3:]), "element", gated=True)


def rule_name(rule):
    return rule if isinstance(rule, str) else rule.name


def thin(backend, cases, rule):
    """The cases; where kernels are interpreted, which takes a while, one of them: another for each rule."""
    cases = list(cases)
    at = [*RULES, GATED, NORMALIZED, DROPPED].index(rule) % len(cases)
    return cases[at : at + 1] if backend == Backend("triton", "cpu") else cases


def small(dtype=FP32, family="scale_1"):
    return inputs.FAMILIES[family](dtype, dtype)


def fresh(backend, forget, retain, **made):
    """A parameter for each pair, of one element where both are None; and the buckets of them."""
    like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
    like = [torch.zeros(1) if t is None else t for t in like]
    params = [torch.zeros_like(t, device=backend.device, requires_grad=True) for t in like]
    return params, sago.GradientBuckets(params, backend=backend.name, **made)


def backward(params, gradients):
    """One backward that gives each parameter its gradient, unless that is None."""
    there = [(p, g.to(p.device)) for p, g in zip(params, gradients, strict=True) if g is not None]
    torch.autograd.backward(*zip(*there, strict=True))


def window(buckets, params, forget, retain, in_backward=None):
    """The captures. Given the arguments of `synthesize_in_backward`, also that; then returns the report."""
    with buckets.forget():
        backward(params, forget)
    with buckets.synthesize_in_backward(**in_backward) if in_backward else buckets.retain() as step:
        backward(params, retain)
    return step and step.report


def grads(params):
    return [None if p.grad is None else p.grad.detach().cpu().clone() for p in params]


def bucketed(backend, forget, retain, rule="sago", made=None, in_backward=False, **options):
    """A window through new buckets, made with the options `made`: the update of each and the report."""
    params, buckets = fresh(backend, forget, retain, **(made or {}))
    if in_backward:
        report = window(buckets, params, forget, retain, {"rule": rule, **options})
    else:
        window(buckets, params, forget, retain)
        report = buckets.synthesize_(rule, **options)
    return grads(params), report


def assert_equal_results(found, expected):
    """Updates and reports, bit for bit."""
    properties.assert_equal_bits(found[0], expected[0])
    assert_equal_reports(found[1], expected[1])


def assert_equal_reports(found, expected):
    assert (found.groups, found.absent) == (expected.groups, expected.absent)
    assert torch.equal(found.numel, expected.numel)
    for field in (*properties.FIELDS, *properties.COUNTS, "conflict_fraction"):
        properties.assert_equal_bits([getattr(found, field)], [getattr(expected, field)])


def clipped(forget, retain, rule, max_norm, **options):
    """The reference's updates in fp64, clipped by torch to `max_norm`, and their norm before."""
    like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
    exact = [None if t is None else torch.empty_like(t, dtype=FP64) for t in like]
    sago.reference.synthesize_(forget, retain, rule, out=exact, **options)
    holders = [torch.zeros_like(u, requires_grad=True) for u in exact if u is not None]
    for p, u in zip(holders, (u for u in exact if u is not None), strict=True):
        p.grad = u
    return exact, torch.nn.utils.clip_grad_norm_(holders, max_norm).item()


def assert_clipped(result, forget, retain, rule, max_norm, **options):
    """The allowed error: that of the unclipped update, and that of the norm."""
    (updates, report), known = result, oracle.expect(forget, retain, rule, **options)
    expected, norm = clipped(forget, retain, rule, max_norm, **options)
    wide = all(t is None or t.dtype == FP64 for t in forget + retain)
    error = 4 * oracle.SUM_ERROR[FP64 if wide else FP32]
    error *= known.magnitudes["uu"].sum() / known.sums["uu"].sum()
    assert report.total_norm.item() == pytest.approx(norm, rel=error)
    for found, update, slack in zip(updates, expected, known.slack, strict=True):
        assert (found is None) == (update is None)
        if found is not None:
            right = oracle.array(update)
            properties.assert_between(found, right, min(max_norm / norm, 1.0) * slack + error * abs(right))


def with_nan(expected, forget, retain):
    """`expected` with NaN wherever either gradient is NaN or inf."""
    for i, pair in enumerate(zip(forget, retain, strict=True)):
        for t in pair:
            if t is not None:
                expected[i] = expected[i].where(t.isfinite(), NAN)
    return expected


def parts(gradients, count):
    """`count` lists of gradients that add up, without a rounding, to `2**(count - 1)` of the given ones."""
    sizes = [2.0 ** max(i - 1, 0) for i in range(count)]
    return [[None if t is None else size * t for t in gradients] for size in sizes]


def mean(gradients, count, dtype=None):
    """The mean of `parts`, which is exact if their number is a power of two."""
    factor = 2.0 ** (count - 1) / count
    return [None if t is None else (factor * t.double()).to(dtype or t.dtype) for t in gradients]


def averaged(backend, forget, retain, rule, counts, accumulation="mean", **options):
    """`bucketed` from captures of `parts`, the mean of which counts."""
    params, buckets = fresh(backend, forget, retain, accumulation=accumulation)
    for capture, side, count in zip((buckets.forget, buckets.retain), (forget, retain), counts, strict=True):
        for part in parts(side, count):
            with capture():
                backward(params, part)
    report = buckets.synthesize_(rule, **options)
    return grads(params), report


def model_of(dtype, device):
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).to(device, dtype)


def losses(model, step=0):
    """Of forget and of retain, on batches of the step's own."""
    x = inputs.normal(4 * 5 * 2, 100 + step).view(2, 4, 5).to(next(model.parameters()))
    return -(model(x[0]) ** 2).mean(), ((model(x[1]) - 1) ** 2).mean()
