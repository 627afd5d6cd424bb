"""The gallery: each rule by what defines it, against TorchJD where TorchJD has it, and on every backend."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import sago
import sago.reference
from examples import rules
from examples.rules import RULES
from sago.rules import evaluate
from tests.conftest import needs_triton
from tests.support import inputs

DOUBLE = torch.float64
COMPILED = ["and_mask", "agreeing", "a_gem", "orthograd", "pcgrad_symmetric", "dualproj", "mgda"]
DEGREE_0 = ["ngdiff", "nash_mtl"]


def pair(angle, f_norm=1.0, r_norm=1.0, size=40, seed=0):
    """Two random vectors of these norms with this angle (degrees) between them."""
    generator = np.random.default_rng(seed)
    u, v = np.linalg.qr(generator.standard_normal((size, 2)))[0].T
    angle = np.radians(angle)
    return f_norm * u, r_norm * (np.cos(angle) * u + np.sin(angle) * v)


# Conflict and agreement, weak and strong, either gradient the longer one.
PAIRS = {
    f"{angle} degrees, |f| = {f}, |r| = {r}": pair(angle, f, r, seed=i)
    for i, (angle, f, r) in enumerate(
        [
            (100, 1.0, 1.0),
            (170, 1.0, 3.0),
            (130, 5.0, 1.0),
            (91, 1.0, 1.2),
            (89, 2.0, 1.0),
            (60, 1.0, 1.0),
            (30, 1.0, 4.0),
            (20, 4.0, 1.0),
            (5, 1.0, 1.0),
            (90, 1.0, 2.0),
        ]
    )
}
pairs = pytest.mark.parametrize(("f", "r"), PAIRS.values(), ids=PAIRS)


def update(rule, f, r, gamma=1.0, alpha=1.0):
    rule = RULES[rule] if isinstance(rule, str) else rule
    updates, _ = sago.synthesize([torch.from_numpy(f)], [torch.from_numpy(r)], rule, gamma, alpha)
    return updates[0].numpy()


def close(found, expected, rtol=1e-10):
    """In fp64: 100 roundings, of sums that cancel to 1e-2 of their magnitudes at 89 degrees, are 1e-12."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * max(1e-300, abs(expected).max()))


def unit(x):
    return x / np.linalg.norm(x)


# What defines each rule.


def test_the_masks():
    f, r = np.array([1.0, -2.0, 3.0, 0.0]), np.array([-1.0, -1.0, 5.0, 2.0])
    close(update("and_mask", f, r, 2.0, 3.0), np.array([0.0, -7.0, 21.0, 6.0]))
    close(update("agreeing", f, r, 2.0, 3.0), np.array([0.0, -4.0, 6.0, 0.0]))


@pairs
def test_a_gem_keeps_forget_or_makes_it_orthogonal_to_retain(f, r):
    found = update("a_gem", f, r, gamma=2.0)
    if f @ r >= 0:
        close(found, 2.0 * f)
    else:
        assert abs(found @ r) < 1e-12
        close(found, 2.0 * (f - (f @ r) / (r @ r) * r))


@pairs
def test_orthograd_is_orthogonal_to_retain_but_for_alpha(f, r):
    assert abs(update("orthograd", f, r, alpha=0.0) @ r) < 1e-12
    close(update("orthograd", f, r, 2.0, 3.0), 2.0 * (f - (f @ r) / (r @ r) * r) + 3.0 * r)


@pairs
def test_pcgrad_symmetric_projects_both(f, r):
    found = update("pcgrad_symmetric", f, r, 2.0, 3.0)
    if f @ r >= 0:
        close(found, 2.0 * f + 3.0 * r)
    else:
        close(found, 2.0 * (f - (f @ r) / (r @ r) * r) + 3.0 * (r - (f @ r) / (f @ f) * f))
    assert found @ f >= -1e-12
    assert found @ r >= -1e-12


@pairs
def test_dualproj_is_the_nearest_that_goes_against_neither(f, r):
    """By the optimality conditions: feasible, moved along a gradient only if that one's bound is reached."""
    for gamma, alpha in ((1.0, 1.0), (4.0, 0.5), (0.1, 3.0)):
        found = update("dualproj", f, r, gamma, alpha)
        moved = np.linalg.lstsq(np.stack([f, r]).T, found - gamma * f - alpha * r, rcond=None)[0]
        slack = np.array([found @ f, found @ r])
        assert (slack > -1e-10).all()
        assert (moved > -1e-10).all()
        assert abs(moved * slack).max() < 1e-9


@pairs
def test_mgda_is_the_shortest_convex_combination(f, r):
    x = np.linspace(0.0, 1.0, 20001)[:, None]
    lengths = np.linalg.norm(x * (2.0 * f) + (1.0 - x) * (3.0 * r), axis=1)
    found = update("mgda", f, r, 2.0, 3.0)
    assert np.linalg.norm(found) <= lengths.min() * (1 + 1e-12)
    assert np.linalg.norm(found) >= lengths.min() * (1 - 1e-6)


@pairs
def test_cosine_gate_lets_forget_in_as_far_as_it_agrees(f, r):
    close(update("cosine_gate", f, r, 2.0, 3.0), 3.0 * r + 2.0 * max(0.0, unit(f) @ unit(r)) * f)


@pairs
def test_ngdiff_is_a_sum_of_unit_vectors(f, r):
    close(update("ngdiff", f, r, 2.0, 3.0), 2.0 * unit(f) + 3.0 * unit(r))


@pairs
def test_imtl_g_goes_equally_far_along_both(f, r):
    found = update("imtl_g", f, r, 2.0, 3.0)
    assert found @ unit(f) == pytest.approx(found @ unit(r), rel=1e-9)
    weights = np.linalg.lstsq(np.stack([2.0 * f, 3.0 * r]).T, found, rcond=None)[0]
    assert weights.sum() == pytest.approx(1.0)


@pairs
def test_nash_mtl_solves_its_equation(f, r):
    weights = np.linalg.lstsq(np.stack([f, r]).T, update("nash_mtl", f, r), rcond=None)[0]
    gram = np.stack([f, r]) @ np.stack([f, r]).T
    np.testing.assert_allclose(weights * (gram @ weights), 1.0, rtol=1e-7)


@pairs
def test_config_has_one_cosine_and_the_length_of_the_projections(f, r):
    f, r = 2.0 * f, 3.0 * r
    found = update("config", f / 2.0, r / 3.0, 2.0, 3.0)
    assert found @ unit(f) == pytest.approx(found @ unit(r), rel=1e-9)
    assert np.linalg.norm(found) == pytest.approx((f + r) @ unit(found), rel=1e-9)


@pairs
def test_aligned_mtl_from_eigenvalues(f, r):
    rows = np.stack([f, r])
    values, vectors = np.linalg.eigh(rows @ rows.T)
    transform = np.sqrt(values[0]) * vectors @ np.diag(values**-0.5) @ vectors.T
    close(update("aligned_mtl", f, r, 2.0, 3.0), transform @ [2.0, 3.0] @ rows, rtol=1e-8)


@pairs
@pytest.mark.parametrize("radius", [0.1, 0.5, 0.9])
def test_cagrad_serves_the_worse_of_the_two_best(f, r, radius):
    """On the circle around the mean that bounds the ball nothing serves them better."""
    f, r = 2.0 * f, 3.0 * r
    mean = (f + r) / 2.0
    length = radius * np.linalg.norm(mean)
    rule = sago.Rule("cagrad", rules.cagrad(radius), "global")
    found = update(rule, f / 2.0, r / 3.0, 2.0, 3.0)
    assert np.linalg.norm(found - mean) == pytest.approx(length, rel=1e-6)
    plane = np.linalg.qr(np.stack([f, r]).T)[0]
    circle = np.linspace(0.0, 2.0 * np.pi, 10001)
    others = mean + length * np.stack([np.cos(circle), np.sin(circle)]).T @ plane.T
    best = np.minimum(others @ f, others @ r).max()
    assert min(found @ f, found @ r) >= best - 1e-9


@pairs
@pytest.mark.parametrize("target", [-0.3, 0.0, 0.2])
def test_gradvac_reaches_its_cosine(f, r, target):
    rule = sago.Rule("gradvac", rules.gradvac(target), "global")
    for moved, fixed, weights in ((f, r, (1.0, 0.0)), (r, f, (0.0, 1.0))):
        found = update(rule, f, r, *weights)
        cosine = unit(f) @ unit(r)
        if cosine >= target:
            close(found, moved)
        else:
            assert unit(found) @ unit(fixed) == pytest.approx(target, abs=1e-9)
            assert np.linalg.matrix_rank(np.stack([found - moved, fixed]), tol=1e-9) == 1


def test_a_rule_can_read_a_tensor_that_changes():
    f, r = pair(100)
    target = torch.zeros((), dtype=DOUBLE)
    rule = sago.Rule("gradvac", rules.gradvac(target), "global")
    for cosine in (0.0, 0.4, -0.5):
        target.fill_(cosine)
        close(update(rule, f, r), update(sago.Rule("fixed", rules.gradvac(cosine), "global"), f, r))


# TorchJD, with the weights as its preference vector where it has one.


def torchjd_aggregator(name):
    import torchjd.aggregation as torchjd
    from torchjd.linalg import QuadprogProjector

    both = torch.tensor([2.0, 3.0], dtype=DOUBLE)
    # Its regularisation, which is 1e-4 unless told otherwise, is part of no method.
    projector = None if find_spec("quadprog") is None else QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
    # The last number is the error that is left when its iteration or regularisation ends. Where it has
    # neither, it is 1e-8 for the inverse or the root of a Gram matrix of condition 1e3.
    return {
        "pcgrad_symmetric": lambda: (torchjd.PCGrad(), 1.0, 1.0, 1e-10),
        "upgrad": lambda: (torchjd.UPGrad(both, projector=projector), 2.0, 3.0, 1e-6),
        "dualproj": lambda: (torchjd.DualProj(both, projector=projector), 2.0, 3.0, 1e-6),
        "mgda": lambda: (torchjd.MGDA(epsilon=1e-9, max_iters=10000), 1.0, 1.0, 2e-3),
        "imtl_g": lambda: (torchjd.IMTLG(), 1.0, 1.0, 1e-8),
        "config": lambda: (torchjd.ConFIG(), 1.0, 1.0, 1e-8),
        "aligned_mtl": lambda: (torchjd.AlignedMTL(both), 2.0, 3.0, 1e-8),
        "cagrad": lambda: (torchjd.CAGrad(c=0.5, norm_eps=1e-12), 1.0, 1.0, 1e-4),
        "nash_mtl": lambda: (torchjd.NashMTL(2, max_norm=0.0, optim_niter=20), 1.0, 1.0, 1e-5),
        "gradvac": lambda: (torchjd.GradVac(beta=1.0, eps=0.0), 1.0, 1.0, 1e-8),
    }[name]()


NEEDS = {"upgrad": "quadprog", "dualproj": "quadprog", "cagrad": "cvxpy", "nash_mtl": "ecos"}


@pairs
@pytest.mark.parametrize(
    "name",
    [
        *("pcgrad_symmetric", "upgrad", "dualproj", "mgda", "imtl_g"),
        *("config", "aligned_mtl", "cagrad", "nash_mtl", "gradvac"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")  # cvxpy, NashMTL
def test_against_torchjd(name, f, r):
    pytest.importorskip("torchjd", reason="needs TorchJD")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"TorchJD needs {NEEDS[name]} for it")
    aggregator, gamma, alpha, rtol = torchjd_aggregator(name)
    rule = RULES["pcgrad_symmetric" if name == "upgrad" else name]
    matrix = torch.from_numpy(np.stack([f, r]))
    if name == "gradvac":  # with beta 1 the target is the cosine of the call before
        aggregator(torch.from_numpy(np.stack(pair(np.degrees(np.arccos(0.2)), size=len(f), seed=9))))
    theirs, ours = aggregator(matrix).numpy(), update(rule, f, r, gamma, alpha)
    if name == "nash_mtl":  # TorchJD's solver stops at a multiple of the solution for one of the pairs
        theirs, ours = unit(theirs), unit(ours)
    close(ours, theirs, rtol)


# The library's side.


@pytest.mark.parametrize("rule", RULES)
def test_every_backend_without_a_kernel_edit(backend, rule):
    forget, retain = (list(side) for side in zip(*(inputs.pair(n, n) for n in (7, 300)), strict=True))
    updates, report = backend(forget, retain, RULES[rule], gamma=0.75, alpha=1.5)
    expected, _ = sago.reference.synthesize(forget, retain, RULES[rule], 0.75, 1.5)
    for found, right in zip(updates, expected, strict=True):
        # Formulas with roots of differences: of some 1e3 times the errors of the sums.
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert report.rule == rule


@needs_triton
@pytest.mark.parametrize("rule", RULES)
def test_arithmetic_is_compiled_into_the_kernel(rule):
    from sago.kernels.formula import on_device

    assert (on_device(RULES[rule].coefficients) is not None) == (rule in COMPILED)


@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].scope == "global"])
def test_an_overflow_is_seen(rule):
    f, r = np.array([1e170, 1.0, -1.0]), np.array([-1e170, 1.0, 1.0])
    assert np.isnan(update(rule, f, r)).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_degree(rule):
    """1 for all but the two that normalise; with those, a scaled loss has to be unscaled first."""
    f, r = pair(120, 1.0, 3.0)
    scaled = update(rule, 8.0 * f, 8.0 * r)
    close(scaled, (1.0 if rule in DEGREE_0 else 8.0) * update(rule, f, r), rtol=1e-8)


@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].scope == "global"])
def test_zero_and_parallel_gradients_are_finite(rule):
    f, r = pair(40)
    for first, second in ((0.0 * f, r), (f, 0.0 * r), (0.0 * f, 0.0 * r), (f, f), (f, 3.0 * f), (f, -f)):
        assert np.isfinite(update(rule, first, second)).all()


# f and r equal, antiparallel, and one of them 0: squares such as |f - r|^2 are exactly 0.
DEGENERATE = {"equal": (1, 1, 1), "opposite": (1, -1, 1), "f is 0": (0, 0, 1), "r is 0": (1, 0, 0)}


@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].scope == "global"])
@pytest.mark.parametrize("sums", DEGENERATE.values(), ids=DEGENERATE)
def test_squares_that_rounding_makes_negative(rule, sums):
    """Each sum is off by the rounding of fp32 arithmetic."""
    noise = 1.0 + 1e-7 * np.random.default_rng(0).standard_normal((1000, 3))
    gram = torch.from_numpy(np.array(sums) * noise)
    coefficients = evaluate(RULES[rule], gram, 1.0, 1.0, 0.0, gram.device).values
    assert coefficients.isfinite().all()
    if rule == "nash_mtl" and sums == DEGENERATE["opposite"]:
        return  # its norm grows without bound towards opposite gradients
    ff, fr, rr = sums
    a, b = coefficients.unbind(1)
    lengths = (a * a * ff + 2.0 * a * b * fr + b * b * rr).clamp(min=0.0).sqrt()
    assert (lengths <= 2.0 + 1e-6).all()


@pytest.mark.parametrize("fr", [1.0, 1.0 + 1e-9])
def test_mgda_of_equal_gradients(fr):
    """`|f - r|^2` counts as 0 where rounding made it negative: all of the weight goes to retain."""
    gram = torch.tensor([[1.0, fr, 1.0]], dtype=DOUBLE)
    assert evaluate(RULES["mgda"], gram, 1.0, 1.0, 0.0, gram.device).values.tolist() == [[0.0, 1.0]]
