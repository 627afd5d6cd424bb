"""`graddrop`: at each element in conflict one of the two gradients, drawn at random.

    u_i = gamma*f_i + alpha*r_i   where the signs are not strictly opposite
          the positive one        elsewhere, with probability |positive| / (|f_i| + |r_i|)
          the negative one        elsewhere

The gate has the classes both, forget alone and retain alone. The probabilities do not depend on `gamma` and
`alpha`, which weigh the gradients that are kept. The draw of an element is a hash of the seed, the step and
the position of the element, so that all ranks and backends draw alike. The rule promises nothing.

The update is the weighted sum for equal and parallel gradients, one of the two at each element for opposite
ones, and the other gradient, weighted, if one of them is 0.

Source: GradDrop, Chen et al. 2020, arXiv 2010.06808, with leak 0 for both tasks.
"""

from sago.rules.language import abs, maximum, opposed, where
from sago.rules.rule import Rule


def graddrop(seed: int = 0) -> Rule:
    """The rule with this seed. Outside of `sago.GradientBuckets`, pass another seed at each step."""
    return Rule(
        "graddrop",
        coefficients,
        "element",
        gate=gate,
        seed=seed,
        formula="gamma*f + alpha*r, in conflict one of the two, drawn at random",
        source="arXiv 2010.06808",
    )


def gate(f, r, u):
    positive = where(f > 0.0, 1.0, 2.0)  # the class of the positive one, in conflict
    drawn = where(u * abs(f) + u * abs(r) < maximum(f, r), positive, 3.0 - positive)
    return where(opposed(f, r), drawn, 0.0)


def coefficients(ff, fr, rr, gamma, alpha):
    return gamma, alpha, gamma, 0.0, 0.0, alpha


def reference(ff: float, fr: float, rr: float, gamma: float, alpha: float) -> tuple[float, ...]:
    """The weights of both gradients, of forget alone and of retain alone"""
    return gamma, alpha, gamma, 0.0, 0.0, alpha


RULE = graddrop()
