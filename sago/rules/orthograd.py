"""`orthograd`: the forget gradient alone, always made orthogonal to retain.

    u = gamma*(f - k*r),   k = <f,r> / <r,r>, over all tensors

`gamma` weighs the update, and `alpha` is not used: `blur_forget_upper` adds `alpha*r`. Promise: `<u,r> = 0`,
and `<u,f> = gamma*(<f,f> - <f,r>^2/<r,r>) >= 0`.

The update is 0 for parallel, antiparallel and equal gradients, and `gamma*f` if retain is 0.

Source: OrthoGrad, arXiv 2503.02312, which makes forget orthogonal to the gradient of each retain sample. This
is its case of one retain gradient.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, -scaled(gamma, ratio(fr, rr))


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*f + b*r` with `<gamma*f + b*r, r> = gamma*fr + b*rr = 0`"""
    if gamma == 0:
        b = 0.0
    elif not (isfinite(fr) and isfinite(rr)):
        b = nan
    else:
        b = -(gamma * fr) / rr if rr > 0 else 0.0
    return gamma, b, gamma, b


RULE = Rule(
    "orthograd",
    coefficients,
    "global",
    formula="gamma*(f - <f,r>/<r,r>*r)",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 2503.02312, for one retain gradient",
)
