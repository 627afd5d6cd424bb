"""What a synthesis should give, in float64 numpy, from the table of rules alone.

Shares no code with sago. Besides each update it states how far a fast path may be off before it rounds
to the dtype it stores: sums off by `SUM_ERROR` of the sum of magnitudes, and a few roundings of the
coefficients and of the two products.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The error that the library promises for every sum, relative to the magnitudes that it adds.
PROMISED = 1e-6
# A lane of the fast paths adds at most 128 products one after the other. In fp64 that is the worst case of
# 128 roundings. In fp32 it is half of what is promised, 8 roundings: those of a lane have no common sign, so
# that about 11 are left of 128, and fewer after many lanes are added in fp64.
SUM_ERROR = {torch.float32: 2.0**-21, torch.float64: 2.0**-46}
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def rounding_error(count: int, dtype: torch.dtype) -> float:
    """The relative error of `count` roundings one after the other, all of them to the same side.

    A sum of `count` products in any order is off by so much at most, relative to the magnitudes that it adds.
    """
    return count * torch.finfo(dtype).eps / 2


class Expected(NamedTuple):
    """Updates and their allowed errors, one array a tensor, and of every row the report's sums.

    `magnitudes` has, for each of `sums`, the sum of the magnitudes of what was added up.
    """

    updates: list[np.ndarray | None]
    slack: list[np.ndarray | None]
    sums: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]
    rows: list[Hashable]


def array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def in_conflict(f: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(f) | np.isnan(r), 0, np.sign(f) * np.sign(r)) == -1


def projection(product: float, square: float) -> float:
    if not np.isfinite(product) or not np.isfinite(square):
        return np.nan
    return product / square if square > 0 else 0.0


def coefficients(
    rule: str, ff: float, fr: float, rr: float, gamma: float, alpha: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(a, b) in conflict and elsewhere."""
    both = {
        "sum": (gamma, alpha),
        "sago": (gamma, 0.0),
        "sago_prefer_retain": (gamma, alpha),
        "pcgrad": (gamma, alpha - (gamma * min(projection(fr, rr), 0.0) if gamma else 0.0)),
        "blur": (gamma - (alpha * projection(fr, ff) if alpha else 0.0), alpha),
    }
    both["pcgrad_global"] = both["pcgrad"]
    if np.isnan(projection(fr, rr)) and rule.startswith("pcgrad") and gamma:  # min() may hide a NaN
        both[rule] = (gamma, np.nan)
    return ((0.0, alpha) if rule.startswith("sago") else both[rule]), both[rule]


def times(coefficient: float, x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x) if coefficient == 0 else coefficient * x


@np.errstate(all="ignore")
def expect(
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    rule: str,
    gamma: float = 1.0,
    alpha: float = 1.0,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
) -> Expected:
    is_global = rule in ("pcgrad_global", "blur")
    if groups is None:
        groups = ["all" if is_global else i for i in range(len(forget))]
    rows = list(dict.fromkeys(groups))
    pairs, wide = [], []
    for f, r in zip(forget, retain, strict=True):
        given = [t for t in (f, r) if t is not None]
        wide.append(torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32)
        pairs.append(
            [array(t) if t is not None else np.zeros(given[0].shape) for t in (f, r)] if given else None
        )

    names = ("ff", "fr", "rr", "uu", "uf", "ur", "conflicts", "nonfinite_forget", "nonfinite_retain", "numel")
    sums = {name: np.zeros(len(rows)) for name in names}
    magnitudes = {name: np.zeros(len(rows)) for name in names}
    errors = np.zeros((len(rows), 3))  # of ff, fr, rr

    def add(name: str, row: int, values: np.ndarray, sizes: np.ndarray) -> None:
        sums[name][row] += values.sum(dtype=np.float64)
        magnitudes[name][row] += sizes.sum(dtype=np.float64)

    for group, pair, dtype in zip(groups, pairs, wide, strict=True):
        if pair is None:
            continue
        f, r = pair
        row = rows.index(group)
        for column, (name, product) in enumerate((("ff", f * f), ("fr", f * r), ("rr", r * r))):
            add(name, row, product, abs(product))
            errors[row, column] += SUM_ERROR[dtype] * abs(product).sum()
        for name, count in (
            ("conflicts", in_conflict(f, r)),
            ("nonfinite_forget", ~np.isfinite(f)),
            ("nonfinite_retain", ~np.isfinite(r)),
            ("numel", np.ones(f.shape)),
        ):
            add(name, row, count, np.zeros(1))

    updates: list[np.ndarray | None] = []
    slack: list[np.ndarray | None] = []
    for group, pair, dtype in zip(groups, pairs, wide, strict=True):
        if pair is None:
            updates.append(None)
            slack.append(None)
            continue
        f, r = pair
        row = rows.index(group)
        ff, fr, rr = (sums[n].sum() if is_global else sums[n][row] for n in ("ff", "fr", "rr"))
        dff, dfr, drr = errors.sum(0) if is_global else errors[row]
        ff, rr = ff + eps, rr + eps
        (a_c, b_c), (a, b) = coefficients(rule, ff, fr, rr, gamma, alpha)
        conflict = in_conflict(f, r)
        u = np.where(conflict, times(a_c, f) + times(b_c, r), times(a, f) + times(b, r))

        k, da, db = 0.0, 0.0, 0.0  # the projection, and what the errors of the sums do to a and b
        if rule.startswith("pcgrad") and rr > 0:
            k = gamma * min(fr / rr, 0.0)
            db = abs(gamma) * (dfr + abs(fr / rr) * drr) / rr
        if rule == "blur" and ff > 0:
            k = alpha * fr / ff
            da = abs(alpha) * (dfr + abs(fr / ff) * dff) / ff

        def size(a: float, b: float, f: np.ndarray = f, r: np.ndarray = r, k: float = k) -> np.ndarray:
            return times(abs(a) and abs(gamma) + abs(k), abs(f)) + times(
                abs(b) and abs(alpha) + abs(k), abs(r)
            )

        whole = np.where(conflict, size(a_c, b_c), size(a, b))
        error = times(da, abs(f)) + times(db, abs(r))
        updates.append(u)
        slack.append(4 * ROUNDING[dtype] * whole + error + 4 * SMALLEST[dtype])
        whole = whole + error / SUM_ERROR[dtype]
        add("uu", row, u * u, whole * whole)
        add("uf", row, u * f, whole * abs(f))
        add("ur", row, u * r, whole * abs(r))
    return Expected(updates, slack, sums, magnitudes, rows)
