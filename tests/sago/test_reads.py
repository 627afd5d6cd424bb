"""Which inner products a coefficient depends on, as the library determines it from the function alone."""

import pytest
import torch

import sago
from sago.rules import RULES, ratio, scaled, where
from sago.rules.reads import CASES, PRODUCTS, reads

NOTHING, ALL = set(), set(PRODUCTS)
HELD = torch.tensor(0.5)


def compared(ff, fr, rr, gamma, alpha):
    return where(fr < 0.0, alpha, 0.0), alpha


def shapes(ff, fr, rr, gamma, alpha):
    half = torch.full(fr.shape, 0.5, dtype=fr.dtype, device=fr.device)
    return half + torch.zeros_like(ff) + torch.full_like(rr, 2.0), rr.new_zeros(len(rr)) + gamma


def held(ff, fr, rr, gamma, alpha):
    return HELD, HELD * gamma


def views(ff, fr, rr, gamma, alpha):
    return torch.stack([ff, fr]).sum(0).sqrt() * gamma, torch.maximum(rr.double().contiguous(), alpha)


def item(ff, fr, rr, gamma, alpha):
    return gamma, 2.0 if fr[0].item() < 0.0 else 1.0


def size_of_a_selection(ff, fr, rr, gamma, alpha):
    return gamma, alpha * float(fr[fr < 0.0].shape[0])


def filled_with_a_sum(ff, fr, rr, gamma, alpha):
    return torch.full_like(ff, fr.sum()) * gamma, alpha


def ones_like_a_selection(ff, fr, rr, gamma, alpha):
    return gamma, torch.ones_like(fr[fr < 0.0]).sum() * alpha


def in_place(ff, fr, rr, gamma, alpha):
    out = torch.zeros_like(ff)
    out[:].add_(fr)
    return out, alpha


def assigned(ff, fr, rr, gamma, alpha):
    out = torch.zeros_like(ff)
    out[:] = fr
    return out, alpha


def through_numpy(ff, fr, rr, gamma, alpha):
    return torch.from_numpy(fr.numpy()) * gamma, alpha


def vectorized(ff, fr, rr, gamma, alpha):
    return torch.vmap(lambda x: 2.0 * x)(fr) * gamma, alpha


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2.0 * x


def autograd_function(ff, fr, rr, gamma, alpha):
    return Doubled.apply(rr) * gamma, alpha


EXPECTED = {
    compared: ({"fr"}, NOTHING),
    shapes: (NOTHING, NOTHING),
    held: (NOTHING, NOTHING),
    views: ({"ff", "fr"}, {"rr"}),
    autograd_function: ({"rr"}, NOTHING),
    filled_with_a_sum: ({"fr"}, NOTHING),
    ones_like_a_selection: (NOTHING, {"fr"}),
    # Where it cannot be determined.
    item: (ALL, ALL),
    size_of_a_selection: (ALL, ALL),
    in_place: (ALL, ALL),
    assigned: (ALL, ALL),
    through_numpy: (ALL, ALL),
    vectorized: (ALL, NOTHING),
}


@pytest.mark.parametrize("function", EXPECTED)
def test_what_a_coefficient_reads(function):
    found = reads(function)
    assert set(found) == set(CASES)
    assert all(tuple(map(set, coefficients)) == EXPECTED[function] for coefficients in found.values())


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sum", (NOTHING, NOTHING)),
        ("sago", (NOTHING,) * 4),
        ("sago_prefer_retain", (NOTHING,) * 4),
        ("pcgrad", (NOTHING, {"fr", "rr"})),
        ("blur", ({"ff", "fr"}, NOTHING)),
    ],
)
def test_what_the_rules_read(rule, expected):
    assert tuple(map(set, RULES[rule].reads[False, False])) == expected


def test_a_weight_of_zero_leaves_out_what_it_scales():
    def function(ff, fr, rr, gamma, alpha):
        return scaled(gamma, scaled(alpha, ff)), where(alpha == HELD, fr, 0.0) + gamma * rr

    found = {case: tuple(map(set, read)) for case, read in reads(function).items()}
    # 0 * inf is NaN, and the tensor that alpha is compared with may change from call to call.
    both = {"fr", "rr"}
    assert found == {case: (NOTHING if any(case) else {"ff"}, both) for case in CASES}


@pytest.mark.parametrize("function", [f for f, expected in EXPECTED.items() if any(expected)])
def test_an_elementwise_rule_reads_no_inner_products(function):
    names = ", ".join(f"`{name}`" for name in sorted(set().union(*EXPECTED[function])))
    with pytest.raises(ValueError, match=f"`scope` should be 'tensor' or 'global'.*reads {names}"):
        sago.Rule("mine", function, "element")
    sago.Rule("mine", function, "tensor")


@pytest.mark.parametrize("function", [shapes, held])
def test_shapes_and_tensors_of_ones_own_are_no_inner_products(function):
    sago.Rule("mine", function, "element")


def test_a_read_only_where_a_weight_is_zero_is_one():
    def function(ff, fr, rr, gamma, alpha):
        return where(gamma == 0.0, ratio(fr, rr), 1.0), alpha

    with pytest.raises(ValueError, match="`scope`"):
        sago.Rule("mine", function, "element")
