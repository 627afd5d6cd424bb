"""Functions that several rules use, in the language of `sago.rules.language`."""

from sago.rules.language import maximum, minimum, ratio, scaled, sqrt


def cosine(ff, fr, rr):
    """The cosine between the gradients, from -1 to 1 in spite of rounding; 0 if one of them is 0."""
    return minimum(1.0, maximum(-1.0, ratio(fr, sqrt(ff) * sqrt(rr))))


def weighted(ff, fr, rr, gamma, alpha):
    """The inner products of `gamma*f` and `alpha*r`."""
    return scaled(gamma * gamma, ff), scaled(gamma * alpha, fr), scaled(alpha * alpha, rr)
