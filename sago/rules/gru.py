"""`gru`: the forget gradient alone, without the part that opposes a running mean of the retain gradient.

    u = gamma*(f - k*r),   k = max(<f,r>, c*|f|*|r|) / <r,r> if <f,r> < 0, else 0, over all tensors

`c` is the lowest cosine that is projected in full: with `c = -1` the whole opposing part is removed, and the
rule has the coefficients of `a_gem`. In the paper, `r` is a running mean of retain gradients. Use
`sago.GradientBuckets(..., retain_decay=0.99)`, or pass the mean as retain. `gamma` weighs the update, and
`alpha` is not used.

Promise: `<u,f> >= 0`, because `k*<f,r> <= <f,r>^2 / <r,r> <= <f,f>`. With `c = -1`, also `<u,r> >= 0`.

The update is `gamma*f` for parallel and equal gradients and if retain is 0, and `gamma*(1 + c)*f` for
antiparallel gradients.

Source: GRU, Wang et al. 2025, arXiv 2503.09117. Its released code has `c = -0.5` as an option.
"""

import math
from numbers import Real

from sago.rules import a_gem
from sago.rules.language import maximum, minimum, ratio, scaled, sqrt
from sago.rules.rule import Guarantees, Rule


def gru(lowest_cosine: float = -1.0) -> Rule:
    """The rule for a lowest cosine between -1 and 0."""
    if not (isinstance(lowest_cosine, Real) and -1.0 <= lowest_cosine <= 0.0):
        raise ValueError(
            f"Parameter `lowest_cosine` should be a number between -1 and 0. Found {lowest_cosine!r}."
        )

    def clipped(ff, fr, rr, gamma, alpha):
        opposing = maximum(fr, lowest_cosine * sqrt(ff) * sqrt(rr))
        return gamma, -scaled(gamma, minimum(0.0, ratio(opposing, rr)))

    whole = lowest_cosine == -1.0
    return Rule(
        "gru",
        a_gem.coefficients if whole else clipped,
        "global",
        formula="gamma*(f - min(0, max(<f,r>, c*|f|*|r|)/<r,r>)*r), r a running mean",
        guarantees=Guarantees(non_negative_with_retain=whole, non_negative_with_forget=True),
        source="arXiv 2503.09117",
    )


def reference(
    ff: float, fr: float, rr: float, gamma: float, alpha: float, lowest_cosine: float = -1.0
) -> tuple[float, ...]:
    """By angles: the part of `f` along `r` has the length `|f| * cos`, with the cosine clipped"""
    if gamma == 0:
        return (0.0,) * 4
    if not (math.isfinite(fr) and math.isfinite(rr)):
        return math.nan, math.nan, math.nan, math.nan
    if fr >= 0 or rr == 0 or ff == 0:
        return gamma, 0.0, gamma, 0.0
    f, r = math.sqrt(ff), math.sqrt(rr)
    b = -gamma * f * max(lowest_cosine, fr / f / r) / r
    return gamma, b, gamma, b


RULE = gru()
