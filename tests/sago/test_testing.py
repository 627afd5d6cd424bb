"""`sago.testing.check_rule` accepts every registered rule, and finds what is wrong with others."""

import pytest
import torch

import sago
from sago.rules import Guarantees, abs, agreed, ratio, sqrt, where
from sago.testing import check_rule
from tests.conftest import needs_triton

pytestmark = needs_triton  # the kernels are one of the backends


@pytest.mark.parametrize("name", sago.list_rules())
def test_registered_rules(name):
    check_rule(name, cases=12)


def test_other_cases_of_the_rules_with_most_branches():
    for name in ("pcgrad", "cagrad", "ties", "cautious"):
        check_rule(name, cases=36, seed=1)


def total(ff, fr, rr, gamma, alpha):
    return gamma, alpha


def larger(f, r):
    return where(abs(f) > abs(r), 0.0, 1.0)


def by_size(ff, fr, rr, gamma, alpha):
    return gamma, 0.0, 0.0, alpha


def test_rules_that_are_not_registered():
    check_rule(sago.Rule("larger", by_size, "element", gate=larger), cases=22)
    check_rule(
        sago.Rule("mine", total, "tensor", guarantees=Guarantees()),
        lambda ff, fr, rr, gamma, alpha: (gamma, alpha, gamma, alpha),
        cases=22,
    )


def without_length(ff, fr, rr, gamma, alpha):
    return gamma / sqrt(ff), alpha / sqrt(rr)


def normalised(ff, fr, rr, gamma, alpha):
    return ratio(gamma, sqrt(ff)), ratio(alpha, sqrt(rr))


def above_a_threshold(f, r):
    return where(abs(f) > 0.5, 0.0, 1.0)


WRONG = {
    "not finite": sago.Rule("wrong", without_length, "global", guarantees=Guarantees(degree=0)),
    "the degree is not 1": sago.Rule("wrong", normalised, "global"),
    "<u,r> is": sago.Rule("wrong", total, "element", guarantees=Guarantees(non_negative_with_retain=True)),
    "<u,f> is": sago.Rule("wrong", total, "element", guarantees=Guarantees(non_negative_with_forget=True)),
    "an element": sago.Rule("wrong", total, "element", guarantees=Guarantees(agrees_with_retain=True)),
    "the gate changes|the degree": sago.Rule("wrong", by_size, "element", gate=above_a_threshold),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_rules(says):
    with pytest.raises(AssertionError, match=says):
        check_rule(WRONG[says])


def test_a_wrong_definition():
    with pytest.raises(AssertionError, match=r"backend 'reference'.*off by"):
        check_rule("pcgrad", lambda ff, fr, rr, gamma, alpha: (gamma, alpha, gamma, alpha))


def test_an_overflow_that_is_hidden(monkeypatch):
    monkeypatch.setattr("sago.testing.synthesize", lambda f, r, *_, **__: (f, None))
    with pytest.raises(AssertionError):
        check_rule("blur")


# The constructor.


def agree(f, r):
    return where(agreed(f, r), 0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gate": agree, "gated": True}, "`gate` should be None"),
        ({"gate": lambda f, r: f}, "`gate` should return the class"),
        ({"gate": lambda f, r: 0.0}, "`gate` should return the class"),
        ({"gate": lambda f, r: 1.0 if f > 0 else 0.0}, "`gate` should take"),
        ({"by_class": True}, "`by_class` should be False"),
        ({"gate": agree, "coefficients": total}, "tuple of 4 numbers.*gate of 2 classes"),
    ],
)
def test_a_gate_is_checked(arguments, says):
    with pytest.raises(ValueError, match=says):
        sago.Rule(**{"name": "mine", "coefficients": by_size, "scope": "element", **arguments})


THRESHOLD = 0.5


def by_a_number_of_the_module(f, r):
    return where(abs(r) > THRESHOLD * abs(f), 0.0, 1.0)


def by_a_mean(f, r):
    """Wrong: the backends call it with parts of a tensor, or with several tensors in one."""
    return where(abs(r) > 0.5 * (r * r).mean().sqrt(), 0.0, 1.0)


def by_a_default(f, r, threshold=0.5):
    return where(abs(r) > threshold * abs(f), 0.0, 1.0)


def by_a_ratio(f, r):
    return where(abs(ratio(f, r)) > 2.0, 0.0, 1.0)


def by_division(f, r):
    return where(abs(f / 2.0) > abs(r), 0.0, 1.0)


def by_torch(f, r):
    return torch.where(f > r, 0.0, 1.0)


def of_an_outer_function():
    threshold = 0.5

    def gate(f, r):
        return where(abs(r) > threshold * abs(f), 0.0, 1.0)

    return gate


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        (by_a_number_of_the_module, "which uses `THRESHOLD`"),
        (by_a_mean, r"which uses `\(r \* r\)\.mean\(\)\.sqrt`"),
        (by_a_default, "which has default values"),
        (by_a_ratio, "ratio`, which uses division"),
        (by_division, "which uses division"),
        (by_torch, r"which uses `torch\.where`"),
        (of_an_outer_function(), "which reads variables of an outer function"),
        (lambda f, r: where(f > r, 0.0, 1.0), "which is not a plain `def` of its own"),
    ],
)
def test_a_gate_that_cannot_be_compiled_is_refused_on_every_machine(gate, found):
    with pytest.raises(ValueError, match=rf"`gate` should be a function from a file.*Found `.*{found}"):
        sago.Rule("mine", by_size, "element", gate=gate)
