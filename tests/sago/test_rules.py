"""Rules by value: small enough to check by hand, the same on every backend."""

from pathlib import Path

import pytest
import torch

import sago
import sago.reference
from sago.rules import REFERENCES, RULES, evaluate, form, ratio, scaled, where
from tests.support import backends, inputs, oracle, properties

DOUBLE = torch.float64
# Sums of small integers are exact. What follows is a quotient, two products and a sum of terms below 12.
FEW = oracle.rounding_error(16, DOUBLE)


def tensors(*rows):
    return [torch.tensor(row, dtype=DOUBLE) for row in rows]


# f = (3, -2, 0, 1), r = (-4, 1, 2, 0): conflicts at 0 and 1, <f,f> = 14, <f,r> = -14, <r,r> = 21.
# g = (1, 1), s = (1, 0): no conflict, <g,g> = 2, <g,s> = 1, <s,s> = 1. In all: 16, -13, 22.
FORGET = tensors([3.0, -2.0, 0.0, 1.0], [1.0, 1.0])
RETAIN = tensors([-4.0, 1.0, 2.0, 0.0], [1.0, 0.0])
GOLDEN = {
    "sum": [[-5.0, 0.0, 4.0, 1.0], [3.0, 1.0]],  # f + 2r
    "sago": [[-8.0, 2.0, 0.0, 1.0], [1.0, 1.0]],  # 2r where in conflict, else f
    "sago_prefer_retain": [[-8.0, 2.0, 4.0, 1.0], [3.0, 1.0]],  # 2r where in conflict, else f + 2r
    "pcgrad": [  # k = -14/21 and 0: f + 8/3 r, g + 2s
        [3 - 32 / 3, -2 + 8 / 3, 16 / 3, 1.0],
        [3.0, 1.0],
    ],
    "pcgrad_global": [  # k = -13/22: f + 57/22 r
        [3 - 4 * 57 / 22, -2 + 57 / 22, 2 * 57 / 22, 1.0],
        [1 + 57 / 22, 1.0],
    ],
    "blur": [  # k = -13/16: (1 + 26/16) f + 2r
        [3 * 2.625 - 8, -2 * 2.625 + 2, 4.0, 2.625],
        [2.625 + 2, 2.625],
    ],
}


def test_the_rules_of_the_paper_come_first():
    assert list(GOLDEN) == list(backends.RULES)
    assert sago.list_rules()[: len(GOLDEN)] == list(GOLDEN)


@pytest.mark.parametrize("rule", sago.list_rules())
def test_every_rule_is_in_the_table_of_rules(rule):
    root = Path(sago.__file__).parents[1]
    assert f"\n| `{rule}` | " in (root / "docs" / "rules.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", GOLDEN)
def test_every_rule_of_the_paper_is_documented(rule):
    root = Path(sago.__file__).parents[1]
    assert f"\n| `{rule}` | " in (root / "README.md").read_text(encoding="utf-8")
    assert f"\n**`{rule}`** " in (root / "docs" / "math.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", sago.list_rules())
def test_every_rule_is_a_function_of_the_reference(rule):
    assert getattr(sago.reference, rule) is REFERENCES[rule]
    assert rule in sago.reference.__all__


@pytest.mark.parametrize("rule", GOLDEN)
def test_golden_values(backend, rule):
    updates, _ = backend(FORGET, RETAIN, rule, alpha=2.0)
    for update, row in zip(updates, GOLDEN[rule], strict=True):
        torch.testing.assert_close(update, torch.tensor(row, dtype=DOUBLE), rtol=FEW, atol=FEW)


@pytest.mark.parametrize("s", [1.0, 1e-6, 1e-8])
def test_pcgrad_projects_at_every_scale(backend, s):
    # k = -s*s / (2*s*s): f + r/2 + r = (s - 3s/2, 3s/2)
    (update,), _ = backend(tensors([s, 0.0]), tensors([-s, s]), "pcgrad")
    torch.testing.assert_close(update, torch.tensor([-s / 2, 3 * s / 2], dtype=DOUBLE), rtol=FEW, atol=0)


def test_conflict_is_by_sign_not_by_product(backend):
    for dtype, small in ((torch.float32, 1e-30), (torch.float16, 1e-5), (DOUBLE, 1e-200)):
        f, r = torch.full((3,), small, dtype=dtype), torch.full((3,), -small, dtype=dtype)
        (update,), _ = backend([f], [r], "sago", alpha=2.0)
        properties.assert_equal_bits([update], [2 * r])


def test_zeros_and_nan_do_not_conflict(backend):
    f = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, -1.0])
    r = torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0, torch.nan])
    (update,), report = backend([f], [r], "sago", gamma=2.0)
    properties.assert_equal_bits([update], [2 * f])
    assert report.conflict_fraction.item() == 0


@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global", "blur"])
def test_no_projection_where_the_square_underflows(backend, rule):
    # 1e-30 squared is below what fp32 and, for 1e-170, fp64 hold.
    f, r = torch.full((4,), 1e-170, dtype=DOUBLE), torch.full((4,), -1e-170, dtype=DOUBLE)
    (update,), _ = backend([f], [r], rule, gamma=3.0)
    properties.assert_equal_bits([update], [3 * f + r])


@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global", "blur"])
@pytest.mark.parametrize("large", [1e170, torch.inf, torch.nan])
def test_a_sum_that_overflows_is_seen(backend, rule, large):
    f = torch.tensor([large, 1.0, 1.0, -1.0], dtype=DOUBLE)
    r = torch.tensor([-large, 1.0, -1.0, 1.0], dtype=DOUBLE)
    (update,), _ = backend([f], [r], rule)
    assert update.isnan().all()


@pytest.mark.parametrize("zero", [0.0, torch.zeros((), dtype=DOUBLE)], ids=["number", "tensor"])
def test_no_projection_with_weight_zero_even_of_nan(backend, zero):
    if isinstance(zero, torch.Tensor):
        zero = zero.to(backend.device)
    f, r = torch.tensor([torch.nan, torch.inf]), torch.tensor([1.0, -2.0])
    for rule in ("sum", "sago_prefer_retain", "pcgrad", "pcgrad_global"):
        (update,), _ = backend([f], [r], rule, gamma=zero)
        assert torch.equal(update, r)
    (update,), _ = backend([r], [f], "blur", alpha=zero)
    assert torch.equal(update, r)


# Ways to read a sum in a comparison, where a NaN would be lost.


def a_gem(ff, fr, rr, gamma, alpha):
    """The example of `sago.Rule` and of docs/rules.md."""
    return gamma, -gamma * where(fr < 0.0, ratio(fr, rr), 0.0)


def of_the_quotient(ff, fr, rr, gamma, alpha):
    k = ratio(fr, rr)
    return gamma, -gamma * where(k < 0.0, k, 0.0)


def only_compared(ff, fr, rr, gamma, alpha):
    return where(fr < 0.0, 0.0, gamma), 0.0


def weight_or_literal(ff, fr, rr, gamma, alpha):
    return where(rr > ff, alpha, 1), where(fr < 0.0, 1, 0)


def scaled_quotient(ff, fr, rr, gamma, alpha):
    return gamma, alpha - scaled(gamma, ratio(fr, rr))


COMPARING = (a_gem, of_the_quotient, only_compared, weight_or_literal)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("function", COMPARING)
@pytest.mark.parametrize("by_torch", [False, True], ids=["compiled if it can be", "by torch"])
def test_a_comparison_hides_no_overflow(backend, function, scope, by_torch):
    rule = sago.Rule("mine", (lambda *x: function(*x)) if by_torch else function, scope)
    f, r = tensors([1e200, 1e200, 1.0], [1.0, 2.0]), tensors([1e200, -1e200, 1.0], [1.0, -1.0])
    updates, report = backend(f, r, rule)
    assert report.fr[0].isnan()
    assert updates[0].isnan().all()
    assert updates[1].isnan().all() if scope == "global" else updates[1].isfinite().all()
    assert report.uu.isnan().tolist() == [True] if scope == "global" else [True, False]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("function", COMPARING)
def test_a_comparison_hides_no_overflow_of_fp32(fast_backend, function, scope):
    f, r = torch.tensor([1e20, 1e20, 1.0]), torch.tensor([1e20, -1e20, 1.0])
    (update,), _ = fast_backend([f], [r], sago.Rule("mine", function, scope))
    assert update.isnan().all()


@pytest.mark.parametrize("function", COMPARING)
def test_a_comparison_hides_no_overflow_in_the_reference(function):
    f, r = tensors([1e200, 1e200, 1.0], [1.0, 2.0]), tensors([1e200, -1e200, 1.0], [1.0, -1.0])
    updates, report = sago.reference.synthesize(f, r, sago.Rule("mine", function, "tensor"))
    assert updates[0].isnan().all()
    assert updates[1].isfinite().all()
    assert report.uu.isnan().tolist() == [True, False]
    nothing, _ = sago.reference.synthesize(f, r, sago.Rule("mine", scaled_quotient, "tensor"), gamma=0.0)
    assert torch.equal(nothing[0], r[0])


@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global", sago.Rule("a_gem", a_gem, "tensor")])
def test_an_overflow_that_the_rule_does_not_read(backend, rule):
    (update,), report = backend(tensors([1e200, 1.0]), tensors([-1e-200, 1.0]), rule, gamma=0.0)
    assert report.ff.isinf().all()
    assert update.isfinite().all()
    (update,), _ = backend(tensors([1e200, 1.0]), tensors([-1e-100, 1.0]), rule)
    assert update.isfinite().all()


def test_an_overflow_reaches_only_the_branch_that_reads_it(backend):
    rule = sago.Rule(
        "mine", lambda ff, fr, rr, gamma, alpha: (0.0, alpha, where(ff > rr, gamma, 1.0), 0.0), "tensor", True
    )
    (update,), _ = backend(tensors([1e200, 1.0, 0.0]), tensors([-1.0, 1.0, 1.0]), rule, alpha=2.0)
    torch.testing.assert_close(
        update, tensors([-2.0, torch.nan, torch.nan])[0], equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (3.0, 2.0, 1.5),
        (3.0, -2.0, -1.5),
        (3.0, 0.0, 0.0),
        (3.0, -0.0, 0.0),
        (3.0, torch.inf, torch.nan),
        (torch.inf, 2.0, torch.nan),
        (torch.nan, 0.0, torch.nan),
    ],
)
def test_ratio(x, y, expected):
    (x,), (y,), (expected,) = tensors([x]), tensors([y]), tensors([expected])
    torch.testing.assert_close(ratio(x, y), expected, equal_nan=True, rtol=0, atol=0)


def test_eps_is_added_to_the_squares(backend):
    f, r = tensors([2.0, 0.0]), tensors([-1.0, 1.0])
    (update,), _ = backend(f, r, "pcgrad", eps=2.0)  # k = -2 / (2 + 2)
    assert update.tolist() == [0.5, 1.5]
    (update,), _ = backend(f, r, "blur", eps=4.0)  # k = -2 / (4 + 4)
    assert update.tolist() == [1.5, 1.0]


def test_a_rule_of_ones_own():
    rule = sago.Rule("a_gem", a_gem, scope="global", formula="f - min(0, fr/rr) r")
    updates, report = sago.synthesize(tensors([1.0, 0.0]), tensors([-1.0, 1.0]), rule)
    assert updates[0].tolist() == [0.5, 0.5]
    assert report.rule == "a_gem"


@pytest.mark.parametrize(
    ("arguments", "error", "finding"),
    [
        ({"coefficients": 3, "scope": "tensor"}, TypeError, "`coefficients`.*Found int"),
        ({"coefficients": lambda *x: x[3:], "scope": "layer"}, ValueError, "`scope`.*Found 'layer'"),
    ],
)
def test_a_rule_checks_what_it_is_made_of(arguments, error, finding):
    with pytest.raises(error, match=finding):
        sago.Rule("mine", **arguments)


@pytest.mark.parametrize("gated", [True, False])
def test_a_rule_with_the_wrong_number_of_coefficients(gated):
    with pytest.raises(
        ValueError,
        match=r"`coefficients`.*" + ("4 numbers.*is gated" if gated else "2 numbers.*is not gated"),
    ):
        sago.Rule("mine", lambda ff, fr, rr, gamma, alpha: (gamma, alpha, alpha), "tensor", gated=gated)


def test_rules_are_values():
    rule = RULES["sago"]
    assert rule == sago.Rule("sago", rule.coefficients, "element", gated=True, formula=rule.formula)
    assert all(rule.formula for rule in RULES.values())


def test_what_is_known_of_coefficients():
    """The CPU path leaves out what a literal or a weight says is zero."""
    cpu = torch.device("cpu")
    _, terms, _ = evaluate(RULES["sago"], None, 2.0, 0.0, 0.0, cpu)
    assert terms == ("zero", "zero", "nonzero", "zero")
    _, terms, _ = evaluate(RULES["sago"], None, torch.tensor(2.0), 1.0, 0.0, cpu)
    assert terms == ("zero", "nonzero", "any", "zero")
    _, terms, _ = evaluate(RULES["sum"], None, 1e-50, 1.0, 0.0, cpu)  # 0 in fp32
    assert terms == ("any", "nonzero")
    gram = torch.ones(1, 3, dtype=DOUBLE)
    _, terms, _ = evaluate(RULES["pcgrad"], gram, 2.0, 1.0, 0.0, cpu)  # a is a weight, b reads sums
    assert terms == ("nonzero", "any")
    by_item = sago.Rule("mine", lambda *x: (0.0 if x[1][0].item() < 0.0 else 1.0, x[4]), "tensor")
    _, terms, _ = evaluate(by_item, gram, 2.0, 1.0, 0.0, cpu)
    assert terms == ("any", "any")


@pytest.mark.parametrize("rule", backends.GRAM)
@pytest.mark.parametrize("family", inputs.IN_RANGE)
def test_gram_rules_of_float64_against_the_oracle(rule, family):
    """In fp64 the reference has to agree to the last few bits."""
    forget, retain = inputs.IN_RANGE[family](DOUBLE, DOUBLE)
    properties.assert_as_oracle(
        backends.Backend("reference", "cpu"), forget, retain, rule, gamma=0.75, alpha=1.5
    )


def test_helpers_of_a_function_are_those_that_it_calls_by_global_names():
    code = """
def half(x): return 0.5 * x
def mul(x): return x
def direct(ff, fr, rr, gamma, alpha): return gamma, half(alpha).mul(1.0)
def inside(ff, fr, rr, gamma, alpha): return gamma, (lambda x: half(x))(alpha)
"""
    names = {}
    exec(code, names)
    assert "__name__" not in names  # so that the functions have no module
    for name in ("direct", "inside"):
        assert [found[1] for found in form.helpers(names[name])] == ["half"]


def test_a_sum_that_a_rule_began_to_read_later_is_nan(backend):
    """Rules of scope "element" get no sums, and zeros in their place would hide the mistake."""
    late = []
    rule = sago.Rule("late", lambda ff, fr, rr, gamma, alpha: (gamma, fr if late else alpha), "element")
    late.append(True)
    (update,), _ = backend(tensors([1.0, 2.0]), tensors([3.0, 4.0]), rule)
    assert update.isnan().all()


def by_signs(f, r):
    return where(f > 0.0, where(r < 0.0, 1.0, 0.0), 2.0)


def by_size(f, r):
    return where(f > r, 1.0, 0.0)


def by_tiny_elements(f, r):
    return where(f * f < 1e-12, 1.0, 0.0)


def by_large_elements(f, r):
    return where(r * r < 1e12, 1.0, 0.0)


@pytest.mark.parametrize("gate", [by_signs, by_size, by_tiny_elements, by_large_elements])
def test_a_gate_that_reads_only_signs_is_recognised(gate):
    """Such a gate has the same classes if gradients are scaled, as in a mean."""
    classes = 3 if gate is by_signs else 2
    rule = sago.Rule("gate", lambda *numbers: (numbers[3],) * (2 * classes), "element", gate=gate)
    assert rule.by_sign == (gate is by_signs)
