"""`a_gem`: the forget gradient alone, without the part that opposes retain.

    u = gamma*(f - k*r),   k = <f,r> / <r,r> if <f,r> < 0, else 0, over all tensors

`gamma` weighs the update, and `alpha` is not used. Promise: `<u,r> = gamma*max(0, <f,r>) >= 0` and `<u,f> >=
0`, because `<f,r>^2 <= <f,f>*<r,r>`.

The update is `gamma*f` for parallel and equal gradients and if retain is 0, and 0 for antiparallel gradients.

Source: A-GEM, Chaudhry et al. 2019, arXiv 1812.00420, with forget as the new task and retain as the memory.
"""

from math import isfinite, nan

from sago.rules.language import minimum, ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, -scaled(gamma, minimum(0.0, ratio(fr, rr)))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*(f + t*r)`, `t` the smallest number >= 0 such that `<f + t*r, r> = fr + t*rr >= 0`"""
    if gamma == 0:
        t = 0.0
    elif not (isfinite(fr) and isfinite(rr)):
        t = nan
    else:
        t = 0.0 if fr >= 0 or rr == 0 else -fr / rr
    return gamma, gamma * t, gamma, gamma * t


RULE = Rule(
    "a_gem",
    coefficients,
    "global",
    formula="gamma*(f - min(0, <f,r>/<r,r>)*r)",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 1812.00420",
)
