"""`and_mask`: the sum, and 0 where the signs are opposite.

    u_i = 0                       where f_i and r_i have strictly opposite signs
          gamma*f_i + alpha*r_i   elsewhere

`gamma` and `alpha` weigh the gradients. Promise: `u_i * r_i >= 0` and `u_i * f_i >= 0` at every element.

The paper keeps an element if the mean of the signs is at least a threshold `t` in magnitude. For two
gradients and `0 < t <= 1/2` that is this rule. For `t > 1/2`, such as 1, the paper's mask also drops the
elements where one gradient is exactly 0. Such an element is not in conflict here and takes the other
gradient.

The update is the sum for parallel and equal gradients, 0 for antiparallel ones, and the weighted other
gradient if one of them is 0.

Source: the AND-mask of Parascandolo et al. 2020, arXiv 2009.00329.
"""

from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return 0.0, 0.0, gamma, alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`where(conflict, 0, gamma*f + alpha*r)`"""
    return 0.0, 0.0, gamma, alpha


RULE = Rule(
    "and_mask",
    coefficients,
    "element",
    gated=True,
    formula="0 in conflict, else gamma*f + alpha*r",
    guarantees=Guarantees(
        non_negative_with_retain=True, non_negative_with_forget=True, agrees_with_retain=True
    ),
    source="arXiv 2009.00329",
)
