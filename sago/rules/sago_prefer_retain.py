"""`sago_prefer_retain`: the sum, without the forget gradient where the signs are opposite.

    u_i = alpha*r_i               where f_i and r_i have strictly opposite signs
          gamma*f_i + alpha*r_i   elsewhere

The gate is the sign conflict. Promise: `u_i * r_i >= 0` at every element, so that `<u, r> >= 0`.

Source: the released code of SAGO, arXiv 2604.14808.
"""

from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return 0.0, alpha, gamma, alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`where(conflict, alpha*r, gamma*f + alpha*r)`"""
    return 0.0, alpha, gamma, alpha


RULE = Rule(
    "sago_prefer_retain",
    coefficients,
    "element",
    gated=True,
    formula="alpha*r in conflict, else gamma*f + alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True, agrees_with_retain=True),
    source="the released code of arXiv 2604.14808",
)
