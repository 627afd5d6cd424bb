"""`nash_mtl`: the Nash bargaining solution of the two tasks.

    u = (gamma*f/|f| + alpha*r/|r|) / sqrt(1 + c),   c = <f,r> / (|f|*|r|), over all tensors

With `gamma = alpha = 1` the coefficients `w` solve `G @ w = 1/w`, where `G` is the Gram matrix. The weights
multiply the solution. The update has degree 0: it does not change if a loss is scaled. With equal weights its
length is `gamma*sqrt(2)`. It promises nothing: for unequal weights, `<u,r>` can be negative, as in `ngdiff`.

The update is `(gamma + alpha)/sqrt(2) * r/|r|` for parallel and equal gradients. For antiparallel gradients
the equation has no solution, and the update is 0. If one gradient is 0, the update is the unit vector of the
other, weighted. Close to antiparallel the coefficients grow, up to 500 times those of `ngdiff`. A cosine
below -1 + 4e-6 counts as -1, because the inner products have an error of 1e-6.

Source: Nash-MTL, Navon et al. 2022, arXiv 2202.01017, in closed form.
"""

import math

from sago.rules.language import ratio, scaled, sqrt, where
from sago.rules.rule import Guarantees, Rule
from sago.rules.shared import cosine


def coefficients(ff, fr, rr, gamma, alpha):
    opening = 1.0 + cosine(ff, fr, rr)
    scale = sqrt(where(opening <= 4e-6, 0.0, opening))
    return scaled(gamma, ratio(1.0, sqrt(ff) * scale)), scaled(alpha, ratio(1.0, sqrt(rr) * scale))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*p*f/|f| + alpha*q*r/|r|` with `p*(p + c*q) = 1` and `q*(c*p + q) = 1`, by bisection"""
    if gamma == 0 and alpha == 0:
        return (0.0,) * 4
    if not (math.isfinite(ff) and math.isfinite(fr) and math.isfinite(rr)):
        return (math.nan,) * 4
    f, r = math.sqrt(ff), math.sqrt(rr)
    c = fr / f / r if ff > 0 and rr > 0 else 0.0
    if 1 + c <= 4e-6:
        return (0.0,) * 4
    # For each p the second equation has one solution q > 0. The sign of the rest of the first is monotone.
    low, high = 0.0, 2.0**30
    for _ in range(120):
        p = (low + high) / 2
        q = (math.hypot(c * p, 2.0) - c * p) / 2
        low, high = (low, p) if p * (p + c * q) > 1 else (p, high)
    a, b = gamma * p / f if f else 0.0, alpha * q / r if r else 0.0
    return a, b, a, b


RULE = Rule(
    "nash_mtl",
    coefficients,
    "global",
    formula="(gamma*f/|f| + alpha*r/|r|) / sqrt(1 + cos(f,r))",
    guarantees=Guarantees(degree=0),
    source="arXiv 2202.01017",
)
