"""The gallery: each rule by what defines it, against its reference and TorchJD, and on every backend."""

from fractions import Fraction
from importlib.util import find_spec
from math import nan

import numpy as np
import pytest
import torch

import sago
import sago.reference
from sago.rules import REFERENCES, RULES, evaluate
from sago.rules.cagrad import cagrad
from sago.rules.cagrad import reference as cagrad_reference
from sago.rules.gradvac import gradvac
from sago.rules.gradvac import reference as gradvac_reference
from sago.rules.gru import gru
from sago.rules.gru import reference as gru_reference
from tests.conftest import needs_triton
from tests.support import inputs

DOUBLE = torch.float64
GRAM = (
    *("a_gem", "orthograd", "blur_forget_upper", "pcgrad_symmetric", "upgrad", "dualproj", "mgda"),
    *("cosine_gate", "ngdiff", "imtl_g", "nash_mtl", "config", "aligned_mtl", "cagrad", "gradvac", "gru"),
)
GALLERY = ("and_mask", *GRAM)
CLOSURES = ("cagrad", "gradvac")  # their parameter makes them closures, which torch evaluates
WEIGHTS = [(1.0, 1.0), (2.0, 3.0), (0.1, 5.0), (0.0, 1.5), (0.0, 1.0), (0.75, 0.0), (0.0, 0.0)]


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


def test_and_mask_keeps_the_sum_out_of_conflict():
    f, r = np.array([1.0, -2.0, 3.0, 0.0]), np.array([-1.0, -1.0, 5.0, 2.0])
    close(update("and_mask", f, r, 2.0, 3.0), np.array([0.0, -7.0, 21.0, 6.0]))


def test_and_mask_is_the_mask_of_the_paper_for_thresholds_up_to_one_half():
    f, r = (a.ravel() for a in np.meshgrid([-2.0, 0.0, 1.0], [-3.0, 0.0, 0.5]))
    agreement = abs(np.sign(f) + np.sign(r)) / 2
    for threshold in (0.1, 0.5):
        close(update("and_mask", f, r, 2.0, 3.0), np.where(agreement >= threshold, 2.0 * f + 3.0 * r, 0.0))
    at_one = np.where(agreement >= 1.0, f + r, 0.0)
    assert ((at_one != update("and_mask", f, r)) == ((f == 0) != (r == 0))).all()


def test_gates_of_their_own():
    """Every combination of signs and sizes, by hand: the gates themselves have no second definition."""
    f = np.array([1.0, -2.0, 3.0, -1.0, 2.0, -2.0, 0.0, 3.0, 0.0])
    r = np.array([2.0, -1.0, -1.0, 4.0, -2.0, 2.0, -5.0, 0.0, 0.0])
    ties = [4.0, -3.5, 6.0, 12.0, -1.0, 1.0, -15.0, 6.0, 0.0]  # (2f + 3r)/2, or the larger of 2f and 3r
    mudman = [2.0, -4.0, *[0.0] * 7]
    close(update("ties", f, r, 2.0, 3.0), np.array(ties))
    close(update("mudman", f, r, 2.0, 3.0), np.array(mudman))
    close(update("cautious", f, r, 2.0, 3.0), np.array(mudman) * 9 / 2)  # two of nine signs are equal


@pairs
def test_a_gem_keeps_forget_or_makes_it_orthogonal_to_retain(f, r):
    found = update("a_gem", f, r, gamma=2.0)
    if f @ r >= 0:
        close(found, 2.0 * f)
    else:
        assert abs(found @ r) < 1e-12
        close(found, 2.0 * (f - (f @ r) / (r @ r) * r))


@pairs
def test_gru_removes_what_opposes_retain_up_to_a_cosine(f, r):
    close(update("gru", f, r, gamma=2.0), update("a_gem", f, r, gamma=2.0))
    found = update(gru(-0.5), f, r, gamma=2.0)
    cosine = unit(f) @ unit(r)
    removed = np.linalg.norm(f) * min(0.0, max(cosine, -0.5))
    close(found, 2.0 * (f - removed * unit(r)))


@pairs
def test_orthograd_is_orthogonal_to_retain(f, r):
    found = update("orthograd", f, r, gamma=2.0)
    assert abs(found @ r) < 1e-12
    close(found, 2.0 * (f - (f @ r) / (r @ r) * r))


@pairs
def test_blur_forget_upper_is_blur_with_the_gradients_exchanged(f, r):
    found = update("blur_forget_upper", f, r, 2.0, 3.0)
    assert found @ r == pytest.approx(3.0 * (r @ r))
    close(found, update("blur", r, f, 3.0, 2.0))


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
def test_upgrad_is_the_mean_of_projected_gradients(f, r):
    of_forget, of_retain = update("dualproj", f, r, 1.0, 0.0), update("dualproj", f, r, 0.0, 1.0)
    found = update("upgrad", f, r, 2.0, 3.0)
    close(found, (2.0 * of_forget + 3.0 * of_retain) / 2)
    close(found, update("pcgrad_symmetric", f, r, 2.0, 3.0) / 2)


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
    # Weights of vectors that are 5 degrees apart: roundings of 1e-16, times a condition of about 1e4.
    np.testing.assert_allclose(weights * (gram @ weights), 1.0, rtol=1e-10)


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
    # The eigenvalues differ by a factor of at most 1e5, so the smaller one has an error of about 1e-11.
    close(update("aligned_mtl", f, r, 2.0, 3.0), transform @ [2.0, 3.0] @ rows, rtol=1e-9)


@pairs
@pytest.mark.parametrize("radius", [0.1, 0.5, 0.9])
def test_cagrad_serves_the_worse_of_the_two_best(f, r, radius):
    """On the circle around the mean that bounds the ball nothing serves them better."""
    f, r = 2.0 * f, 3.0 * r
    mean = (f + r) / 2.0
    length = radius * np.linalg.norm(mean)
    found = update(cagrad(radius), f / 2.0, r / 3.0, 2.0, 3.0)
    assert np.linalg.norm(found - mean) == pytest.approx(length, rel=1e-6)
    plane = np.linalg.qr(np.stack([f, r]).T)[0]
    circle = np.linspace(0.0, 2.0 * np.pi, 10001)
    others = mean + length * np.stack([np.cos(circle), np.sin(circle)]).T @ plane.T
    best = np.minimum(others @ f, others @ r).max()
    assert min(found @ f, found @ r) >= best - 1e-9


@pairs
def test_cagrad_at_radius_0_is_the_mean(f, r):
    close(update(cagrad(0.0), f, r, 2.0, 3.0), (2.0 * f + 3.0 * r) / 2)


@pairs
@pytest.mark.parametrize("target", [-0.3, 0.0, 0.2])
def test_gradvac_reaches_its_cosine(f, r, target):
    for moved, fixed, weights in ((f, r, (1.0, 0.0)), (r, f, (0.0, 1.0))):
        found = update(gradvac(target), f, r, *weights)
        cosine = unit(f) @ unit(r)
        if cosine >= target:
            close(found, moved)
        else:
            assert unit(found) @ unit(fixed) == pytest.approx(target, abs=1e-9)
            assert np.linalg.matrix_rank(np.stack([found - moved, fixed]), tol=1e-9) == 1


@pairs
def test_gradvac_at_target_0_is_pcgrad_symmetric(f, r):
    close(update("gradvac", f, r, 2.0, 3.0), update("pcgrad_symmetric", f, r, 2.0, 3.0))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_a_rule_can_read_a_tensor_that_changes(dtype):
    f, r = pair(100)
    target = torch.zeros((), dtype=dtype)
    rule = gradvac(target)
    for cosine in (0.0, 0.5, -0.25):  # exact in fp32
        target.fill_(cosine)
        close(update(rule, f, r), update(gradvac(cosine), f, r))


@pytest.mark.parametrize("radius", [-0.1, nan, float("inf")])
def test_a_radius_that_is_none(radius):
    with pytest.raises(ValueError, match=r"`radius`.*at least 0.*Found"):
        cagrad(radius)


@pytest.mark.parametrize("lowest", [0.1, -1.1, nan])
def test_a_lowest_cosine_that_is_none(lowest):
    with pytest.raises(ValueError, match=r"`lowest_cosine`.*Found"):
        gru(lowest)


@pytest.mark.parametrize("decay", [-0.1, 1.1, nan])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match=r"`decay`.*Found"):
        gradvac(decay=decay)


@pytest.mark.parametrize("target", [-1.0, 1, nan, torch.zeros(2)], ids=str)
def test_a_target_that_is_none(target):
    with pytest.raises(ValueError, match=r"`target`.*Found"):
        gradvac(target)


# The definitions beside the rules.


def four(rule, gram, gamma=1.0, alpha=1.0):
    """The coefficients `a_c, b_c, a, b` for each row."""
    values = evaluate(rule, torch.from_numpy(gram), gamma, alpha, 0.0, torch.device("cpu")).values
    return np.broadcast_to(np.tile(values.numpy(), 1 if rule.gated else 2), (len(gram), 4))


def random_gram(count=300, largest_cosine=0.9):
    """The inner products of pairs whose norms differ by a factor of 10 at most."""
    generator = np.random.default_rng(1)
    f, r = 10.0 ** generator.uniform(-0.5, 0.5, (2, count))
    cosine = generator.uniform(-largest_cosine, largest_cosine, count)
    return np.stack([f * f, cosine * f * r, r * r], axis=1)


@pytest.mark.parametrize(("gamma", "alpha"), WEIGHTS)
@pytest.mark.parametrize("name", GALLERY)
def test_coefficients_against_the_reference(name, gamma, alpha):
    """At most 200 roundings, amplified by the condition of the Gram matrix.

    The ratio of its eigenvalues is at most `(10 + 1/10)^2 / (1 - 0.9^2)`, about 540. `mgda`, `cagrad` and
    `aligned_mtl` subtract the weighted squares, which differ by up to a factor of 250,000 for the weights 0.1
    and 5. In all that is 200 * 1.1e-16 * 540 * 50^2, about 3e-8, at worst.
    """
    gram = random_gram()
    expected = np.array([REFERENCES[name](*row, gamma, alpha) for row in gram.tolist()])
    np.testing.assert_allclose(four(RULES[name], gram, gamma, alpha), expected, rtol=3e-8, atol=1e-14)


@pytest.mark.parametrize(("gamma", "alpha"), [(1e-3, 1.0), (1.0, 1e-3), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["dualproj", "upgrad"])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 2.0**114), (2.0**114, 1.0, 1.0)])
def test_projections_against_the_reference_where_one_square_absorbs_the_other(name, scales, gamma, alpha):
    """Nothing cancels: each side has at most 5 roundings, of products, quotients and sums of one sign."""
    gram = random_gram() * np.array(scales)
    expected = np.array([REFERENCES[name](*row, gamma, alpha) for row in gram.tolist()])
    np.testing.assert_allclose(four(RULES[name], gram, gamma, alpha), expected, rtol=10 * 1.1e-16, atol=0)


def test_dualproj_of_opposite_gradients_is_zero():
    """For `f = -r` the update is `(a - b) * f`. The rounded sums of this row have a cosine below -1."""
    row = 1.0, -1.0 - 2.0**-50, 1.0
    for a, b, *_ in (REFERENCES["dualproj"](*row, 1.0, 1.0), four(RULES["dualproj"], np.array([row]))[0]):
        assert a == b


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("row", [(1e-5, 4e-7, 2.0), (2.0, -4e-7, 1e-5)])
def test_aligned_mtl_against_the_reference_where_one_gradient_is_much_longer(row, gamma, alpha):
    """No terms of similar size cancel. Each side has at most 15 roundings, those of square roots included."""
    found, expected = four(RULES["aligned_mtl"], np.array([row]), gamma, alpha), REFERENCES["aligned_mtl"]
    np.testing.assert_allclose(found, [expected(*row, gamma, alpha)], rtol=30 * 1.1e-16, atol=0)


@pytest.mark.parametrize("length", [1e4, 1e8, 1e12])
def test_mgda_gives_a_much_longer_gradient_its_share(length):
    """A share has 4 roundings: of two differences, their sum and the quotient. The expected value has one.

    The difference `1 - x` would have an error of 1e-16, which is multiplied by the length of the gradient.
    """
    for ff, rr in ((1.0, length * length), (length * length, 1.0)):
        fr = -0.5 * length
        square = Fraction(ff) + Fraction(rr) - 2 * Fraction(fr)
        expected = [
            float((Fraction(rr) - Fraction(fr)) / square),
            float((Fraction(ff) - Fraction(fr)) / square),
        ]
        for found in (
            four(RULES["mgda"], np.array([[ff, fr, rr]]))[0],
            REFERENCES["mgda"](ff, fr, rr, 1.0, 1.0),
        ):
            np.testing.assert_allclose(found, 2 * expected, rtol=6 * 1.1e-16, atol=0)


@pytest.mark.parametrize("target", [0.0, 0.3])
def test_gradvac_against_the_reference_where_the_cosine_is_near_the_target(target):
    """The coefficients contain a difference of two terms that is 1e-4 of each term.

    The two sides have at most 20 roundings of these terms, and the difference has 1e4 times their relative
    error. With a target of 0 nothing cancels, and `1 - fr/ff` differs by at most 10 roundings.
    """
    f, r = 1e-3, 3.0
    cosines = target - np.array([1e-2, 1e-3, 1e-4])
    gram = np.stack([np.full(3, f * f), cosines * f * r, np.full(3, r * r)], axis=1)
    expected = np.array([gradvac_reference(*row, 1.0, 1.0, target) for row in gram.tolist()])
    np.testing.assert_allclose(four(gradvac(target), gram, 1.0, 1.0), expected, rtol=20 * 1.1e-16 * 1e4)
    if target == 0.0:
        np.testing.assert_allclose(expected[:, 0], 1.0 - gram[:, 1] / gram[:, 0], rtol=10 * 1.1e-16)


@pytest.mark.parametrize("parameter", [0.0, 0.1, 0.5, 0.9])
def test_parameters_against_the_reference(parameter):
    gram = random_gram()  # the tolerance is that of the test above
    for rule, reference in (
        (cagrad(parameter), cagrad_reference),
        (gradvac(parameter), gradvac_reference),
        (gradvac(-parameter), lambda *row: gradvac_reference(*row[:5], -row[5])),
        (gru(-parameter), lambda *row: gru_reference(*row[:5], -row[5])),
    ):
        expected = np.array([reference(*row, 2.0, 3.0, parameter) for row in gram.tolist()])
        np.testing.assert_allclose(four(rule, gram, 2.0, 3.0), expected, rtol=3e-8, atol=1e-14)


@pytest.mark.parametrize("name", GRAM)
def test_references_of_sums_that_overflow(name):
    for i, sums in enumerate(([np.inf, 1.0, 1.0], [1.0, np.inf, 1.0], [1.0, 1.0, np.inf])):
        if ("ff", "fr", "rr")[i] in frozenset().union(*RULES[name].reads[False, False]):
            assert np.isnan(REFERENCES[name](*sums, 1.0, 1.0)).any()
            assert np.isnan(four(RULES[name], np.array([sums]))).any()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("name", GRAM)
def test_references_show_the_sums_that_are_not_finite_where_the_rules_do(name, weights):
    for sums in ([np.inf, 1.0, 1.0], [1.0, 1.0, np.inf], [np.inf] * 3, [np.nan] * 3):
        found = np.isnan(four(RULES[name], np.array([sums]), *weights)).any()
        assert found == np.isnan(REFERENCES[name](*sums, *weights)).any()


@pytest.mark.parametrize(("position", "value"), [(0, np.inf), (1, np.inf), (1, -np.inf), (2, np.inf)])
@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_mgda_hides_no_sum_that_is_not_finite(position, value, gamma, alpha):
    used = (gamma * gamma, gamma * alpha, alpha * alpha)[position] != 0.0
    weights = torch.tensor([gamma, alpha], dtype=DOUBLE)
    for wrong in (value, np.nan):
        sums = torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)
        sums[position] = wrong
        found = torch.stack(RULES["mgda"].coefficients(*sums, *weights))
        assert found[weights != 0.0].isnan().all() == used


# What the files of the rules state.


@pytest.mark.parametrize(("gamma", "alpha"), WEIGHTS)
@pytest.mark.parametrize("name", GRAM)
def test_guarantees(name, gamma, alpha):
    """`<u,r>` and `<u,f>` of random pairs; where the rule guarantees nothing, some pair breaks it."""
    gram = random_gram(2000, largest_cosine=1.0)
    ff, fr, rr = gram.T
    a, b = four(RULES[name], gram, gamma, alpha).T[2:]
    lengths = abs(a) * ff**0.5 + abs(b) * rr**0.5 + 1e-300
    guarantees = RULES[name].guarantees
    # The terms of both products are at most the product of the lengths, and cancel with 10 roundings.
    if guarantees.non_negative_with_retain:
        assert ((a * fr + b * rr) / (lengths * rr**0.5)).min() > -1e-14
    if guarantees.non_negative_with_forget:
        assert ((a * ff + b * fr) / (lengths * ff**0.5)).min() > -1e-14


@pytest.mark.parametrize("name", GRAM)
def test_what_is_not_guaranteed_does_not_hold(name):
    gram = random_gram(2000, largest_cosine=1.0)
    ff, fr, rr = gram.T
    holds = np.array([True, True])
    for gamma, alpha in WEIGHTS:
        a, b = four(RULES[name], gram, gamma, alpha).T[2:]
        holds &= (a * fr + b * rr).min() > -1e-3, (a * ff + b * fr).min() > -1e-3
    guarantees = RULES[name].guarantees
    assert holds.tolist() == [guarantees.non_negative_with_retain, guarantees.non_negative_with_forget]


@pytest.mark.parametrize("name", sorted(RULES.keys() - set(GRAM)))
def test_the_other_rules_have_the_guarantees_that_they_state_and_no_others(name):
    """On random pairs in fp64. The terms of both products cancel with 20 roundings at most."""
    generator = torch.Generator().manual_seed(0)
    holds = np.array([True, True, True])
    for _ in range(100):
        f, r = (torch.randn(4, generator=generator, dtype=DOUBLE) for _ in range(2))
        for gamma, alpha in WEIGHTS:
            (u,), _ = sago.reference.synthesize([f], [r], name, gamma=gamma, alpha=alpha)
            slack = -20 * 1.1e-16 * 2 * (gamma * f.norm() + alpha * r.norm())
            holds &= u @ r >= slack * r.norm(), u @ f >= slack * f.norm(), (u * r >= 0).all()
    stated = RULES[name].guarantees
    assert tuple(holds) == (
        stated.non_negative_with_retain,
        stated.non_negative_with_forget,
        stated.agrees_with_retain,
    )


def test_and_mask_agrees_with_both_at_every_element():
    f, r = np.random.default_rng(2).standard_normal((2, 1000))
    for gamma, alpha in WEIGHTS:
        found = update("and_mask", f, r, gamma, alpha)
        assert (found * r >= 0).all()
        assert (found * f >= 0).all()


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
        "upgrad": lambda: (torchjd.UPGrad(both, projector=projector), 4.0, 6.0, 1e-6),
        "upgrad of the mean": lambda: (torchjd.UPGrad(projector=projector), 1.0, 1.0, 1e-6),
        "dualproj": lambda: (torchjd.DualProj(both, projector=projector), 2.0, 3.0, 1e-6),
        "mgda": lambda: (torchjd.MGDA(epsilon=1e-9, max_iters=10000), 1.0, 1.0, 2e-3),
        "imtl_g": lambda: (torchjd.IMTLG(), 1.0, 1.0, 1e-8),
        "config": lambda: (torchjd.ConFIG(), 1.0, 1.0, 1e-8),
        "aligned_mtl": lambda: (torchjd.AlignedMTL(both), 2.0, 3.0, 1e-8),
        "cagrad": lambda: (torchjd.CAGrad(c=0.5, norm_eps=1e-12), 1.0, 1.0, 1e-4),
        "nash_mtl": lambda: (torchjd.NashMTL(2, max_norm=0.0, optim_niter=20), 1.0, 1.0, 1e-5),
        "gradvac": lambda: (torchjd.GradVac(beta=1.0, eps=0.0), 1.0, 1.0, 1e-8),
    }[name]()


NEEDS = {
    "upgrad": "quadprog",
    "upgrad of the mean": "quadprog",
    "dualproj": "quadprog",
    "cagrad": "cvxpy",
    "nash_mtl": "ecos",
}


@pairs
@pytest.mark.parametrize(
    "name",
    [
        *("pcgrad_symmetric", "upgrad", "upgrad of the mean", "dualproj", "mgda", "imtl_g"),
        *("config", "aligned_mtl", "cagrad", "nash_mtl", "gradvac"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")  # cvxpy, NashMTL
def test_against_torchjd(name, f, r):
    pytest.importorskip("torchjd", reason="needs TorchJD")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"TorchJD needs {NEEDS[name]} for it")
    aggregator, gamma, alpha, rtol = torchjd_aggregator(name)
    rule = gradvac(0.2) if name == "gradvac" else RULES[name.split()[0]]
    matrix = torch.from_numpy(np.stack([f, r]))
    if name == "gradvac":  # with beta 1 the target is the cosine of the call before
        aggregator(torch.from_numpy(np.stack(pair(np.degrees(np.arccos(0.2)), size=len(f), seed=9))))
    theirs, ours = aggregator(matrix).numpy(), update(rule, f, r, gamma, alpha)
    if name == "nash_mtl":  # TorchJD's solver stops at a multiple of the solution for one of the pairs
        theirs, ours = unit(theirs), unit(ours)
    close(ours, theirs, rtol)


# The library's side.


@pytest.mark.parametrize("rule", GALLERY)
def test_every_backend_without_a_kernel_edit(backend, rule):
    forget, retain = (list(side) for side in zip(*(inputs.pair(n, n) for n in (7, 300)), strict=True))
    updates, report = backend(forget, retain, RULES[rule], gamma=0.75, alpha=1.5)
    expected, _ = sago.reference.synthesize(forget, retain, RULES[rule], 0.75, 1.5)
    for found, right in zip(updates, expected, strict=True):
        # Formulas with roots of differences: of some 1e3 times the errors of the sums.
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert report.rule == rule


@needs_triton
@pytest.mark.parametrize("rule", GALLERY)
def test_arithmetic_is_compiled_into_the_kernel(rule):
    from sago.kernels.formula import on_device

    assert (on_device(RULES[rule].coefficients) is None) == (rule in CLOSURES)


@pytest.mark.parametrize("rule", GRAM)
def test_an_overflow_is_seen(rule):
    f, r = np.array([1e170, 1.0, -1.0]), np.array([-1e170, 1.0, 1.0])
    assert np.isnan(update(rule, f, r)).all()


@pytest.mark.parametrize("rule", GALLERY)
def test_the_degree(rule):
    """1 for all but the two that normalise; with those, a scaled loss has to be unscaled first."""
    assert (RULES[rule].guarantees.degree == 0) == (rule in ("ngdiff", "nash_mtl"))
    f, r = pair(120, 1.0, 3.0)
    scaled = update(rule, 8.0 * f, 8.0 * r)
    close(scaled, 8.0 ** RULES[rule].guarantees.degree * update(rule, f, r), rtol=1e-8)


def along(rule, first, second):
    """The update of `first*e` and `second*e` as a multiple of the unit vector `e`, from both definitions."""
    gram = np.array([[first * first, first * second, second * second]])
    by_reference = REFERENCES[rule](*gram[0].tolist(), 1.0, 1.0)
    found = [a * first + b * second for _, _, a, b in (four(RULES[rule], gram)[0], by_reference)]
    assert found[0] == pytest.approx(found[1], abs=1e-7)  # an angle of 0 is off by the root of a rounding
    return found[0]


# The updates that the docstrings state, of e and e, 2e and e, -e and e, 0 and e, and 2e and 0.
ON_A_LINE = {
    "a_gem": (1, 2, 0, 0, 2),
    "gru": (1, 2, 0, 0, 2),
    "orthograd": (0, 0, 0, 0, 2),
    "blur_forget_upper": (1, 1, 1, 1, 2),
    "pcgrad_symmetric": (2, 3, 0, 1, 2),
    "upgrad": (1, 1.5, 0, 0.5, 1),
    "dualproj": (2, 3, 0, 1, 2),
    "mgda": (1, 1, 0, 0, 0),
    "cosine_gate": (2, 3, 1, 1, 0),
    "ngdiff": (2, 2, 0, 1, 1),
    "imtl_g": (1, 4 / 3, 0, 0, 0),
    "nash_mtl": (2**0.5, 2**0.5, 0, 1, 1),
    "config": (2, 3, 0, 1, 2),
    "aligned_mtl": (0, 0, 0, 0, 0),
    "cagrad": (1.5, 2.25, 0, 0.5, 1),
    "gradvac": (2, 3, 0, 1, 2),
}


@pytest.mark.parametrize("rule", GRAM)
def test_zero_parallel_and_antiparallel_gradients(rule):
    found = [along(rule, *both) for both in ((1, 1), (2, 1), (-1, 1), (0, 1), (2, 0))]
    assert found == pytest.approx(ON_A_LINE[rule], abs=1e-7)
    assert along(rule, 0, 0) == 0


@pytest.mark.parametrize("rule", GRAM)
def test_zero_and_parallel_gradients_are_finite(rule):
    f, r = pair(40)
    for first, second in ((0.0 * f, r), (f, 0.0 * r), (0.0 * f, 0.0 * r), (f, f), (f, 3.0 * f), (f, -f)):
        for gamma, alpha in WEIGHTS:
            assert np.isfinite(update(rule, first, second, gamma, alpha)).all()


@pytest.mark.parametrize("rule", [name for name in GRAM if RULES[name].guarantees.degree == 1])
@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_the_products_of_sums_stay_in_range(rule, scale):
    """The square of an inner product would underflow or overflow in fp64."""
    f, r = pair(120, 1.0, 3.0)
    close(update(rule, scale * f, scale * r) / scale, update(rule, f, r), rtol=1e-8)


# f and r equal, antiparallel, and one of them 0: squares such as |f - r|^2 are exactly 0.
DEGENERATE = {"equal": (1, 1, 1), "opposite": (1, -1, 1), "f is 0": (0, 0, 1), "r is 0": (1, 0, 0)}


@pytest.mark.parametrize("rule", GRAM)
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
