"""`cautious`: the forget gradient where it has the sign of the retain gradient, enlarged by what is left out.

    u_i = gamma * n/m * f_i   where f_i and r_i have strictly the same sign
          0                   elsewhere

`n` is the number of elements of a tensor, and `m` that of the elements in the first of the two classes.
`alpha` is not used. Promise: `u_i * r_i >= 0` and `u_i * f_i >= 0` at every element.

The update is `gamma*f` for equal and parallel gradients without zeros, and 0 for opposite ones and if one
gradient is 0.

Source: the mask of the cautious optimizers, Liang et al. 2024, arXiv 2411.16085. There, the step of the
optimizer has the place of forget and the gradient that of retain, and a small constant is added to `m`.
"""

from sago.rules.language import agreed, ratio, scaled, where
from sago.rules.rule import Guarantees, Rule


def gate(f, r):
    return where(agreed(f, r), 0.0, 1.0)


def coefficients(ff, fr, rr, gamma, alpha, classes):
    (kept, *_), (dropped, *_) = classes
    return scaled(gamma, ratio(kept + dropped, kept)), 0.0, 0.0, 0.0


def reference(
    ff: float, fr: float, rr: float, gamma: float, alpha: float, classes: list[list[float]]
) -> tuple[float, ...]:
    """`gamma * f * mask / mask.mean()`"""
    kept, n = classes[0][0], classes[0][0] + classes[1][0]
    return gamma / (kept / n) if kept else 0.0, 0.0, 0.0, 0.0


RULE = Rule(
    "cautious",
    coefficients,
    "tensor",
    gate=gate,
    by_class=True,
    formula="gamma*f*n/m where the signs are equal, else 0; m of n elements have equal signs",
    guarantees=Guarantees(
        non_negative_with_retain=True, non_negative_with_forget=True, agrees_with_retain=True
    ),
    source="arXiv 2411.16085",
)
