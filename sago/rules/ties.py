"""`ties`: at each element the mean of both gradients, or the larger one where the signs are opposite.

    u_i = (gamma*f_i + alpha*r_i) / 2   where the signs are equal, and where |f_i| = |r_i|
          gamma*f_i                     elsewhere, where |f_i| > |r_i|
          alpha*r_i                     elsewhere, where |f_i| < |r_i|

The gate has these three classes. TIES elects the sign of `f_i + r_i`, which is that of the larger magnitude,
and takes the mean of the values that have it. The election does not depend on `gamma` and `alpha`, which
weigh the gradients. The rule promises nothing about retain, because a larger forget gradient wins.

The update is the mean for equal gradients and 0 for opposite ones, if the weights are equal. If one gradient
is 0, it is the other one, weighted.

Source: the sign election and the disjoint mean of TIES-Merging, Yadav et al. 2023, arXiv 2306.01708, without
its trimming.
"""

from sago.rules.language import abs, agreed, where
from sago.rules.rule import Rule


def gate(f, r):
    larger = where(abs(f) > abs(r), 1.0, where(abs(f) < abs(r), 2.0, 0.0))
    return where(agreed(f, r), 0.0, larger)


def coefficients(ff, fr, rr, gamma, alpha):
    return 0.5 * gamma, 0.5 * alpha, gamma, 0.0, 0.0, alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """The mean of the values that have the elected sign: of both, of forget, of retain"""
    return gamma / 2, alpha / 2, gamma, 0.0, 0.0, alpha


RULE = Rule(
    "ties",
    coefficients,
    "element",
    gate=gate,
    formula="(gamma*f + alpha*r)/2 if the signs are equal, else the larger of gamma*f and alpha*r",
    source="arXiv 2306.01708",
)
