"""`sum`: the gradient of the weighted sum of both losses, the baseline that every rule is compared with.

    u = gamma*f + alpha*r

It has no gate and promises nothing about retain.
"""

from sago.rules.rule import Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*f + alpha*r`"""
    return gamma, alpha, gamma, alpha


RULE = Rule(
    "sum",
    coefficients,
    "element",
    formula="gamma*f + alpha*r",
    source="the baseline of every comparison",
)
