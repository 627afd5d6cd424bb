"""`aligned_mtl`: the sum, after a linear map that makes the Gram matrix a multiple of the identity.

    (a, b) = sqrt(m) * G**-0.5 @ (gamma, alpha),   m the smaller eigenvalue of G = [[ff, fr], [fr, rr]]

The inner products run over all tensors. `gamma` and `alpha` weigh the aligned gradients, which have the
length `sqrt(m)` and are orthogonal. A weight of 0 therefore does not switch a gradient off. It promises
nothing: the aligned forget gradient can oppose retain if the gradients have different lengths.

For 2x2 matrices `sqrt(G) = (G + d)/t` with `d = sqrt(det G)` and `t = sqrt(trace G + 2*d)`, so that nothing
is inverted.

The update is 0 for parallel, antiparallel and equal gradients and if one of them is 0, which is the limit of
the formula. The published algorithm leaves eigenvalues of 0 out, and its update jumps there.

Source: Algorithm 1 of Senushkin et al. 2023, Independent Component Alignment for Multi-Task Learning (CVPR).
"""

from math import hypot, isfinite, nan
from math import sqrt as root

from sago.rules.language import maximum, ratio, sqrt
from sago.rules.rule import Rule


def coefficients(ff, fr, rr, gamma, alpha):
    # The coefficients depend on quotients only. The products of small or large squares would leave fp64.
    size = ff + rr
    ff, fr, rr = ratio(ff, size), ratio(fr, size), ratio(rr, size)
    d = sqrt(maximum(0.0, ff * rr - fr * fr))
    largest = 0.5 + 0.5 * sqrt((ff - rr) * (ff - rr) + 4.0 * fr * fr)
    scale = 1.0 / sqrt((1.0 + 2.0 * d) * largest)
    return scale * ((rr + d) * gamma - fr * alpha), scale * ((ff + d) * alpha - fr * gamma)


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """From the eigenvectors of `G`: the one of the smaller eigenvalue keeps its part of the weights."""
    if not (isfinite(ff) and isfinite(fr) and isfinite(rr)):
        return (nan,) * 4
    largest = (ff + rr) / 2 + hypot((ff - rr) / 2, fr)
    if largest == 0:
        return (0.0,) * 4
    # The eigenvector of the larger eigenvalue. The other one is (-y, x).
    x, y = (fr, largest - ff) if rr > ff else (largest - rr, fr)
    length = hypot(x, y)
    x, y = (x / length, y / length) if length > 0 else (1.0, 0.0)
    shrunk = root(max(0.0, (ff / largest) * (rr / largest) - (fr / largest) ** 2))
    along, across = shrunk * (gamma * x + alpha * y), alpha * x - gamma * y
    a, b = along * x - across * y, along * y + across * x
    return a, b, a, b


RULE = Rule(
    "aligned_mtl",
    coefficients,
    "global",
    formula="(a, b) = sqrt(m) * G**-0.5 @ (gamma, alpha), G the Gram matrix, m its smaller eigenvalue",
    source="Senushkin et al., CVPR 2023, algorithm 1",
)
