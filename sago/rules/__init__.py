"""Rules: functions from the inner products of two gradients to the coefficients of their update.

One file holds one rule. A new rule is a new file, an entry in `_FILES` and its tests.
"""

from __future__ import annotations

from sago.rules import blur, pcgrad, sago, sago_prefer_retain, sum
from sago.rules.language import ratio, scaled, where
from sago.rules.rule import Coefficients, Rule, Term, evaluate

__all__ = [
    "REFERENCES",
    "RULES",
    "Coefficients",
    "Rule",
    "Term",
    "evaluate",
    "list_rules",
    "ratio",
    "resolve",
    "scaled",
    "where",
]

# Each rule, and an independent definition of its coefficients on floats.
_FILES = (
    (sum.RULE, sum.reference),
    (sago.RULE, sago.reference),
    (sago_prefer_retain.RULE, sago_prefer_retain.reference),
    (pcgrad.RULE, pcgrad.reference),
    (pcgrad.GLOBAL, pcgrad.reference),
    (blur.RULE, blur.reference),
)
RULES = {rule.name: rule for rule, _ in _FILES}
REFERENCES = {rule.name: reference for rule, reference in _FILES}


def list_rules() -> list[str]:
    """The names that `rule=` accepts."""
    return list(RULES)


def resolve(rule: str | Rule) -> Rule:
    """The `Rule` of that name, or the rule itself."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"Parameter `rule` should be a name or a sago.Rule. Found {type(rule).__name__}.")
    if rule not in RULES:
        raise ValueError(f"Parameter `rule` should be one of {', '.join(RULES)}. Found {rule!r}.")
    return RULES[rule]
