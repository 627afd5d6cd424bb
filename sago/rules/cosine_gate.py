"""`cosine_gate`: the retain gradient, plus the forget gradient as far as the two agree.

    u = alpha*r + gamma*max(0, c)*f,   c = <f,r> / (|f|*|r|), over all tensors

`gamma` and `alpha` weigh the gradients. Promise: `<u,r> = alpha*<r,r> + gamma*max(0, c)*<f,r> >= 0`, because
`c` has the sign of `<f,r>`.

The update is the sum for parallel and equal gradients, `alpha*r` for antiparallel ones and if forget is 0,
and 0 if retain is 0.

Source: Du et al. 2018, arXiv 1812.02224, the weighted version, with forget as the auxiliary task.
"""

from math import isfinite, nan, sqrt

from sago.rules.language import maximum, scaled
from sago.rules.rule import Guarantees, Rule
from sago.rules.shared import cosine


def coefficients(ff, fr, rr, gamma, alpha):
    return scaled(gamma, maximum(0.0, cosine(ff, fr, rr))), alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`alpha*r + gamma*c*f` if `c > 0`, else `alpha*r`"""
    if gamma == 0:
        a = 0.0
    elif not (isfinite(ff) and isfinite(fr) and isfinite(rr)):
        a = nan
    elif fr > 0 and ff > 0 and rr > 0:
        a = gamma * min(fr / sqrt(ff) / sqrt(rr), 1.0)
    else:
        a = 0.0
    return a, alpha, a, alpha


RULE = Rule(
    "cosine_gate",
    coefficients,
    "global",
    formula="gamma*max(0, cos(f,r))*f + alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True),
    source="arXiv 1812.02224",
)
