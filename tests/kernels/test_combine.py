"""The combine kernel: bits of the elementwise formula, coefficients from a formula or from a table."""

import pytest
import torch

import sago.reference
from sago.rules import RULES, Coefficients, Rule
from tests.support import inputs, properties
from tests.support.backends import DTYPES, import_with_triton, on_device, poisoned

kernels = import_with_triton("sago.kernels")

BF16, FP16, FP32, FP64 = DTYPES


def torch_rule(rule):
    """The same rule, with coefficients that torch computes ahead of the kernel."""
    return Rule(rule.name, lambda *numbers: rule.coefficients(*numbers), rule.scope, rule.gated)


def combine(
    device,
    forget,
    retain,
    rule,
    gram=None,
    sums=0,
    rows=None,
    gamma=0.75,
    alpha=1.5,
    eps=0.0,
    dtype=None,
    given=None,
    propagate=False,
):
    sides = [[None if t is None else on_device(t, device) for t in side] for side in (forget, retain)]
    out = [poisoned(f if r is None else r, dtype) for f, r in zip(*sides, strict=True)]
    rows = list(range(len(out))) if rows is None else rows
    made = kernels.Batch(torch.device(device), *sides, out, rows, max(rows) + 1)
    if gram is not None:
        gram = gram.to(device)
    if given is not None:
        values = torch.tensor(given, dtype=FP64, device=device)
        given = Coefficients(values, ("any",) * values.shape[1])
    table = kernels.combine(made, rule, gamma, alpha, eps, gram, sums, given, propagate)
    return [t.cpu() for t in out], table


def reference(forget, retain, coefficients, dtype=None):
    out = []
    for f, r, numbers in zip(forget, retain, coefficients, strict=True):
        f, r = (torch.zeros_like(r) if f is None else f), (torch.zeros_like(f) if r is None else r)
        u = sago.reference.update(f, r, numbers)
        dtype_out = dtype or r.dtype
        out.append((u.float() if dtype_out.itemsize == 2 else u).to(dtype_out))
    return out


@pytest.mark.parametrize("name", ["sum", "sago", "sago_prefer_retain"])
@pytest.mark.parametrize("by_table", [False, True], ids=["formula", "table"])
def test_elementwise_bits(device, name, by_table):
    rule = torch_rule(RULES[name]) if by_table else RULES[name]
    numbers = sago.rules.REFERENCES[name](0, 0, 0, 0.75, 1.5)
    for family in ("specials", "unaligned", "tails", "missing"):
        forget, retain = inputs.FAMILIES[family](BF16, FP32)
        both = [(f, r) for f, r in zip(forget, retain, strict=True) if f is not None or r is not None]
        forget, retain = (list(side) for side in zip(*both, strict=True))
        found, _ = combine(device, forget, retain, rule)
        dtype = [(f if r is None else r).dtype for f, r in both]
        expected = [reference([f], [r], [numbers], d)[0] for (f, r), d in zip(both, dtype, strict=True)]
        properties.assert_equal_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_at_the_store(device, dtype):
    f, r = (t.float() for t in inputs.pair(500))
    found, _ = combine(device, [f], [r], RULES["sum"], gamma=1 / 3, alpha=1 / 7, dtype=dtype)
    properties.assert_equal_bits(found, reference([f], [r], [(1 / 3, 1 / 7, 1 / 3, 1 / 7)], dtype))


def test_rows_have_coefficients_of_their_own(device):
    forget, retain = inputs.tails(FP32, FP32)
    rows = [(3 * i) % 4 for i in range(len(forget))]
    gram = torch.tensor([[1.0, -1.0, 4.0], [2.0, 3.0, 1.0], [5.0, -7.0, 2.0], [1.0, 0.0, 0.0]], dtype=FP64)
    numbers = [sago.reference.pcgrad(*gram[row].tolist(), 0.75, 1.5) for row in rows]
    for rule in (RULES["pcgrad"], torch_rule(RULES["pcgrad"])):
        found, _ = combine(device, forget, retain, rule, gram, rows=rows)
        properties.assert_equal_bits(found, reference(forget, retain, numbers))


def test_one_row_of_numbers_for_all(device):
    """A row stride of 0, as a rule of global scope gives it."""
    forget, retain = inputs.tails(FP32, FP32)
    gram = torch.tensor([[2.0, -3.0, 4.0, 9.0, 9.0, 9.0]], dtype=FP64)
    numbers = sago.reference.blur(2.5, -3.0, 4.5, 0.75, 1.5)
    for rule in (RULES["blur"], torch_rule(RULES["blur"])):
        everywhere = gram.to(device).expand(len(forget), -1)
        found, _ = combine(device, forget, retain, rule, everywhere, eps=0.5)
        properties.assert_equal_bits(found, reference(forget, retain, [numbers] * len(forget)))


def gated_gram(ff, fr, rr, gamma, alpha):
    return fr / ff, alpha, gamma, rr


@pytest.mark.parametrize("by_table", [False, True], ids=["formula", "table"])
def test_all_four_coefficients(device, by_table):
    rule = Rule("mine", gated_gram, "tensor", gated=True)
    forget, retain = inputs.specials(FP32, FP32)
    gram = torch.tensor([[2.0, -3.0, 4.0]], dtype=FP64)
    found, _ = combine(device, forget, retain, torch_rule(rule) if by_table else rule, gram)
    properties.assert_equal_bits(found, reference(forget, retain, [(-1.5, 1.5, 0.75, 4.0)]))


@pytest.mark.parametrize("sums", [3, 6, 9])
def test_sums_on_the_way_are_those_of_gram(device, sums):
    for name in ("tails", "unaligned", "scale_1"):
        forget, retain = inputs.IN_RANGE[name](BF16, BF16)
        _, table = combine(device, forget, retain, RULES["sago"], sums=sums)
        sides = [[on_device(t, device) for t in side] for side in (forget, retain)]
        made = kernels.Batch(torch.device(device), *sides, sides[1], list(range(len(forget))), len(forget))
        properties.assert_equal_bits([table], [kernels.gram(made, sums)])


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_in_place(device, where):
    for name in ("tails", "unaligned"):
        forget, retain = inputs.IN_RANGE[name](FP32, FP32)
        expected, _ = combine(device, forget, retain, RULES["sago"])
        sides = [[on_device(t, device) for t in side] for side in (forget, retain)]
        out = sides[("forget", "retain").index(where)]
        made = kernels.Batch(torch.device(device), *sides, out, list(range(len(out))), len(out))
        assert kernels.combine(made, RULES["sago"], 0.75, 1.5, 0.0, None, 0) is None
        properties.assert_equal_bits([t.cpu() for t in out], expected)


def test_weights_on_the_device(device):
    forget, retain = inputs.tails(FP32, FP32)
    gamma, alpha = (torch.tensor(w, dtype=FP64, device=device) for w in (0.1, 0.3))
    expected, _ = combine(device, forget, retain, RULES["sum"], gamma=0.1, alpha=0.3)
    for g, a in ((gamma, alpha), (gamma, 0.3), (0.1, alpha)):
        found, _ = combine(device, forget, retain, RULES["sum"], gamma=g, alpha=a)
        properties.assert_equal_bits(found, expected)


def with_nan(expected, forget, retain):
    """NaN wherever either gradient is NaN or inf."""
    for i, pair in enumerate(zip(forget, retain, strict=True)):
        for t in pair:
            if t is not None:
                expected[i] = expected[i].where(t.isfinite(), torch.nan)
    return expected


@pytest.mark.parametrize("name", ["sum", "sago"])
@pytest.mark.parametrize("by_table", [False, True], ids=["formula", "table"])
def test_nan_and_inf_propagate(device, name, by_table):
    """Of both gradients, in whole vectors and in the tail, also where the coefficient is 0 or one is None."""
    rule = torch_rule(RULES[name]) if by_table else RULES[name]
    for dtypes in ((BF16, BF16), (FP32, FP16), (FP64, FP64)):
        (f,), (r,) = inputs.specials(*dtypes)
        forget, retain = [f, f[1:], None, f[:15]], [r, r[1:], r, None]
        for gamma, alpha in ((0.75, 1.5), (0.0, 1.0)):
            numbers = sago.rules.REFERENCES[name](0, 0, 0, gamma, alpha)
            # What takes the place of None has its dtype.
            sides = [f, f[1:], torch.zeros_like(r), f[:15]], [r, r[1:], r, torch.zeros_like(f[:15])]
            expected = with_nan(reference(*sides, [numbers] * 4), forget, retain)
            given = {"gamma": gamma, "alpha": alpha, "propagate": True}
            found, _ = combine(device, forget, retain, rule, **given)
            properties.assert_equal_bits(found, expected)
            found, table = combine(device, forget, retain, rule, sums=9, **given)
            properties.assert_equal_bits(found, expected)
            assert table[0, 4:6].tolist() == [(~t.isfinite()).sum() for t in (f, r)]


def test_what_overflows_on_the_way_is_not_made_nan(device):
    """Only the gradients are looked at: fp16 may overflow at the store, an fp32 product before it."""
    f = torch.tensor([60000.0, -60000.0] * 10, dtype=FP16)
    for propagate in (False, True):
        found, _ = combine(device, [f], [f], RULES["sum"], propagate=propagate)
        assert torch.equal(found[0], f * torch.inf)


@pytest.mark.parametrize("gated", [True, False])
def test_given_coefficients_take_the_place_of_the_rule(device, gated):
    """A row of them for each row, exact zeros and NaN among them; neither weights nor products matter."""
    rule = Rule("never asked", lambda *_: (7.0,) * (4 if gated else 2), "tensor", gated)
    both = [[0.5, -2.0, 1 / 3, 3.0], [0.0, 1.5, 0.75, 0.0], [0.0, 0.0, torch.nan, 1.0], [0.0, -1.0, 0.0, 1.0]]
    numbers = [row if gated else row[2:] * 2 for row in both]
    given = numbers if gated else [row[2:] for row in numbers]
    forget, retain = inputs.tails(FP32, FP32)
    rows = [(3 * i) % 4 for i in range(len(forget))]
    gram = torch.full((4, 3), torch.nan, dtype=FP64)
    expected = reference(forget, retain, [numbers[row] for row in rows])
    for unused in (None, gram):
        found, _ = combine(device, forget, retain, rule, unused, rows=rows, given=given)
        properties.assert_equal_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_coefficients_in_one_row_for_all(device, dtype):
    """Rounded once, to the dtype of the arithmetic; with and without sums and NaN."""
    forget, retain = inputs.FAMILIES["specials"](dtype, dtype)
    forget, retain = [*forget, forget[0][2:]], [*retain, retain[0][2:]]
    numbers = (0.0, 1 / 7, 1 / 3, 0.0)
    expected = reference(forget, retain, [numbers] * 2)
    found, _ = combine(device, forget, retain, RULES["sago"], given=[numbers])
    properties.assert_equal_bits(found, expected)
    found, table = combine(device, forget, retain, RULES["sago"], given=[numbers], sums=9, propagate=True)
    properties.assert_equal_bits(found, with_nan(expected, forget, retain))
    made = kernels.Batch(
        torch.device(device),
        *([on_device(t, device) for t in x] for x in (forget, retain, retain)),
        [0, 1],
        2,
    )
    properties.assert_equal_bits([table], [kernels.gram(made, 9)])
