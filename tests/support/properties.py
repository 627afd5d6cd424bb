"""Named properties of a synthesis, asserted of any `run(forget, retain, rule, **options)`.

`run` is a `tests.support.backends.Backend` or, in `test_wrong_kernels`, a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sago.reference
from tests.support.oracle import PROMISED, SUM_ERROR, Expected, array, expect, rounding_error

Run = Callable[..., tuple[list[Tensor | None], sago.SynthesisReport]]
Side = Sequence[Tensor | None]

INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FIELDS = ("ff", "fr", "rr", "uu", "uf", "ur")
COUNTS = ("nonfinite_forget", "nonfinite_retain")


def bits(t: Tensor) -> Tensor:
    """The elements as integers, all NaN alike."""
    t = t.detach().cpu().contiguous()
    return t.view(INTS[t.itemsize]).masked_fill(t.isnan(), -1)


def equal_bits(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and x.shape == y.shape and bool((bits(x) == bits(y)).all())


def assert_equal_bits(found: Side, expected: Side) -> None:
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if not equal_bits(x, y):
            assert x is not None
            assert y is not None
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            wrong = (bits(x) != bits(y)).nonzero()
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"gradient {i}: {len(wrong)} of {x.numel()} elements differ, first at {at}: "
                f"found {x[at].item()!r}, expected {y[at].item()!r}"
            )


def assert_between(found: Tensor, expected: np.ndarray, slack: np.ndarray) -> None:
    """`expected - slack <= found <= expected + slack`, the bounds rounded to `found`'s dtype."""

    def rounded(x: np.ndarray) -> Tensor:
        t = torch.from_numpy(np.asarray(x))
        return (t.float().to(found.dtype) if found.dtype.itemsize == 2 else t.to(found.dtype)).double()

    finite = np.isfinite(expected)
    slack = np.where(finite, slack, 0.0)
    low, high, value = rounded(expected - slack), rounded(expected + slack), found.detach().cpu().double()
    assert torch.equal(value.isnan(), low.isnan()), "NaN is not where it should be"
    wrong = ((value < low) | (value > high)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {value.numel()} elements are off, first at {at}: found {value[at].item()!r}, "
            f"expected {expected[at]!r} with a slack of {slack[at]!r}"
        )


def assert_near(found: Side, expected: Side, error: float) -> None:
    """Within `error` of the largest element of each tensor, and the rounding to `found`'s dtype.

    Where terms cancel, an element is as far off as the terms are large.
    """
    for x, y in zip(found, expected, strict=True):
        assert x is not None
        assert y is not None
        right = array(y)
        assert_between(x, right, np.full(right.shape, error * abs(right).max(initial=0.0)))


def assert_as_reference(run: Run, forget: Side, retain: Side, rule: Any, **options: Any) -> None:
    """Bit for bit."""
    updates, _ = run(forget, retain, rule, **options)
    dtypes = options.pop("dtypes", None)
    like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
    expected = [
        None if t is None else torch.full_like(t, torch.nan, dtype=dtypes[i] if dtypes else t.dtype)
        for i, t in enumerate(like)
    ]
    sago.reference.synthesize_(forget, retain, rule, out=expected, **options)
    assert_equal_bits(updates, expected)


def assert_as_oracle(run: Run, forget: Side, retain: Side, rule: str, **options: Any) -> None:
    """No worse than a few roundings of the coefficients."""
    updates, _ = run(forget, retain, rule, **options)
    for unused in ("dtypes", "stats"):
        options.pop(unused, None)
    assert_updates(updates, forget, retain, rule, **options)


def assert_updates(updates: Side, forget: Side, retain: Side, rule: str, **options: Any) -> None:
    options.update((name, float(options[name])) for name in ("gamma", "alpha") if name in options)
    assert_expected(updates, expect(forget, retain, rule, **options))


def assert_expected(updates: Side, expected: Expected) -> None:
    for found, update, slack in zip(updates, expected.updates, expected.slack, strict=True):
        if update is None or slack is None:
            assert found is None
            continue
        assert found is not None
        assert_between(found, update, slack)


def assert_report(
    report: sago.SynthesisReport, forget: Side, retain: Side, rule: str, **options: Any
) -> None:
    """Every field, of finite gradients, against the oracle."""
    options.update((name, float(options[name])) for name in ("gamma", "alpha") if name in options)
    assert_expected_report(report, expect(forget, retain, rule, **options))


def assert_expected_report(report: sago.SynthesisReport, expected: Expected) -> None:
    """Every field, of finite gradients: sums to `PROMISED` of the magnitudes they add."""
    assert list(report.groups) == expected.rows
    sums, sizes, numel = expected.sums, expected.magnitudes, expected.sums["numel"]
    found = {name: np.asarray(values) for name, values in report.to_dict().items()}
    for name in FIELDS:
        error = abs(found[name] - sums[name])
        # One error for the sums and, if the update is part of the sum, those of the coefficients.
        allowed = PROMISED * (1 if name in FIELDS[:3] else 4) * sizes[name] + 1e-300
        assert (error <= allowed).all(), f"{name}: found {found[name]}, expected {sums[name]}"
    for name in COUNTS:
        assert (found[name] == sums[name]).all(), f"{name}: found {found[name]}, expected {sums[name]}"
    np.testing.assert_array_equal(found["conflict_fraction"], sums["conflicts"] / np.maximum(numel, 1))
    few = rounding_error(16, torch.float64)  # two roots, a product and a quotient, here and there
    with np.errstate(all="ignore"):
        for norm, square in (("norm_forget", "ff"), ("norm_retain", "rr"), ("norm_update", "uu")):
            np.testing.assert_allclose(found[norm], np.sqrt(found[square]), rtol=few)
        for cosine, product, x, y in (
            ("cos_forget_retain", "fr", "ff", "rr"),
            ("cos_update_forget", "uf", "uu", "ff"),
            ("cos_update_retain", "ur", "uu", "rr"),
        ):
            norms = np.sqrt(found[x]) * np.sqrt(found[y])
            # A product of an update that cancels is rounding noise, although its square is 0.
            value = np.where(norms == 0.0, np.nan, found[product] / norms)
            np.testing.assert_allclose(found[cosine], value, rtol=few)


def assert_never_against_retain(run: Run, forget: Side, retain: Side, rule: str, **options: Any) -> None:
    """`<out, r> >= 0` over what the rule takes its products, less the rounding of the update."""
    updates, _ = run(forget, retain, rule, **options)
    gamma, alpha = options.get("gamma", 1.0), options.get("alpha", 1.0)
    products, allowed = [], []
    for u, f, r in zip(updates, forget, retain, strict=True):
        if u is None:
            continue
        f, r = (torch.zeros_like(u) if t is None else t for t in (f, r))
        x, y, z = array(u), array(f), array(r)
        epsilon = torch.finfo(u.dtype).eps / 2
        wide = torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32
        # The projection is a multiple of r that is at most |f| long.
        size = gamma * np.linalg.norm(y) * np.linalg.norm(z) + alpha * (z * z).sum()
        products.append((x * z).sum())
        allowed.append((epsilon + 4 * SUM_ERROR[wide]) * 2 * size)
    if rule == "pcgrad_global":
        products, allowed = [sum(products)], [sum(allowed)]
    for product, limit in zip(products, allowed, strict=True):
        assert product >= -limit, f"<out, r> is {product}, less than {-limit}"


def assert_no_coordinate_against_retain(run: Run, forget: Side, retain: Side, **options: Any) -> None:
    """`out_i * r_i >= 0` everywhere, by sign: exact."""
    updates, _ = run(forget, retain, "sago", **options)
    for u, r in zip(updates, retain, strict=True):
        if u is not None and r is not None:
            assert (np.sign(array(u)) * np.sign(array(r)) >= 0).all()


def assert_scale_equivariant(
    run: Run, forget: Side, retain: Side, rule: str, exponent: int, **options: Any
) -> None:
    """Bit for bit for a power of two, because nothing rounds differently."""
    scale = 2.0**exponent
    updates, _ = run(forget, retain, rule, **options)
    scaled, _ = run(_times(scale, forget), _times(scale, retain), rule, **options)
    assert_equal_bits(scaled, _times(scale, updates))


def _times(scale: float, tensors: Side) -> list[Tensor | None]:
    return [None if t is None else t * scale for t in tensors]


def assert_weights_are_linear(run: Run, forget: Side, retain: Side, rule: str) -> None:
    """`out(gamma, alpha) = gamma * out(1, 0) + alpha * out(0, 1)`; a common power of two bit for bit."""
    parts = [run(forget, retain, rule, gamma=g, alpha=a)[0] for g, a in ((1, 0), (0, 1))]
    whole, _ = run(forget, retain, rule, gamma=0.75, alpha=1.5)
    for only_forget, only_retain, both, f, r in zip(*parts, whole, forget, retain, strict=True):
        sizes = abs(array(only_forget)) + abs(array(only_retain)) + abs(array(f)) + abs(array(r))
        error = abs(0.75 * array(only_forget) + 1.5 * array(only_retain) - array(both))
        assert (error <= 4 * torch.finfo(both.dtype).eps * sizes).all()
    doubled, _ = run(forget, retain, rule, gamma=1.5, alpha=3.0)
    assert_equal_bits(doubled, _times(2.0, whole))


def assert_independent_of_company(run: Run, forget: Side, retain: Side, rule: str) -> None:
    """For rules over tensors, each tensor alone and the reversed list give the same bits as the list."""
    together, report = run(forget, retain, rule)
    reverse, reverse_report = run(forget[::-1], retain[::-1], rule)
    assert_equal_bits(reverse[::-1], together)
    alone = [run([f], [r], rule) for f, r in zip(forget, retain, strict=True)]
    assert_equal_bits([updates[0] for updates, _ in alone], together)
    for name in (*FIELDS, *COUNTS, "conflict_fraction"):
        rows = getattr(report, name)
        assert_equal_bits([getattr(reverse_report, name).flip(0)], [rows])
        assert_equal_bits([torch.cat([getattr(one, name) for _, one in alone])], [rows])


def assert_repeatable(run: Run, forget: Side, retain: Side, rule: str) -> None:
    first, first_report = run(forget, retain, rule)
    second, second_report = run(forget, retain, rule)
    assert_equal_bits(second, first)
    for name in (*FIELDS, *COUNTS, "conflict_fraction"):
        assert_equal_bits([getattr(second_report, name)], [getattr(first_report, name)])


def assert_sago_is_idempotent(run: Run, forget: Side, retain: Side) -> None:
    once, _ = run(forget, retain, "sago")
    twice, _ = run(forget, once, "sago")
    assert_equal_bits(twice, once)


def assert_projection_is_idempotent(run: Run, forget: Side, retain: Side, rule: str) -> None:
    """pcgrad with alpha 0 and blur with gamma 0 are projections: a second one changes only the rounding."""
    projects_forget = rule.startswith("pcgrad")
    weights = {"gamma": 1.0, "alpha": 0.0} if projects_forget else {"gamma": 0.0, "alpha": 1.0}
    once, _ = run(forget, retain, rule, **weights)
    twice, _ = run(*((once, retain) if projects_forget else (forget, once)), rule, **weights)
    for x, y, f, r in zip(twice, once, forget, retain, strict=True):
        size = np.linalg.norm(array(f)) + np.linalg.norm(array(r))
        assert abs(array(x) - array(y)).max() <= 16 * torch.finfo(y.dtype).eps * size


def assert_switched_off(run: Run, forget: Side, retain: Side, rule: str, weight: str) -> None:
    """If `weight` is 0, NaN and inf in its gradient act like finite numbers of the same signs."""
    broken, tame = [], []
    for t in forget if weight == "gamma" else retain:
        t = t.clone()
        t[0::4], t[1::4], t[2::4] = torch.nan, torch.inf, -torch.inf
        broken.append(t)
        tame.append(t.nan_to_num(0.0, 1.0, -1.0))
    sides = [(x, retain) if weight == "gamma" else (forget, x) for x in (broken, tame)]
    updates, expected = (run(*both, rule, **{weight: 0.0})[0] for both in sides)
    assert_equal_bits(updates, expected)
