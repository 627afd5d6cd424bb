"""Rules: functions from the inner products of two gradients to the coefficients of their update.

A rule is a file of this package that defines a `Rule` and, beside it, `reference`: an independent definition
of its coefficients on floats. The file is all that registers it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from sago.rules.cagrad import cagrad  # these functions make rules, and take the place of their files here
from sago.rules.graddrop import graddrop
from sago.rules.gradvac import gradvac
from sago.rules.gru import gru
from sago.rules.language import abs, agreed, maximum, minimum, opposed, ratio, scaled, sqrt, where
from sago.rules.rule import Coefficients, Gate, Guarantees, Rule, Term, evaluate

__all__ = [
    "REFERENCES",
    "RULES",
    "Coefficients",
    "Gate",
    "Guarantees",
    "Rule",
    "Term",
    "abs",
    "agreed",
    "cagrad",
    "evaluate",
    "graddrop",
    "gradvac",
    "gru",
    "list_rules",
    "maximum",
    "minimum",
    "opposed",
    "ratio",
    "resolve",
    "scaled",
    "sqrt",
    "where",
]

_SHARED = {"draws", "form", "language", "reads", "rule", "shared"}
# The rules of the paper and of its released code come first.
_FIRST = ("sum", "sago", "sago_prefer_retain", "pcgrad", "pcgrad_global", "blur")


def _registered() -> list[tuple[Rule, Callable[..., tuple[float, ...]]]]:
    """The rules of all files of the package, each with its independent definition."""
    found = {}
    for file in iter_modules(__path__):
        if file.name in _SHARED:
            continue
        module = import_module(f"{__name__}.{file.name}")
        for rule in vars(module).values():
            if isinstance(rule, Rule):
                if rule.name in found:
                    raise RuntimeError(f"Two files of {__name__} define a rule named {rule.name!r}.")
                found[rule.name] = rule, module.reference
    names = [*_FIRST, *sorted(found.keys() - set(_FIRST))]
    return [found[name] for name in names]


_FOUND = _registered()
RULES = {rule.name: rule for rule, _ in _FOUND}
REFERENCES = {rule.name: reference for rule, reference in _FOUND}


def list_rules() -> list[str]:
    """The names that `rule=` accepts."""
    return list(RULES)


def resolve(rule: str | Rule) -> Rule:
    """The `Rule` of that name, or the rule itself."""
    if isinstance(rule, Rule):
        rule.check_helpers()
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"Parameter `rule` should be a name or a sago.Rule. Found {type(rule).__name__}.")
    if rule not in RULES:
        raise ValueError(
            f"Parameter `rule` should be one of {', '.join(RULES)}. Found {rule!r}. Pass a rule of your "
            "own as a sago.Rule."
        )
    return RULES[rule]
