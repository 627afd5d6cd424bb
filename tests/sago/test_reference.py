"""The reference against the oracle: they share no code, the oracle is float64 throughout."""

import pytest
import torch

import sago.reference
from tests.support import inputs, oracle, properties
from tests.support.backends import DTYPES, RULES, Backend

# Allowed error: that of tests.support.oracle, a few roundings in the precision of the arithmetic.
REFERENCE = Backend("reference", "cpu")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_updates_and_report(rule, dtypes):
    for make in inputs.IN_RANGE.values():
        forget, retain = make(*dtypes)
        finite = all(t is None or t.isfinite().all() for t in forget + retain)
        updates, report = REFERENCE(forget, retain, rule, gamma=0.75, alpha=1.5)
        properties.assert_updates(updates, forget, retain, rule, gamma=0.75, alpha=1.5)
        if finite:
            properties.assert_report(report, forget, retain, rule, gamma=0.75, alpha=1.5)


@pytest.mark.parametrize("rule", ["sum", "sago", "sago_prefer_retain"])
@pytest.mark.parametrize("family", ["scale_1e-30", "subnormals"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_rules_at_every_magnitude(rule, family, dtype):
    forget, retain = inputs.FAMILIES[family](dtype, dtype)
    properties.assert_as_oracle(REFERENCE, forget, retain, rule, gamma=0.75, alpha=1.5)


def test_one_rounding_at_the_end():
    # 3 * 257/256 rounds to 3.015625 in bf16; 257/256 itself would round to 1.
    f = torch.tensor([1 + 2.0**-8])
    (update,), _ = REFERENCE([f], [torch.zeros(1)], "sum", gamma=3.0, dtypes=[torch.bfloat16])
    assert update.item() == 3.015625


def test_rules_by_hand():
    for rule, expected in {
        "sum": (2, 5, 2, 5),
        "sago": (0, 5, 2, 0),
        "sago_prefer_retain": (0, 5, 2, 5),
        "pcgrad": (2, 5 + 2 * 0.75, 2, 5 + 2 * 0.75),
        "blur": (2 + 5 * 1.5, 5, 2 + 5 * 1.5, 5),
    }.items():
        function = sago.rules.REFERENCES[rule]
        assert function(2.0, -3.0, 4.0, 2.0, 5.0) == expected


def test_no_projection_without_conflict():
    assert sago.reference.pcgrad(2.0, 3.0, 4.0, 2.0, 5.0) == (2, 5, 2, 5)


def test_it_is_autograd_free():
    f = torch.ones(3, requires_grad=True)
    r = torch.nn.Parameter(-torch.ones(3))
    updates, report = sago.reference.synthesize([f], [r], "pcgrad")
    assert not updates[0].requires_grad
    assert not report.ff.requires_grad


def test_argument_forms_agree():
    f, r = inputs.pair(10)
    one, _ = sago.reference.synthesize(f, r, "pcgrad")
    (listed,), _ = sago.reference.synthesize([f], [r], "pcgrad")
    in_retain, in_forget = r.clone(), f.clone()
    sago.reference.synthesize_(f, in_retain, "pcgrad")
    sago.reference.synthesize_(in_forget, r, "pcgrad", out="forget")
    properties.assert_equal_bits([listed, in_retain, in_forget], [one, one, one])


def test_the_oracle_sees_conflicts_by_sign():
    f = torch.tensor([1e-200, -1e-200, 0.0, 1.0, torch.nan, torch.inf], dtype=torch.float64)
    r = torch.tensor([-1e-200, 1e-200, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    assert oracle.in_conflict(oracle.array(f), oracle.array(r)).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
