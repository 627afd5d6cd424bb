"""The expected result of a synthesis, computed in float64 numpy from the table of rules alone.

Only the scope of a rule comes from sago. Besides each update it states how far a fast path may be off before
it rounds to the dtype it stores: sums off by `SUM_ERROR` of the sum of magnitudes, and a few roundings of the
coefficients and of the two products.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.backends import GLOBAL

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
) -> tuple[float, float, float, float]:
    """The coefficients `a_c, b_c` in conflict, and `a, b` elsewhere."""
    onto_retain = gamma * min(projection(fr, rr), 0.0) if gamma else 0.0
    onto_forget = alpha * projection(fr, ff) if alpha else 0.0
    elsewhere = {
        "sum": (gamma, alpha),
        "sago": (gamma, 0.0),
        "sago_prefer_retain": (gamma, alpha),
        "pcgrad": (gamma, alpha - onto_retain),
        "pcgrad_global": (gamma, alpha - onto_retain),
        "blur": (gamma - onto_forget, alpha),
    }
    gated = {"sago": (0.0, alpha), "sago_prefer_retain": (0.0, alpha)}
    return *gated.get(rule, elsewhere[rule]), *elsewhere[rule]


def errors_of(
    rule: str, sums: Sequence[float], errors: Sequence[float], gamma: float, alpha: float
) -> np.ndarray:
    """The errors of the four coefficients that the errors of `ff, fr, rr` cause."""
    exact = np.array(coefficients(rule, *sums, gamma, alpha))
    total = np.zeros(4)
    for i, error in enumerate(errors):
        found = []
        for sign in (-1, 1):
            moved = list(sums)
            moved[i] += sign * error
            found.append(abs(np.array(coefficients(rule, *moved, gamma, alpha)) - exact))
        total += np.maximum(*found)
    return total


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
    is_global = rule in GLOBAL
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
        of_sums = errors.sum(0) if is_global else errors[row]
        numbers = ff + eps, fr, rr + eps
        a_c, b_c, a, b = coefficients(rule, *numbers, gamma, alpha)
        da_c, db_c, da, db = errors_of(rule, numbers, of_sums, gamma, alpha)
        conflict = in_conflict(f, r)
        u = np.where(conflict, times(a_c, f) + times(b_c, r), times(a, f) + times(b, r))

        def size(a: float, b: float, f: np.ndarray = f, r: np.ndarray = r) -> np.ndarray:
            # A coefficient is a difference from its weight, and the two may cancel.
            terms = abs(a) and abs(gamma) + abs(a - gamma), abs(b) and abs(alpha) + abs(b - alpha)
            return times(terms[0], abs(f)) + times(terms[1], abs(r))

        whole = np.where(conflict, size(a_c, b_c), size(a, b))
        error = np.where(
            conflict,
            times(da_c, abs(f)) + times(db_c, abs(r)),
            times(da, abs(f)) + times(db, abs(r)),
        )
        updates.append(u)
        slack.append(4 * ROUNDING[dtype] * whole + error + 4 * SMALLEST[dtype])
        whole = whole + error / SUM_ERROR[dtype]
        add("uu", row, u * u, whole * whole)
        add("uf", row, u * f, whole * abs(f))
        add("ur", row, u * r, whole * abs(r))
    return Expected(updates, slack, sums, magnitudes, rows)
