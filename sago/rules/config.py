"""`config`: equal cosines with both gradients, and the length of their projections.

    u = (|f'| + |r'|)/2 * (f/|f| + r/|r|),   f' = gamma*f,  r' = alpha*r, over all tensors

`gamma` and `alpha` only change the length of the update: its direction does not depend on the lengths of the
gradients, so that a weight of 0 does not switch a gradient off. Promise: `<u,r> >= 0` and `<u,f> >= 0`,
because `<u,r>` is `(|f'| + |r'|)/2 * |r| * (1 + cos(f,r))`.

The update is the sum for parallel and equal gradients, 0 for antiparallel ones, and the weighted other
gradient if one of them is 0, without the factor 1/2.

Source: ConFIG, Liu et al. 2024, arXiv 2408.11104, equation 2, which for two gradients is this.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled, sqrt, where
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    f, r = sqrt(ff), sqrt(rr)
    # A single gradient is its own direction.
    share = where(ff == 0.0, 1.0, where(rr == 0.0, 1.0, 0.5))
    length = share * (scaled(gamma, f) + scaled(alpha, r))
    return ratio(length, f), ratio(length, r)


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`<f' + r', d> * d`, where `d` is the unit vector along `f/|f| + r/|r|`"""
    if not (isfinite(ff) and isfinite(rr)):
        return (nan,) * 4
    p, q = (square**-0.5 if square > 0 else 0.0 for square in (ff, rr))
    square = p * p * ff + 2 * p * q * fr + q * q * rr
    if square <= 0:
        return (0.0,) * 4
    length = (gamma * (p * ff + q * fr) + alpha * (p * fr + q * rr)) / square
    return length * p, length * q, length * p, length * q


RULE = Rule(
    "config",
    coefficients,
    "global",
    formula="(|f'| + |r'|)/2 * (f/|f| + r/|r|), f' = gamma*f, r' = alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 2408.11104, equation 2",
)
