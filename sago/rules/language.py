"""The functions that a coefficient function can use besides arithmetic and comparisons.

Each has one meaning on tensors and on the scalars inside a kernel. A kernel has its own `where` and `sqrt`.
The others are compiled from their code below.
"""

import torch


def where(condition, x, y):
    """`torch.where(condition, x, y)`, which replaces `if` in a coefficient function."""
    return torch.where(condition, x, y)


def opposed(f, r):
    """Whether two numbers have strictly opposite signs: not if one of them is 0 or NaN.

    Unlike `f * r < 0`, it holds for products that underflow.
    """
    return where(f > 0.0, r, where(f < 0.0, -r, 0.0)) < 0.0


def agreed(f, r):
    """Whether two numbers have strictly the same sign: not if one of them is 0 or NaN."""
    return where(f > 0.0, r, where(f < 0.0, -r, 0.0)) > 0.0


def sqrt(x):
    """`torch.sqrt(x)`, rounded correctly."""
    return torch.sqrt(x)


def minimum(x, y):
    """The smaller of two values, like `torch.minimum`: NaN if one of them is NaN."""
    return where(x < y, x, where(y <= x, y, x + y))


def maximum(x, y):
    """The larger of two values, like `torch.maximum`: NaN if one of them is NaN."""
    return where(x > y, x, where(y >= x, y, x + y))


def abs(x):
    """`torch.abs(x)`."""
    return where(x > 0.0, x, 0.0 - x)


def ratio(numerator, denominator):
    """`numerator / denominator`; 0 where the denominator is 0, NaN where either is not finite."""
    # x / inf would silently be 0. The last term is NaN where either is not finite, and 0 elsewhere.
    overflow = 0.0 * numerator + 0.0 * denominator
    return where(denominator == 0.0, 0.0, numerator / denominator) + overflow


def scaled(weight, coefficient):
    """`weight * coefficient`; 0 where the weight is 0, even if the coefficient is NaN or inf."""
    return where(weight == 0.0, 0.0, weight * coefficient)
