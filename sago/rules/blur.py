"""`blur`: the retain gradient, made orthogonal to the forget gradient, plus the forget gradient.

    u = gamma*f + alpha*(r - k*f),   k = <f,r> / <f,f>, over all tensors

It has no gate. Promise: `<u, f> = gamma*<f,f>`, so that retain never slows forgetting down.

Source: arXiv 2506.08164.
"""

from math import isfinite, nan

from sago.rules.language import ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma - scaled(alpha, ratio(fr, ff)), alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """`gamma*f + alpha*(r - k*f)`, `k = fr/ff`"""
    if alpha == 0:
        k = 0.0
    elif not (isfinite(fr) and isfinite(ff)):
        k = nan
    else:
        k = fr / ff if ff > 0 else 0.0
    return gamma - alpha * k, alpha, gamma - alpha * k, alpha


RULE = Rule(
    "blur",
    coefficients,
    "global",
    formula="gamma*f + alpha*(r - <f,r>/<f,f>*f), over all tensors",
    guarantees=Guarantees(non_negative_with_forget=True),
    source="arXiv 2506.08164",
)
