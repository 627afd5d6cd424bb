"""Compiles the coefficient function of a rule into the combine kernel."""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from sago import rules
from sago.rules.form import Helpers, current_helpers, fault
from sago.rules.reads import CASES, PRODUCTS

_numbers = count()


@triton.jit
def overflow(ff, fr, rr, gamma, alpha, READS: tl.constexpr):
    """0, or NaN if a sum that a coefficient reads is not finite.

    READS has a bit for each of `ff, fr, rr`, and three more for alpha = 0, for gamma = 0 and for both 0.
    """
    nonzero = tl.where(alpha == 0.0, _of_sums(ff, fr, rr, READS >> 3), _of_sums(ff, fr, rr, READS))
    zero = tl.where(alpha == 0.0, _of_sums(ff, fr, rr, READS >> 9), _of_sums(ff, fr, rr, READS >> 6))
    return tl.where(gamma == 0.0, zero, nonzero)


@triton.jit
def _of_sums(ff, fr, rr, READS: tl.constexpr):
    # x - x is 0 for a finite x and NaN for NaN and inf.
    found = tl.full((), 0.0, tl.float64)
    if READS & 1:
        found += ff - ff
    if READS & 2:
        found += fr - fr
    if READS & 4:
        found += rr - rr
    return found


def read_bits(rule: rules.Rule) -> int:
    """Encodes the sums that each coefficient reads in twelve bits, in the form that `overflow` takes."""
    bits = 0
    for k, case in enumerate(CASES):
        both = rule.reads[case] if rule.classes > 1 else 2 * rule.reads[case]
        for i, names in enumerate(both):
            bits |= sum(1 << 12 * i + 3 * k + PRODUCTS.index(name) for name in names)
    return bits


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


_IN_KERNELS = ((rules.where, _where), (rules.sqrt, _sqrt))


def on_device(coefficients: Any) -> Any:
    """The device function of `coefficients`, or None if it cannot be compiled into a kernel.

    A function can be compiled if it is a plain function from a source file, without defaults or annotations
    (Triton would evaluate them), and uses only arithmetic, comparisons, the functions of
    `sago.rules.language` and functions of the same kind. A function that reads a global number is not
    compiled, because the kernel would keep the number's first value.
    """
    for function, device in _IN_KERNELS:
        if coefficients is function:
            return device
    if not isinstance(coefficients, FunctionType):
        return None
    return _compiled(coefficients, current_helpers(coefficients))


def gate_on_device(gate: rules.Gate | None) -> Any:
    """The device function of a gate, whose form the rule has checked."""
    return None if gate is None else on_device(gate)


@lru_cache(maxsize=256)
def _compiled(function: FunctionType, used: Helpers) -> Any:
    if fault(function) is not None:
        return None
    names: dict[str, Any] = {"__name__": function.__module__, "tl": tl}
    for name in function.__code__.co_names:
        names[name] = on_device(function.__globals__.get(name))
    device = FunctionType(function.__code__, names, function.__name__)
    # Triton up to 3.8 distinguishes functions in constexpr arguments by name only.
    device.__qualname__ = f"{function.__qualname__}_{next(_numbers)}"
    return triton.jit(device)
