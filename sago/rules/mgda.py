"""`mgda`: the shortest convex combination of the two gradients.

    u = x*f' + y*r',   x = (<r',r'> - <f',r'>) / |f' - r'|^2, at least 0 and at most 1,   y = 1 - x
    f' = gamma*f,  r' = alpha*r, over all tensors

The gradients are first multiplied by `gamma` and `alpha`. A weight of 0 makes the update 0, because 0 is
then one of the combinations. Promise: `<u,f> >= 0` and `<u,r> >= 0`. The shortest vector of a convex set has
`<u,v> >= <u,u>` for each `v` in the set.

The update is the shorter gradient for parallel ones, `r'` for equal ones, and 0 for antiparallel gradients
and if one of them is 0.

Source: Desideri 2012; for two gradients Algorithm 1 of Sener and Koltun 2018, arXiv 1810.04650.
"""

from math import isfinite, nan

from sago.rules.language import maximum, ratio, scaled, where
from sago.rules.rule import Guarantees, Rule
from sago.rules.shared import weighted


def coefficients(ff, fr, rr, gamma, alpha):
    ff, fr, rr = weighted(ff, fr, rr, gamma, alpha)
    # Both shares are quotients, because 1 - x cancels if r' is much longer than f'.
    to_forget, to_retain = maximum(0.0, rr - fr), maximum(0.0, ff - fr)
    square = to_forget + to_retain + 0.0 * fr  # NaN if the inner product overflowed
    x, y = ratio(to_forget, square), where(square == 0.0, 1.0, ratio(to_retain, square))
    return scaled(gamma, x), scaled(alpha, y)


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """By the position of the vertex of the parabola `|x*f' + (1-x)*r'|^2`"""
    ff = gamma * gamma * ff if gamma else 0.0
    fr = gamma * alpha * fr if gamma and alpha else 0.0
    rr = alpha * alpha * rr if alpha else 0.0
    if not (isfinite(ff) and isfinite(fr) and isfinite(rr)):
        return (nan,) * 4
    if fr >= rr:  # the angle at the end of r' is obtuse
        x, y = 0.0, 1.0
    elif fr >= ff:
        x, y = 1.0, 0.0
    else:
        square = (ff - fr) + (rr - fr)
        x, y = (rr - fr) / square, (ff - fr) / square
    return gamma * x, alpha * y, gamma * x, alpha * y


RULE = Rule(
    "mgda",
    coefficients,
    "global",
    formula="the shortest x*gamma*f + (1-x)*alpha*r with 0 <= x <= 1",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 1810.04650, algorithm 1",
)
