"""Which rules are compiled into the kernel, and that the others give the same result."""

import dataclasses
import functools
import gc
import inspect
import weakref

import pytest
import torch

from sago import rules
from sago.rules import RULES, Rule, ratio, where
from tests.support import inputs, oracle, properties
from tests.support.backends import Backend, import_with_triton

formula = import_with_triton("sago.kernels.formula")

REFERENCE = Backend("reference", "cpu")
FORGET = [inputs.normal(20, seed).float() for seed in (0, 1)]
RETAIN = [inputs.normal(20, seed).float() for seed in (2, 3)]
RHO = 0.5
TENSOR = torch.tensor(0.5)


class Half:
    """A number that cannot be hashed."""

    __hash__ = None

    def __rmul__(self, other):
        return 0.5 * other


HALF = Half()


def arithmetic(ff, fr, rr, gamma, alpha):
    """A docstring."""
    c = fr / (ff + rr)
    return gamma * (1 - c), -alpha * (2.0 + c)


def with_where(ff, fr, rr, gamma, alpha):
    return where(fr < 0.0, gamma, 0.0), where(fr >= 0.0, where(ff == rr, 1, 2), alpha)


def with_helpers(ff, fr, rr, gamma, alpha):
    return rules.scaled(gamma, 1.0), alpha - ratio(fr, rr)


def with_plain_helpers(ff, fr, rr, gamma, alpha):
    return gamma, alpha - ratio(fr, rr)


def literals(ff, fr, rr, gamma, alpha):
    return 1, 0


def power(ff, fr, rr, gamma, alpha):
    return gamma * ff**0.5, alpha * rr**-1


def floor(ff, fr, rr, gamma, alpha):
    return gamma * (ff // 2.0), +alpha


def method(ff, fr, rr, gamma, alpha):
    return gamma * ff.sqrt(), alpha


def torch_function(ff, fr, rr, gamma, alpha):
    return gamma * torch.tanh(fr), torch.maximum(alpha, rr)


def builtin(ff, fr, rr, gamma, alpha):
    return gamma * abs(fr), alpha


def masks(ff, fr, rr, gamma, alpha):
    return where((fr < 0.0) & ~(rr > 20.0), gamma, 0.25), alpha


def global_number(ff, fr, rr, gamma, alpha):
    return gamma * RHO, alpha


def global_object(ff, fr, rr, gamma, alpha):
    return gamma * HALF, alpha


def global_tensor(ff, fr, rr, gamma, alpha):
    return gamma * TENSOR, alpha


def default(ff, fr, rr, gamma, alpha, k=2.0):
    return gamma * k, alpha


def keyword_default(ff, fr, rr, gamma, alpha, *, k=2.0):
    return gamma * k, alpha


def annotated(ff, fr, rr, gamma: float, alpha: float):
    return gamma, alpha


def variadic(*numbers):
    return numbers[3] * 2.0, numbers[4]


def assertion(ff, fr, rr, gamma, alpha):
    assert ff is not None
    return gamma, alpha


@functools.wraps(arithmetic)
def wrapped(*numbers):
    a, b = arithmetic(*numbers)
    return 2 * a, b


def made(k): return lambda ff, fr, rr, gamma, alpha: (gamma * 3.0, alpha)  # fmt: skip


def nested():
    def inner(ff, fr, rr, gamma, alpha):
        return gamma, alpha * 2.0

    return inner


def closure():
    k = 3.0

    def inner(ff, fr, rr, gamma, alpha):
        return gamma * k, alpha

    return inner


class Object:
    def __call__(self, ff, fr, rr, gamma, alpha):
        return gamma, alpha * 2.0

    def bound(self, ff, fr, rr, gamma, alpha):
        return gamma, alpha * 3.0


namespace: dict = {}
exec("def from_a_string(ff, fr, rr, gamma, alpha):\n    return gamma, alpha * 2.0", namespace)


def a_gem(ff, fr, rr, gamma, alpha):
    return gamma, -gamma * where(fr < 0.0, ratio(fr, rr), 0.0)


COMPILED = [a_gem, arithmetic, with_where, with_plain_helpers, literals, nested()]
FALLBACKS = {
    **{f.__name__: f for f in (power, floor, method, torch_function, builtin, masks, global_number)},
    **{
        f.__name__: f
        for f in (global_object, global_tensor, default, keyword_default, annotated, variadic, assertion)
    },
    "with_helpers": with_helpers,
    "wrapped": wrapped,
    "lambda": lambda ff, fr, rr, gamma, alpha: (gamma, alpha - fr / rr),
    "lambda on a line of def": made(1),
    "closure": closure(),
    "object": Object(),
    "method of an object": Object().bound,
    "partial": functools.partial(default, k=4.0),
    "from a string": namespace["from_a_string"],
}


def assert_as_reference(backend, function, gated=False):
    """Against the table of coefficients that torch computes, rounded once: sums are off by `SUM_ERROR`."""
    rule = Rule("mine", function, "tensor", gated=gated)
    expected, _ = REFERENCE(FORGET, RETAIN, rule, gamma=0.75, alpha=1.5)
    found, _ = backend(FORGET, RETAIN, rule, gamma=0.75, alpha=1.5, stats=False)
    properties.assert_near(found, expected, 4 * oracle.SUM_ERROR[torch.float32])


IN_KERNELS = [name for name, rule in RULES.items() if not rule.by_class and name not in ("cagrad", "gradvac")]


@pytest.mark.parametrize("rule", IN_KERNELS)
def test_the_rules_are_compiled_into_the_kernel(rule):
    assert formula.on_device(RULES[rule].coefficients) is not None


@pytest.mark.parametrize("function", COMPILED)
def test_plain_functions_are_compiled_into_the_kernel(fast_backend, function):
    assert formula.on_device(function) is not None
    assert_as_reference(fast_backend, function)


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_functions_are_left_to_torch(fast_backend, name):
    assert formula.on_device(FALLBACKS[name]) is None
    assert_as_reference(fast_backend, FALLBACKS[name])


def gated(ff, fr, rr, gamma, alpha):
    return 0.0, alpha, gamma, ratio(fr, rr)


def test_gated_rules(fast_backend):
    assert formula.on_device(gated) is not None
    assert_as_reference(fast_backend, gated, gated=True)
    assert_as_reference(fast_backend, lambda *numbers: gated(*numbers), gated=True)


@pytest.mark.parametrize("rule", IN_KERNELS)
def test_formula_and_torch_give_the_same_bits(fast_backend, rule):
    """Coefficients are fp64 either way."""
    rule = RULES[rule]
    by_torch = dataclasses.replace(rule, coefficients=lambda *numbers: rule.coefficients(*numbers))
    options = {"gamma": 0.75, "alpha": 1.5, "eps": 0.25}
    properties.assert_equal_bits(*(fast_backend(FORGET, RETAIN, x, **options)[0] for x in (rule, by_torch)))


@pytest.mark.parametrize("function", [a_gem, with_where, with_plain_helpers])
@pytest.mark.parametrize(
    "f", [[1e20, 1e20, 1.0], [1e20, 1.0, 1.0], [1e-30, 1.0, -2.0], [torch.nan, 1.0, 1.0]]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_formula_and_torch_agree_on_what_is_not_finite(fast_backend, function, f, as_tensor):
    f, r = [torch.tensor(f)], [torch.tensor([1e20, -1e20, 1.0])]
    gamma, alpha = 0.0, 1.5
    if as_tensor:
        gamma, alpha = (
            torch.tensor(x, dtype=torch.float64, device=fast_backend.device) for x in (gamma, alpha)
        )
    for g in (gamma, 0.5 + gamma):
        found, expected = (
            fast_backend(f, r, Rule("mine", x, "tensor"), gamma=g, alpha=alpha)[0]
            for x in (function, lambda *numbers: function(*numbers))
        )
        properties.assert_equal_bits(found, expected)


def test_a_global_number_is_read_at_every_call(fast_backend, monkeypatch):
    for value in (0.5, 4.0):
        monkeypatch.setitem(globals(), "RHO", value)
        (update, _), _ = fast_backend(FORGET, RETAIN, Rule("mine", global_number, "tensor"), alpha=0.0)
        properties.assert_equal_bits([update], [value * FORGET[0]])


def test_every_function_here_is_what_it_says():
    assert inspect.getsource(made(1)).startswith("def made")
    assert closure().__closure__
    assert not nested().__closure__


def first(ff, fr, rr, gamma, alpha):
    return gamma, alpha


def second(ff, fr, rr, gamma, alpha):
    return alpha, gamma


def test_functions_that_were_compiled_are_given_back():
    alive = weakref.ref(formula.on_device(first).fn)
    assert alive() is not None
    formula._compiled.cache_clear()
    gc.collect()
    assert alive() is None


def test_rules_of_one_name_are_told_apart():
    """Triton before 3.9 tells functions in constexpr arguments apart by the names that they print."""
    first.__qualname__ = second.__qualname__ = "rule"
    found = [formula.on_device(f).fn.__qualname__ for f in (first, second)]
    assert found[0] != found[1]
    assert all(name.startswith("rule_") for name in found)
