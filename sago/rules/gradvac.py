"""`gradvac`: each gradient, moved to a target cosine with the other one.

    u = gamma*(f + p*r) + alpha*(r + q*f), over all tensors

`p, q >= 0` are such that `f + p*r` has the cosine `target` with `r`, and `r + q*f` has it with `f`. They are
0 if the cosine of the gradients is not below the target. `gamma` and `alpha` weigh the moved gradients, so
that a weight of 0 does not switch a gradient off. In the paper, the target is a running mean of the cosines:
`gradvac(decay=0.99)` keeps it.

With target 0 the rule is `pcgrad_symmetric` and has its promises: `<u,r> >= 0` and `<u,f> >= 0`. For other
targets it promises nothing.

The update is the sum for parallel and equal gradients, 0 for antiparallel gradients with target 0, and the
weighted other gradient if one of them is 0.

Source: Gradient Vaccine, Wang et al. 2021, arXiv 2010.05874.
"""

import math
from numbers import Real

from torch import Tensor

from sago.rules.language import maximum, minimum, ratio, scaled, sqrt, where
from sago.rules.rule import Guarantees, Rule
from sago.rules.shared import cosine

_NEAR_1 = 1.0 - 1e-12


def gradvac(target: float | Tensor = 0.0, decay: float | None = None) -> Rule:
    """The rule for a target between -1 and 1.

    The target can be a 0-d tensor that changes between calls. Its value is not checked. With `decay`, between
    0 and 1, `target` is the target of the first step. After each step, the next target is `decay` times the
    last one plus `1 - decay` times the cosine of the gradients. Only `sago.GradientBuckets` takes that rule,
    because it keeps the target.
    """
    fixed = isinstance(target, Real)
    if decay is not None and not (fixed and isinstance(decay, Real) and 0.0 <= decay <= 1.0):
        raise ValueError(
            "Parameter `decay` should be None or between 0 and 1, and `target` should be a number with it. "
            f"Found decay={decay!r}, target={target!r}."
        )
    if isinstance(target, Tensor):
        if target.ndim != 0:
            raise ValueError(
                "Parameter `target` should be a number or a tensor without dimensions. Found a tensor of "
                f"shape {tuple(target.shape)}."
            )
    elif not (fixed and -1.0 < target < 1.0):
        raise ValueError(f"Parameter `target` should be a number between -1 and 1. Found {target!r}.")

    def moved(ff, fr, rr, gamma, alpha, t):
        height = (1.0 - t * t) ** 0.5
        f, r, c = sqrt(ff), sqrt(rr), cosine(ff, fr, rr)
        added = where(c >= t, 0.0, (t * sqrt(1.0 - c * c) - c * height) / height)
        return gamma + scaled(alpha, added * ratio(r, f)), alpha + scaled(gamma, added * ratio(f, r))

    def coefficients(ff, fr, rr, gamma, alpha):
        t = target.to(ff.device, ff.dtype) if isinstance(target, Tensor) else target
        return moved(ff, fr, rr, gamma, alpha, t)

    def with_mean(ff, fr, rr, gamma, alpha, state):
        (mean,) = state
        following = decay * mean + (1.0 - decay) * cosine(ff, fr, rr)
        below_1 = minimum(_NEAR_1, maximum(-_NEAR_1, mean))  # at 1 the move would be infinite
        return *moved(ff, fr, rr, gamma, alpha, below_1), following

    symmetric = decay is None and not isinstance(target, Tensor) and target == 0.0
    return Rule(
        "gradvac",
        coefficients if decay is None else with_mean,
        "global",
        state=() if decay is None else (float(target),),
        formula="gamma*(f + p*r) + alpha*(r + q*f), cos(f + p*r, r) and cos(r + q*f, f) at least the target",
        guarantees=Guarantees(non_negative_with_retain=symmetric, non_negative_with_forget=symmetric),
        source="arXiv 2010.05874",
    )


def reference(
    ff: float, fr: float, rr: float, gamma: float, alpha: float, target: float = 0.0
) -> tuple[float, ...]:
    """Adds to each gradient what its component along the other one lacks for the target."""
    if gamma == 0 and alpha == 0:
        return (0.0,) * 4
    if not (math.isfinite(ff) and math.isfinite(fr) and math.isfinite(rr)):
        return (math.nan,) * 4
    f, r = math.sqrt(ff), math.sqrt(rr)
    if f == 0 or r == 0:
        return gamma, alpha, gamma, alpha
    # In units of the norm of the gradient: its component along the other one, and across it.
    along = max(-1.0, min(1.0, fr / f / r))
    across = math.sqrt((1.0 - along) * (1.0 + along))
    wanted = across * target / math.sqrt((1.0 - target) * (1.0 + target))
    lacks = wanted - along if along < target else 0.0
    a, b = gamma + alpha * lacks * r / f, alpha + gamma * lacks * f / r
    return a, b, a, b


RULE = gradvac()
