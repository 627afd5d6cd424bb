"""`pcgrad` and `pcgrad_global`: the forget gradient loses the part that opposes retain.

    u = gamma*(f - k*r) + alpha*r,   k = <f,r> / <r,r> if <f,r> < 0, else 0

`pcgrad` takes the inner products over each tensor ("module-wise"), `pcgrad_global` over all tensors. Neither
has a gate. Promise: `<u, r> >= 0` over the same elements.

Source: Algorithm 1 of arXiv 2001.06782, in the form of arXiv 2604.14808, which never projects retain.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled, where
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    k = ratio(fr, rr)
    k = where(k > 0.0, 0.0, k)
    return gamma, alpha - scaled(gamma, k)


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*(f - k*r) + alpha*r`, `k = fr/rr` if `fr < 0` else 0"""
    if gamma == 0:
        k = 0.0
    elif not (isfinite(fr) and isfinite(rr)):
        k = nan
    elif fr < 0 < rr:
        k = fr / rr
    else:
        k = 0.0
    return gamma, alpha - gamma * k, gamma, alpha - gamma * k


RULE = Rule(
    "pcgrad",
    coefficients,
    "tensor",
    formula="gamma*(f - min(0, <f,r>/<r,r>)*r) + alpha*r",
    guarantees=Guarantees(non_negative_with_retain=True),
    source="arXiv 2001.06782 and 2604.14808",
)
GLOBAL = Rule(
    "pcgrad_global",
    coefficients,
    "global",
    formula="pcgrad, with <f,r> and <r,r> over all tensors",
    guarantees=Guarantees(non_negative_with_retain=True),
    source="arXiv 2001.06782 and 2604.14808",
)
