"""`dualproj`: the vector nearest to the sum that opposes neither gradient.

    u = argmin |u - (gamma*f + alpha*r)|   such that <u,f> >= 0 and <u,r> >= 0, over all tensors

The solution is `max(gamma, -alpha*<f,r>/<f,f>)*f + max(alpha, -gamma*<f,r>/<r,r>)*r` for `gamma, alpha >= 0`.
At most one of the bounds is active, unless the gradients are antiparallel. A negative weight in the second
term of `max` counts as 0.

The gradients are multiplied by `gamma` and `alpha` before the projection. Promise: both conditions hold.

The update is the sum for parallel and equal gradients, 0 for antiparallel ones, and the weighted other
gradient if one of them is 0. With `gamma = 0`, `alpha*r` is still projected.

Source: GEM, Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 11. TorchJD's `DualProj` projects the
mean.
"""

from math import isfinite, nan

from sago.rules.language import maximum, ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return (
        maximum(gamma, -scaled(maximum(alpha, 0.0), ratio(fr, ff))),
        maximum(alpha, -scaled(maximum(gamma, 0.0), ratio(fr, rr))),
    )


def projected(x: float, y: float, ff: float, fr: float, rr: float) -> tuple[float, float]:
    """The coefficients of the vector nearest to `x*f + y*r` that opposes neither gradient.

    It is `a*f + b*r` with `a >= x` and `b >= y`, and it is orthogonal to the gradient whose coefficient is
    above its bound (the conditions of Karush, Kuhn and Tucker). If no such vector opposes neither gradient,
    both coefficients are above their bounds, and the vector is 0.
    """
    candidates = [(x, y)]
    if ff > 0:
        candidates.append((-y * fr / ff, y))
    if rr > 0:
        candidates.append((x, -x * fr / rr))
    for a, b in candidates:
        with_forget = 0.0 if a > x else a * ff + b * fr
        with_retain = 0.0 if b > y else a * fr + b * rr
        if a >= x and b >= y and with_forget >= 0 and with_retain >= 0:
            return a, b
    return 0.0, 0.0


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """The quadratic program, solved by its active sets."""
    read = [fr, *([rr] if gamma > 0 else []), *([ff] if alpha > 0 else [])] if max(gamma, alpha) > 0 else []
    if not all(map(isfinite, read)):
        return (nan,) * 4
    if max(gamma, alpha) <= 0:
        return (0.0,) * 4
    a, b = projected(gamma, alpha, ff, fr, rr)
    return a, b, a, b


RULE = Rule(
    "dualproj",
    coefficients,
    "global",
    formula="the vector nearest to gamma*f + alpha*r with <u,f> >= 0 and <u,r> >= 0",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 1706.08840, equation 11",
)
