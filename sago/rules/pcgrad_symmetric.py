"""`pcgrad_symmetric`: each gradient loses the part that opposes the other.

    u = gamma*(f - min(0, <f,r>/<r,r>)*r) + alpha*(r - min(0, <f,r>/<f,f>)*f), over all tensors

`gamma` and `alpha` weigh the projected gradients. `pcgrad` never projects retain. Promise: `<u,r> >= 0` and
`<u,f> >= 0`. In conflict, `<u,r> = alpha*(<r,r> - <f,r>^2/<f,f>)`, and otherwise all terms are non-negative.

The update is the sum for parallel and equal gradients, 0 for antiparallel ones, and the weighted other
gradient if one of them is 0. The gradients are projected before they are weighed: with `gamma = 0`, retain is
still projected.

Source: Algorithm 1 of Yu et al. 2020, arXiv 2001.06782.
"""

from math import isfinite, nan

from sago.rules.language import minimum, ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return (
        gamma - scaled(alpha, minimum(0.0, ratio(fr, ff))),
        alpha - scaled(gamma, minimum(0.0, ratio(fr, rr))),
    )


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """Algorithm 1: each gradient in turn, projected against the other one as it was."""
    a, b = gamma, alpha
    if gamma != 0 and not (isfinite(fr) and isfinite(rr)):
        b = nan
    elif gamma != 0 and fr < 0 < rr:
        b -= gamma * fr / rr
    if alpha != 0 and not (isfinite(fr) and isfinite(ff)):
        a = nan
    elif alpha != 0 and fr < 0 < ff:
        a -= alpha * fr / ff
    return a, b, a, b


RULE = Rule(
    "pcgrad_symmetric",
    coefficients,
    "global",
    formula="gamma*(f - min(0, <f,r>/<r,r>)*r) + alpha*(r - min(0, <f,r>/<f,f>)*f)",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 2001.06782, algorithm 1",
)
