"""`cagrad`: near the mean of the gradients, the update that serves the worse served task best.

    u = m + k/|g|*g,   g = x*f' + (1-x)*r',   m = (f' + r')/2,   k = radius*|m|
    x from 0 to 1 minimises <g,m> + k*|g|,   f' = gamma*f,  r' = alpha*r, over all tensors

`u` maximises `min(<u,f'>, <u,r'>)` within the distance `radius*|m|` of the mean. The gradients are
multiplied by `gamma` and `alpha` first, and a weight of 0 leaves half of the other gradient. With radius 0
the update is the mean. The paper uses a radius below 1. The rule promises nothing: if forget is much longer
than retain and nearly antiparallel to it, `<u,r>` is negative.

The update is `(1 + radius)*m` for parallel and equal gradients, 0 for `f' = -r'`, and half of the weighted
other gradient if one of them is 0, because no step serves a task without a gradient. With a radius above 1,
the coefficients have a relative error of about `1e-16 * max(|f'|/|r'|, |r'|/|f'|)`, and a larger one for
nearly antiparallel gradients.

Source: Algorithm 1 of CAGrad, Liu et al. 2021, arXiv 2110.14048. For two gradients `x` has a closed form.
"""

import math
from numbers import Real

from sago.rules.language import maximum, minimum, ratio, scaled, sqrt, where
from sago.rules.rule import Rule
from sago.rules.shared import weighted


def cagrad(radius: float = 0.5) -> Rule:
    """The rule for a radius of at least 0, as a fraction of the norm of the mean."""
    if not (isinstance(radius, Real) and 0.0 <= radius < math.inf):
        raise ValueError(f"Parameter `radius` should be a finite number of at least 0. Found {radius!r}.")

    def coefficients(ff, fr, rr, gamma, alpha):
        ff, fr, rr = weighted(ff, fr, rr, gamma, alpha)
        # The coefficients depend on quotients only. The products of small or large squares would leave fp64.
        size = ff + rr
        ff, fr, rr = ratio(ff, size), ratio(fr, size), ratio(rr, size)
        # Rounding can make squares negative. The objective is stationary at x, or least at 0 or 1.
        spread, slope = maximum(0.0, ff + rr - 2.0 * fr), 0.5 * (ff - rr)
        k = 0.5 * radius * sqrt(maximum(0.0, ff + rr + 2.0 * fr))
        det = maximum(0.0, ff * rr - fr * fr)
        inside = k * k * spread - slope * slope
        x = ratio(rr - fr - slope * sqrt(ratio(det, maximum(0.0, inside))), spread)
        x = where(inside > 0.0, minimum(1.0, maximum(0.0, x)), where(slope > 0.0, 0.0, 1.0))
        square = x * x * ff + 2.0 * x * (1.0 - x) * fr + (1.0 - x) * (1.0 - x) * rr
        step = ratio(k, sqrt(maximum(0.0, square)))
        return scaled(gamma, 0.5 + step * x), scaled(alpha, 0.5 + step * (1.0 - x))

    return Rule(
        "cagrad",
        coefficients,
        "global",
        formula=f"the u with |u - m| <= {radius:g}*|m| that maximises min(<u,f'>, <u,r'>), m = (f' + r')/2",
        source="arXiv 2110.14048, algorithm 1",
    )


def reference(
    ff: float, fr: float, rr: float, gamma: float, alpha: float, radius: float = 0.5
) -> tuple[float, ...]:
    """The objective is convex. Its minimum is found by bisection on the sign of its derivative."""
    ff = gamma * gamma * ff if gamma else 0.0
    fr = gamma * alpha * fr if gamma and alpha else 0.0
    rr = alpha * alpha * rr if alpha else 0.0
    if not (math.isfinite(ff) and math.isfinite(fr) and math.isfinite(rr)):
        return (math.nan,) * 4
    k = radius * math.sqrt(max(0.0, ff + 2 * fr + rr)) / 2

    def length(x: float) -> float:
        return math.sqrt(max(0.0, x * x * ff + 2 * x * (1 - x) * fr + (1 - x) ** 2 * rr))

    low, high, span = 0.0, 1.0, math.sqrt(max(0.0, ff - 2 * fr + rr))
    for _ in range(100):
        x = (low + high) / 2
        derivative = (ff - rr) / 2  # of <g,m>; that of |g| is <g, f'-r'>/|g|, at most |f'-r'|
        if length(x) > 0:
            slope = (x * (ff - fr) + (1 - x) * (fr - rr)) / length(x)
            derivative += k * max(-span, min(span, slope))
        low, high = (low, x) if derivative > 0 else (x, high)
    x = low if low == 0 else high  # exactly 0 or 1 if the minimum is there
    step = k / length(x) if length(x) > 0 else 0.0
    a, b = gamma * (0.5 + step * x), alpha * (0.5 + step * (1 - x))
    return a, b, a, b


RULE = cagrad()
