"""The peer does what the released code does, also at the magnitudes where its epsilon has an effect."""

import pytest
import torch
from torch import Tensor

from benchmarks.released import EPS, RULES, released
from tests.support.oracle import rounding_error

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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-8])
def test_float64_against_the_formula(rule, scale):
    updates = released(tensors(FORGET, scale), tensors(RETAIN, scale), rule, GAMMA, ALPHA)
    # These rules accumulate the inner products in float32, the others in float64. The products add 8 terms,
    # and coefficients below 3 multiply elements up to 4.
    dtype = torch.float32 if rule in ("pcgrad_global", "blur") else torch.float64
    relative = 12 * rounding_error(8, dtype)
    assert_close(updates, by_hand(rule, scale), scale, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_lower_precision_keeps_the_dtype(rule, dtype):
    updates = released(tensors(FORGET, dtype=dtype), tensors(RETAIN, dtype=dtype), rule, GAMMA, ALPHA)
    assert all(u.dtype == dtype for u in updates)
    # The largest element of an update is 8. Two sums, a quotient, two products and the update are rounded.
    assert_close(updates, by_hand(rule), 8.0, rounding_error(6, dtype))


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_untouched(rule):
    forget, retain = tensors(FORGET), tensors(RETAIN)
    updates = released(forget, retain, rule, GAMMA, ALPHA)
    assert all(map(torch.equal, forget + retain, tensors(FORGET) + tensors(RETAIN)))
    pointers = {t.data_ptr() for t in forget + retain}
    assert not pointers & {u.data_ptr() for u in updates}


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"`rule`.*Found 'sagp'"):
        released(tensors(FORGET), tensors(RETAIN), "sagp")
