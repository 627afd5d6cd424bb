"""`ngdiff`: the sum of the two gradients, each divided by its norm.

    u = gamma*f/|f| + alpha*r/|r|, over all tensors

`gamma` and `alpha` are the lengths of the two terms. The update has degree 0: it does not change if a loss is
scaled. It promises nothing: `<u,r> = |r|*(alpha + gamma*cos(f,r))` is negative for `gamma > alpha` and nearly
antiparallel gradients.

The update is `(gamma + alpha)*r/|r|` for parallel and equal gradients, `(alpha - gamma)*r/|r|` for
antiparallel ones, and the term of the other gradient if one of them is 0.

Source: NGDiff, arXiv 2410.22086.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled, sqrt
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return scaled(gamma, ratio(1.0, sqrt(ff))), scaled(alpha, ratio(1.0, sqrt(rr)))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*f/|f| + alpha*r/|r|`"""
    lengths = []
    for weight, square in ((gamma, ff), (alpha, rr)):
        if weight == 0:
            lengths.append(0.0)
        elif not isfinite(square):
            lengths.append(nan)
        else:
            lengths.append(weight * square**-0.5 if square > 0 else 0.0)
    return (*lengths, *lengths)


RULE = Rule(
    "ngdiff",
    coefficients,
    "global",
    formula="gamma*f/|f| + alpha*r/|r|",
    guarantees=Guarantees(degree=0),
    source="arXiv 2410.22086",
)
