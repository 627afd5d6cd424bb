"""`sago`: the forget gradient, replaced by the retain gradient where their signs are opposite.

    u_i = alpha*r_i   where f_i and r_i have strictly opposite signs
          gamma*f_i   elsewhere

The gate is the sign conflict. Promise: `u_i * r_i >= 0` at every element, so that `<u, r> >= 0`.

Source: SAGO, arXiv 2604.14808.
"""

from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return 0.0, alpha, gamma, 0.0


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`where(conflict, alpha*r, gamma*f)`"""
    return 0.0, alpha, gamma, 0.0


RULE = Rule(
    "sago",
    coefficients,
    "element",
    gated=True,
    formula="alpha*r in conflict, else gamma*f",
    guarantees=Guarantees(non_negative_with_retain=True, agrees_with_retain=True),
    source="arXiv 2604.14808",
)
