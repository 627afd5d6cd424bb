"""`blur_forget_upper`: the forget gradient, made orthogonal to retain, plus the retain gradient.

    u = gamma*(f - k*r) + alpha*r,   k = <f,r> / <r,r>, over all tensors

It is `blur` with the two gradients exchanged, so that retain has priority. `gamma` weighs the forget gradient
after the projection, and `alpha` weighs retain. Promise: `<u,r> = alpha*<r,r> >= 0`, so that forget neither
slows retain down nor speeds it up.

The update is `alpha*r` for parallel, antiparallel and equal gradients and if forget is 0, and `gamma*f` if
retain is 0.

Source: the bi-level update of BLUR, arXiv 2506.08164, with forget as the upper task.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, alpha - scaled(gamma, ratio(fr, rr))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*f + b*r` with `<gamma*f + b*r, r> = gamma*fr + b*rr = alpha*rr`"""
    if gamma == 0 or rr == 0:
        b = alpha if gamma == 0 or isfinite(fr) else nan
    elif not (isfinite(fr) and isfinite(rr)):
        b = nan
    else:
        b = (alpha * rr - gamma * fr) / rr
    return gamma, b, gamma, b


RULE = Rule(
    "blur_forget_upper",
    coefficients,
    "global",
    formula="gamma*(f - <f,r>/<r,r>*r) + alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True),
    source="arXiv 2506.08164",
)
