"""`upgrad`: the mean of the two gradients, each projected so that it opposes neither.

    u = (gamma*P(f) + alpha*P(r)) / 2,   P(x) the vector nearest to x with <P(x),f> >= 0 and <P(x),r> >= 0

The inner products run over all tensors. `gamma` and `alpha` weigh the projected gradients. Half of them is
the preference vector of the method. For two gradients the update is half of `pcgrad_symmetric`. Promise:
`<u,r> >= 0` and `<u,f> >= 0`, because both terms have them.

The update is the mean for parallel and equal gradients, 0 for antiparallel ones, and half of the weighted
other gradient if one of them is 0. With `gamma = 0`, retain is still projected.

Source: UPGrad, Quinton and Rey 2024, arXiv 2406.16232.
"""

from math import isfinite, nan

from sago.rules.dualproj import projected
from sago.rules.language import minimum, ratio, scaled
from sago.rules.rule import Guarantees, Rule


def coefficients(ff, fr, rr, gamma, alpha):
    return (
        0.5 * (gamma - scaled(alpha, minimum(0.0, ratio(fr, ff)))),
        0.5 * (alpha - scaled(gamma, minimum(0.0, ratio(fr, rr)))),
    )


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """The two projections, each from its quadratic program."""
    read = [fr, *([rr] if gamma else []), *([ff] if alpha else [])] if gamma or alpha else []
    if not all(map(isfinite, read)):
        return (nan,) * 4
    # A term of weight 0 is left out, so that the square that only it reads does not matter.
    of_forget = projected(1.0, 0.0, ff, fr, rr) if gamma else (0.0, 0.0)
    of_retain = projected(0.0, 1.0, ff, fr, rr) if alpha else (0.0, 0.0)
    a, b = ((gamma * x + alpha * y) / 2 for x, y in zip(of_forget, of_retain, strict=True))
    return a, b, a, b


RULE = Rule(
    "upgrad",
    coefficients,
    "global",
    formula="half of pcgrad_symmetric",
    guarantees=Guarantees(non_negative_with_retain=True, non_negative_with_forget=True),
    source="arXiv 2406.16232",
)
