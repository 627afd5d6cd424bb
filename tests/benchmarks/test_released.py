"""The peer has to do what the released code does, at the magnitudes where its epsilon shows too."""

import pytest
import torch
from torch import Tensor

from benchmarks.released import EPS, RULES, released
from tests.oracle import rounding_error

GAMMA, ALPHA = 0.75, 2.0

# Two tensors: the first in conflict (<f,r> < 0), the second not. Every pairing of signs and zeros occurs.
FORGET = [[3.0, -2.0, 0.0, 1.0, -1.0], [0.5, 0.0, -0.25]]
RETAIN = [[-4.0, 1.0, 2.0, 0.5, -0.25], [2.0, 0.0, -1.0]]


def tensors(rows: list[list[float]], scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64).mul(scale).to(dtype) for row in rows]


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def by_hand(rule: str, scale: float = 1.0) -> list[list[float]]:
    """Each rule element by element, on Python floats."""
    forget = [[scale * x for x in row] for row in FORGET]
    retain = [[scale * x for x in row] for row in RETAIN]
    all_fr = sum(dot(f, r) for f, r in zip(forget, retain, strict=True))
    all_ff, all_rr = (sum(dot(x, x) for x in rows) for rows in (forget, retain))
    updates = []
    for f, r in zip(forget, retain, strict=True):
        if rule == "sum":
            a, b = GAMMA, ALPHA
        elif rule == "pcgrad":
            a, b = GAMMA, ALPHA - GAMMA * min(dot(f, r), 0.0) / (dot(r, r) + EPS)
        elif rule == "pcgrad_global":
            a, b = GAMMA, ALPHA - GAMMA * min(all_fr, 0.0) / (all_rr + EPS)
        elif rule == "blur":
            a, b = GAMMA - ALPHA * all_fr / (all_ff + EPS), ALPHA
        else:
            a, b = GAMMA, ALPHA if rule == "sago_prefer_retain" else 0.0
        gated = rule.startswith("sago")
        updates.append(
            [ALPHA * y if gated and x * y < 0 else a * x + b * y for x, y in zip(f, r, strict=True)]
        )
    return updates


def assert_close(updates: list[Tensor], expected: list[list[float]], scale: float, relative: float) -> None:
    for update, row in zip(updates, expected, strict=True):
        right = torch.tensor(row, dtype=torch.float64)
        assert (update.double() - right).abs().max() <= relative * scale


def test_the_example_holds_both_cases():
    assert dot(FORGET[0], RETAIN[0]) < 0 < dot(FORGET[1], RETAIN[1])
    assert sum(dot(f, r) for f, r in zip(FORGET, RETAIN, strict=True)) < 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-8])
def test_float64_against_the_formula(rule, scale):
    updates = released(tensors(FORGET, scale), tensors(RETAIN, scale), rule, GAMMA, ALPHA)
    # The inner products over all tensors are accumulated in float32 there, in float64 elsewhere. They add 8
    # terms, and coefficients below 3 multiply elements up to 4.
    dtype = torch.float32 if rule in ("pcgrad_global", "blur") else torch.float64
    relative = 12 * rounding_error(8, dtype)
    assert_close(updates, by_hand(rule, scale), scale, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_lower_precision_keeps_the_dtype(rule, dtype):
    updates = released(tensors(FORGET, dtype=dtype), tensors(RETAIN, dtype=dtype), rule, GAMMA, ALPHA)
    assert all(u.dtype == dtype for u in updates)
    # 8: the largest element of an update. Two sums are rounded, a quotient, two products and the update.
    assert_close(updates, by_hand(rule), 8.0, rounding_error(6, dtype))


@pytest.mark.parametrize("rule", RULES)
def test_without_conflict_nothing_is_projected_but_by_blur(rule):
    forget, retain = tensors([[1.0, 2.0]]), tensors([[3.0, 0.5]])
    (update,) = released(forget, retain, rule, GAMMA, ALPHA)
    f, r = forget[0], retain[0]
    expected = GAMMA * f if rule == "sago" else GAMMA * f + ALPHA * r
    if rule == "blur":
        expected = GAMMA * f + ALPHA * (r - (f @ r) / (f @ f) * f)
    # blur's products over all tensors are accumulated in float32 there, of which these are exact but for k.
    torch.testing.assert_close(update, expected, rtol=rounding_error(8, torch.float32), atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_untouched(rule):
    forget, retain = tensors(FORGET), tensors(RETAIN)
    updates = released(forget, retain, rule, GAMMA, ALPHA)
    assert all(map(torch.equal, forget + retain, tensors(FORGET) + tensors(RETAIN)))
    pointers = {t.data_ptr() for t in forget + retain}
    assert not pointers & {u.data_ptr() for u in updates}


def test_the_epsilon_switches_the_projection_off():
    forget, retain = tensors([[1e-8, 0.0]]), tensors([[-1e-8, 1e-8]])
    (update,) = released(forget, retain, "pcgrad")
    assert (
        update - (forget[0] + retain[0])
    ).abs().max() < 1e-5 * 1e-8  # the projection would move it by 5e-9


def test_the_mask_compares_signs():
    # A product of these underflows to 0 and would see no conflict.
    forget, retain = (tensors([[x]], dtype=torch.float32) for x in (1e-30, -1e-30))
    (update,) = released(forget, retain, "sago")
    assert torch.equal(update, retain[0])


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"`rule`.*Found 'sagp'"):
        released(tensors(FORGET), tensors(RETAIN), "sagp")


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        released(tensors(FORGET), tensors(RETAIN)[:1], "sum")
