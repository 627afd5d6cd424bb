"""`imtl_g`: the affine combination of the two gradients that goes equally far along both.

    u = (|r'|*f' + |f'|*r') / (|f'| + |r'|),   f' = gamma*f,  r' = alpha*r, over all tensors

Its projections on `f'/|f'|` and `r'/|r'|` are equal. The gradients are first multiplied by `gamma` and
`alpha`, and a weight of 0 makes the update 0. Promise: `<u,r> >= 0` and `<u,f> >= 0`. With `s = |f'|*|r'| /
(|f'| + |r'|)`, the update is `s*(f/|f| + r/|r|)` for positive weights, so that `<u,r> = s*|r|*(1 +
cos(f,r))`.

The update is `2*s*r/|r|` for parallel and equal gradients, and 0 for antiparallel ones and if one of them is
0.

Source: IMTL-G, Liu et al. 2021, Towards Impartial Multi-task Learning (ICLR).
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled, sqrt
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    f, r = scaled(gamma, sqrt(ff)), scaled(alpha, sqrt(rr))
    return scaled(gamma, ratio(r, f + r)), scaled(alpha, ratio(f, f + r))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`s*(f/|f| + r/|r|)` with `s` such that the coefficients of `f'` and `r'` add to 1"""
    f = gamma * ff**0.5 if gamma else 0.0
    r = alpha * rr**0.5 if alpha else 0.0
    if not (isfinite(f) and isfinite(r)):
        return (nan,) * 4
    if f == 0 or r == 0 or f == -r:
        return (0.0,) * 4
    s = 1 / (1 / f + 1 / r)
    a, b = gamma * s / f, alpha * s / r
    return a, b, a, b


RULE = Rule(
    "imtl_g",
    coefficients,
    "global",
    formula="(|r'|*f' + |f'|*r') / (|f'| + |r'|), f' = gamma*f, r' = alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="Liu et al., ICLR 2021",
)
