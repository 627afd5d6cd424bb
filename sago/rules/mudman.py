"""`mudman`: the forget gradient, and 0 where it does not have the sign of the retain gradient.

    u_i = gamma*f_i   where f_i and r_i have strictly the same sign
          0           elsewhere

The gate has these two classes. `alpha` is not used: the paper trains retain in steps of their own, and takes
the signs from a running mean of retain gradients. Pass that mean as retain. An element where one gradient is
0 is dropped. Promise: `u_i * r_i >= 0` and `u_i * f_i >= 0` at every element.

The update is `gamma*f` for equal and parallel gradients, and 0 for opposite ones and if one gradient is 0.

Source: the mask of MUDMAN, arXiv 2506.12484.
"""

from sago.rules.language import agreed, where
from sago.rules.rule import Guarantees, Rule


def gate(f, r):
    return where(agreed(f, r), 0.0, 1.0)


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, 0.0, 0.0, 0.0


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`where(sign(f) == sign(r), gamma*f, 0)`"""
    return gamma, 0.0, 0.0, 0.0


RULE = Rule(
    "mudman",
    coefficients,
    "element",
    gate=gate,
    formula="gamma*f where the signs are equal, else 0",
    guarantees=Guarantees(
        non_negative_with_retain=True, non_negative_with_forget=True, agrees_with_retain=True
    ),
    source="arXiv 2506.12484",
)
