"""Random rules: expressions that are evaluated as a `sago.Rule`, and in plain Python as its definition."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

import sago
from sago.rules import REFERENCES, RULES
from tests.support.backends import RULES as OF_THE_PAPER
from tests.support.oracle import Definition, in_conflict

NUMBERS = "ff, fr, rr, gamma, alpha"
# Rules that are not in the table of the oracle. Their definitions say nothing about negative weights.
OTHERS = tuple(name for name in RULES if name not in OF_THE_PAPER)


class Made(NamedTuple):
    """A random rule.

    Attributes:
        scope: As in `sago.Rule`.
        gate: An expression of `f` and `r`, "conflict" for `gated=True`, or None.
        coefficients: For each class the expressions of `a` and `b`.
    """

    scope: str
    gate: str | None
    coefficients: tuple[str, ...]

    @property
    def by_class(self) -> bool:
        return any("classes" in text for text in self.coefficients)


Name = str | Made


def _ratio(x: float, y: float) -> float:
    return x / y if y else 0.0


# The functions of `sago.rules.language` on floats, and on arrays.
ON_FLOATS = {
    "where": lambda condition, x, y: x if condition else y,
    "minimum": min,
    "maximum": max,
    "abs": abs,
    "sqrt": math.sqrt,
    "ratio": _ratio,
    "scaled": lambda weight, x: weight * x if weight else 0.0,
}
ON_ARRAYS = {
    "where": np.where,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "abs": np.abs,
    "opposed": in_conflict,
    "agreed": lambda f, r: in_conflict(f, -r),
}
FOLDER = tempfile.TemporaryDirectory(prefix="fuzzed_rules_")


@lru_cache(maxsize=1024)
def rule_of(name: Name) -> sago.Rule:
    if isinstance(name, str):
        return RULES[name]
    gated = name.gate == "conflict"
    gate = None if gated or name.gate is None else _function("gate", "f, r", name.gate)
    arguments = NUMBERS + (", classes" if name.by_class else "")
    coefficients = _function("coefficients", arguments, ", ".join(name.coefficients))
    return sago.Rule("made", coefficients, name.scope, gated=gated, gate=gate, by_class=name.by_class)


def _function(name: str, arguments: str, returned: str) -> Callable[..., Any]:
    """A function with a source file of its own, which a rule needs to be compiled into a kernel."""
    path = Path(FOLDER.name, f"{abs(hash((arguments, returned))):x}.py")
    source = f"from sago.rules import *\n\n\ndef {name}({arguments}):\n    return {returned}\n"
    path.write_text(source)
    found: dict[str, Any] = {"__name__": path.stem}
    exec(compile(source, str(path), "exec"), found)
    return found[name]


@lru_cache(maxsize=1024)
def definition_of(name: Name) -> str | Definition | None:
    """The argument `rule` of the oracle. None for a random gate, where only bits are compared."""
    if name in OF_THE_PAPER:
        return name
    rule = rule_of(name)
    if rule.seed is not None:
        return None
    if isinstance(name, str):
        gate = None if rule.gate is None else lambda f, r: rule.gate(torch.tensor(f), torch.tensor(r)).numpy()
        return Definition(rule.scope, REFERENCES[name], gate, rule.by_class)
    ungated = name.coefficients if name.gate else 2 * name.coefficients
    code = compile(", ".join(ungated), "coefficients", "eval")
    gate = None if name.gate in (None, "conflict") else compile(name.gate, "gate", "eval")
    return Definition(rule.scope, _on_floats(code), gate and _on_arrays(gate), rule.by_class)


def _on_floats(code: CodeType) -> Callable[..., Any]:
    def coefficients(ff, fr, rr, gamma, alpha, classes=()):
        numbers = {"ff": ff, "fr": fr, "rr": rr, "gamma": gamma, "alpha": alpha, "classes": classes}
        return eval(code, ON_FLOATS, numbers)

    return coefficients


def _on_arrays(code: CodeType) -> Callable[..., Any]:
    return lambda f, r: eval(code, ON_ARRAYS, {"f": f, "r": r})


CONSTANTS = ("0.0", "0.5", "1.0", "-2.0")
# In a form, X stands for an expression with a variable, Y for any expression, and C for a comparison. The
# functions of `sago.rules` do not take numbers alone.
FORMS = ("(X + Y)", "(X - Y)", "minimum(X, Y)", "maximum(X, Y)", "abs(X)", "where(C, X, Y)", "0.5 * X")
WEIGHTS = ("gamma", "alpha")
PRODUCTS = (
    *("ratio(fr, rr)", "ratio(fr, ff)", "ratio(sqrt(ff), sqrt(rr))", "ratio(fr, sqrt(ff) * sqrt(rr))"),
    *("ratio(rr, ff + rr)", "where(fr < 0.0, ratio(fr, rr), 0.0)", "where(ff < rr, gamma, alpha)"),
)
OF_PRODUCTS = ("scaled(gamma, X)", "scaled(alpha, X)", "gamma * X")
OF_CLASSES = ("ratio(classes[0][0], classes[0][0] + classes[1][0])", "ratio(classes[1][2], ff)")
OF_PAIRS = ("(X + Y)", "(X - Y)", "maximum(X, Y)", "0.5 * X", "abs(X)")


def _expression(draw: Any, atoms: Sequence[str], forms: Sequence[str], depth: int, constant: bool) -> str:
    kind = draw(st.integers(0, 3))
    if kind == 3 and depth:
        form = draw(st.sampled_from(forms))
        parts = {
            "X": lambda: _expression(draw, atoms, forms, depth - 1, False),
            "Y": lambda: _expression(draw, atoms, forms, depth - 1, True),
            "C": lambda: _comparison(draw, atoms, forms, depth - 1),
        }
        return "".join(parts[c]() if c in parts else c for c in form)
    return draw(st.sampled_from(CONSTANTS if kind == 2 and constant else atoms))


def _comparison(draw: Any, atoms: Sequence[str], forms: Sequence[str], depth: int) -> str:
    compared = [_expression(draw, atoms, forms, depth, constant) for constant in (False, True)]
    return f" {draw(st.sampled_from(['<', '<=', '>', '==']))} ".join(compared)


def _condition(draw: Any) -> str:
    known = draw(st.sampled_from(["opposed(f, r)", "agreed(f, r)", None, None]))
    return known or _comparison(draw, ("f", "r", "abs(f)", "abs(r)", "-r"), OF_PAIRS, 1)


@st.composite
def made(draw: Any) -> Made:
    """Rules of all scopes, with one to three classes."""
    scope = draw(st.sampled_from(["element", "tensor", "global"]))
    gate = draw(st.sampled_from([None, "conflict", "two", "three"]))
    classes = {None: 1, "conflict": 2, "two": 2, "three": 3}[gate]
    if gate not in (None, "conflict"):
        numbers = draw(st.permutations([f"{k}.0" for k in range(classes)]))
        gate = numbers[-1]
        for number in numbers[:-1]:
            gate = f"where({_condition(draw)}, {number}, {gate})"
        assume(_occurring(gate) == classes)
    atoms, forms = WEIGHTS, FORMS
    if scope != "element":
        atoms, forms = (*WEIGHTS, *PRODUCTS), FORMS + OF_PRODUCTS
        if gate not in (None, "conflict") and draw(st.booleans()):
            atoms += OF_CLASSES
    coefficients = [_expression(draw, atoms, forms, 2, True) for _ in range(2 * classes)]
    return Made(scope, gate, tuple(coefficients))


def _occurring(gate: str) -> int:
    """The number of classes that occur for some of the numbers that `sago.Rule` tries."""
    sizes = np.array([0.0, 2.0**-40, 1.0, 2.0, 2.0**40], dtype=np.float32)
    numbers = np.concatenate([sizes, -sizes])
    classes = _on_arrays(compile(gate, "gate", "eval"))(*np.meshgrid(numbers, numbers))
    return len(np.unique(classes))
