"""A gallery of rules from the literature for two gradients, each a `sago.Rule` and no kernel.

    sago.synthesize_(forget, retain, rule=examples.rules.RULES["mgda"])

`f` is the forget gradient as minimised, `r` the retain gradient, `ff`, `fr`, `rr` their inner products over
all tensors. What `gamma` and `alpha` mean is in each docstring: weights of what becomes of `f` and of `r`, or
weights of `f` and `r` themselves ahead of the method. With both 1 it is the published method.

A coefficient function of arithmetic and `where` is compiled into the combine kernel; one with `torch.sqrt` is
evaluated by torch ahead of the kernel, on a few numbers. `docs/rules.md` is about writing one.
"""

from __future__ import annotations

import torch

import sago
from sago.rules import ratio, where


def opposed(product, square):
    """`product / square` where the product is negative, 0 where it is not."""
    return where(product < 0.0, ratio(product, square), 0.0)


def clipped(x):
    """`x` between 0 and 1."""
    return where(x < 0.0, 0.0, where(x > 1.0, 1.0, x))


def positive(x):
    """`x`, or 0 where rounding made a square negative; NaN, of products that overflowed, stays."""
    return where(x < 0.0, 0.0, x)


def cosine(ff, fr, rr):
    return torch.clamp(ratio(fr, torch.sqrt(ff) * torch.sqrt(rr)), -1.0, 1.0)


# Elementwise: `(a_c, b_c, a, b)`, the update where the signs are opposite and where they are not.


def and_mask(ff, fr, rr, gamma, alpha):
    """`gamma*f + alpha*r`, and 0 in conflict: Parascandolo et al. 2020, arXiv 2009.00329, at threshold 1.

    A coordinate where one gradient is exactly 0 is not in conflict here; the paper masks it out.
    """
    return 0.0, 0.0, gamma, alpha


def agreeing(ff, fr, rr, gamma, alpha):
    """`gamma*f`, and 0 in conflict: the mask of MUDMAN, arXiv 2506.12484.

    There the signs are those of a running mean of retain gradients: give that as `retain` and `out="forget"`.
    """
    return 0.0, 0.0, gamma, 0.0


# From inner products: `(a, b)` of the update `a*f + b*r`.


def a_gem(ff, fr, rr, gamma, alpha):
    """`gamma*(f - min(0, fr/rr)*r)`: Chaudhry et al. 2019, arXiv 1812.00420.

    GRU (arXiv 2503.09117) is this against a running mean of retain gradients: give that as `retain`.
    """
    return gamma, -gamma * opposed(fr, rr)


def orthograd(ff, fr, rr, gamma, alpha):
    """`gamma*(f - fr/rr*r) + alpha*r`: OrthoGrad, arXiv 2503.02312, for one retain sample and alpha 0.

    With alpha it is BLUR (arXiv 2506.08164) with forget as the upper task; the built-in `blur` is its mirror
    image.
    """
    return gamma, alpha - gamma * ratio(fr, rr)


def pcgrad_symmetric(ff, fr, rr, gamma, alpha):
    """`gamma*(f - min(0, fr/rr)*r) + alpha*(r - min(0, fr/ff)*f)`: Yu et al. 2020, arXiv 2001.06782.

    Algorithm 1 there projects both, where the built-in `pcgrad` spares retain. UPGrad (Quinton and Rey 2024,
    arXiv 2406.16232) with the preference vector `(gamma, alpha)` is the same for two gradients.
    """
    return gamma - alpha * opposed(fr, ff), alpha - gamma * opposed(fr, rr)


def dualproj(ff, fr, rr, gamma, alpha):
    """`gamma*f + alpha*r`, projected to `<u,f> >= 0` and `<u,r> >= 0`: GEM, arXiv 1706.08840, equation 11."""
    k_f, k_r = ratio(fr, ff), ratio(fr, rr)
    return (
        where(gamma + alpha * k_f >= 0.0, gamma, -alpha * k_f),
        where(alpha + gamma * k_r >= 0.0, alpha, -gamma * k_r),
    )


def mgda(ff, fr, rr, gamma, alpha):
    """The shortest `x*f' + (1-x)*r'`, 0 <= x <= 1, of `f' = gamma*f`, `r' = alpha*r`.

    Desideri 2012; for two gradients Sener and Koltun 2018, arXiv 1810.04650, algorithm 1.
    """
    ff, fr, rr = gamma * gamma * ff, gamma * alpha * fr, alpha * alpha * rr
    x = clipped(ratio(rr - fr, positive(ff + rr - 2.0 * fr)))
    return gamma * x, alpha * (1.0 - x)


def cosine_gate(ff, fr, rr, gamma, alpha):
    """`alpha*r + gamma*max(0, cos)*f`: Du et al. 2018, arXiv 1812.02224; forget is the auxiliary task."""
    c = cosine(ff, fr, rr)
    return gamma * where(c < 0.0, 0.0, c), alpha


def ngdiff(ff, fr, rr, gamma, alpha):
    """`gamma*f/|f| + alpha*r/|r|`: NGDiff, arXiv 2410.22086. Of degree 0 (docs/rules.md)."""
    return ratio(gamma, torch.sqrt(ff)), ratio(alpha, torch.sqrt(rr))


def imtl_g(ff, fr, rr, gamma, alpha):
    """`(|r'|*f' + |f'|*r') / (|f'| + |r'|)`, equally far along both, of `f' = gamma*f`, `r' = alpha*r`.

    Liu et al. 2021, Towards Impartial Multi-task Learning.
    """
    f, r = gamma * torch.sqrt(ff), alpha * torch.sqrt(rr)
    return gamma * ratio(r, f + r), alpha * ratio(f, f + r)


def nash_mtl(ff, fr, rr, gamma, alpha):
    """`(gamma*f/|f| + alpha*r/|r|) / sqrt(1 + cos)`: Navon et al. 2022, arXiv 2202.01017.

    With both weights 1 its coefficients solve `G @ w = 1/w`, `G` the Gramian. Of degree 0.
    """
    scale = torch.sqrt(1.0 + cosine(ff, fr, rr))
    return ratio(gamma, torch.sqrt(ff) * scale), ratio(alpha, torch.sqrt(rr) * scale)


def config(ff, fr, rr, gamma, alpha):
    """`(|f'| + |r'|)/2 * (f/|f| + r/|r|)`, of `f' = gamma*f`, `r' = alpha*r`.

    ConFIG, Liu et al. 2024, arXiv 2408.11104, equation 2, which for two gradients is this.
    """
    f, r = torch.sqrt(ff), torch.sqrt(rr)
    length = 0.5 * (gamma * f + alpha * r)
    return ratio(length, f), ratio(length, r)


def aligned_mtl(ff, fr, rr, gamma, alpha):
    """`sqrt(l_min) * G**-0.5 @ (gamma, alpha)`, `l_min` the smaller eigenvalue of the Gramian `G`.

    Senushkin et al. 2023, Independent Component Alignment for Multi-Task Learning, algorithm 1. For 2 x 2
    matrices `sqrt(G) = (G + d)/t`, `d = sqrt(det G)`, `t = sqrt(trace G + 2d)`, so that nothing is inverted.
    """
    trace = ff + rr
    d = torch.sqrt(positive(ff * rr - fr * fr))
    largest = 0.5 * (trace + torch.sqrt(positive(trace * trace - 4.0 * d * d)))
    scale = ratio(1.0, torch.sqrt((trace + 2.0 * d) * largest))
    return scale * ((rr + d) * gamma - fr * alpha), scale * ((ff + d) * alpha - fr * gamma)


def cagrad(radius):
    """Within `radius * |m|` of the mean `m` of `gamma*f` and `alpha*r`, the best update for the worse off.

    CAGrad, Liu et al. 2021, arXiv 2110.14048, algorithm 1, in closed form.
    """

    def cagrad(ff, fr, rr, gamma, alpha):
        ff, fr, rr = gamma * gamma * ff, gamma * alpha * fr, alpha * alpha * rr
        # Minimise <g, mean> + k*|g| over g = x*f + (1-x)*r: stationary at x, or at an end of [0, 1].
        spread, offset, slope = positive(ff + rr - 2.0 * fr), fr - rr, 0.5 * (ff - rr)
        k = 0.5 * radius * torch.sqrt(positive(ff + rr + 2.0 * fr))
        det = positive(ff * rr - fr * fr)
        inside = k * k * spread - slope * slope
        x = ratio(-slope * torch.sqrt(ratio(det, positive(inside))) - offset, spread)
        x = where(inside > 0.0, clipped(x), where(slope > 0.0, 0.0, 1.0))
        square = x * x * ff + 2.0 * x * (1.0 - x) * fr + (1.0 - x) * (1.0 - x) * rr
        step = ratio(k, torch.sqrt(positive(square)))
        return gamma * (0.5 + step * x), alpha * (0.5 + step * (1.0 - x))

    return cagrad


def gradvac(target):
    """`gamma*(f + p*r) + alpha*(r + q*f)`, `p` and `q` so that each has the cosine `target` with the other's
    gradient, 0 where it is above already: Wang et al. 2021, arXiv 2010.05874.

    There `target` is a running mean of cosines, so that a rule is made anew for each step. At 0 it is
    `pcgrad_symmetric`.
    """

    def gradvac(ff, fr, rr, gamma, alpha):
        f, r, c = torch.sqrt(ff), torch.sqrt(rr), cosine(ff, fr, rr)
        height = (1.0 - target * target) ** 0.5
        added = (target * torch.sqrt(1.0 - c * c) - c * height) / height
        added = where(c >= target, 0.0, added)
        return gamma + alpha * added * ratio(r, f), alpha + gamma * added * ratio(f, r)

    return gradvac


_GATED = (and_mask, agreeing)
_GLOBAL = (
    *(a_gem, orthograd, pcgrad_symmetric, dualproj, mgda, cosine_gate),
    *(ngdiff, imtl_g, nash_mtl, config, aligned_mtl, cagrad(0.5), gradvac(0.2)),
)
RULES = {rule.__name__: sago.Rule(rule.__name__, rule, "element", gated=True) for rule in _GATED} | {
    rule.__name__: sago.Rule(rule.__name__, rule, "global") for rule in _GLOBAL
}
