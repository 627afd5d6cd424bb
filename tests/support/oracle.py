"""The expected result of a synthesis, computed in float64 numpy from the table of rules alone.

Only the scope of a rule comes from sago. Besides each update it states how far a fast path may be off before
it rounds to the dtype it stores: sums off by `SUM_ERROR` of the sum of magnitudes, and a few roundings of the
coefficients and of the two products. A rule that is not in the table is given as a `Definition`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import Any, NamedTuple

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


class Definition(NamedTuple):
    """A rule in plain Python.

    Attributes:
        scope: The elements that an inner product runs over: "element", "tensor" or "global".
        coefficients: A function `(ff, fr, rr, gamma, alpha)` on floats, which returns `a` and `b` of each
            class. With `by_class`, it takes `(n, ff, fr, rr)` of each class as its sixth argument.
        gate: A function on the arrays of a pair, which returns the class of each element. Without it, class 0
            has the elements in conflict, and class 1 the others.
    """

    scope: str
    coefficients: Callable[..., Sequence[float]]
    gate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    by_class: bool = False

    def classes_of(self, f: np.ndarray, r: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """The class of each element. The gate computes in the dtype of the update."""
        if self.gate is None:
            return 1 - in_conflict(f, r)
        wide = np.float64 if dtype == torch.float64 else np.float32
        return np.asarray(self.gate(f.astype(wide), r.astype(wide)))


class Expected(NamedTuple):
    """Updates and their allowed errors, one array a tensor, and of every row the report's sums.

    `magnitudes` has, for each of `sums`, the sum of the magnitudes of what was added up. `certain` is False
    if `retain_floor` is so close to an element that rounding decides whether the element is below it.
    """

    updates: list[np.ndarray | None]
    slack: list[np.ndarray | None]
    sums: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]
    rows: list[Hashable]
    certain: bool = True


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


def errors_of_definition(
    define: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, errors: np.ndarray
) -> np.ndarray:
    """The errors of the coefficients that the errors of `ff, fr, rr`, and of those of each class, cause.

    A rule may compare sums, so all corners of the errors are tried. The factor 2 is for functions that are
    curved between the corners, and 1e-14 for the roundings of terms that cancel.
    """
    exact = define(sums)
    found = np.zeros_like(exact)
    for signs in product((-1.0, 1.0), repeat=3):
        found = np.maximum(found, abs(define(sums + errors * np.array([0.0, *signs])) - exact))
    return 2 * found + 1e-14 * abs(exact).max()


def times(coefficient: float, x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x) if coefficient == 0 else coefficient * x


@np.errstate(all="ignore")
def expect(
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    rule: str | Definition,
    gamma: float = 1.0,
    alpha: float = 1.0,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
    retain_floor: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Expected:
    """`scales` are factors that forget and retain are multiplied by before the rule sees them."""
    define = rule if isinstance(rule, Definition) else None
    is_global = define.scope == "global" if define else rule in GLOBAL
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

    def add(name: str, row: int, values: np.ndarray, sizes: np.ndarray) -> None:
        sums[name][row] += values.sum(dtype=np.float64)
        magnitudes[name][row] += sizes.sum(dtype=np.float64)

    # For each row and class `n, ff, fr, rr`, and the errors of these sums.
    of_classes, errors = np.zeros((2, len(rows), 3, 4))
    scaled = [pair and [x * scale for x, scale in zip(pair, scales, strict=True)] for pair in pairs]
    for group, pair in zip(groups, scaled, strict=True):
        if pair is None:
            continue
        f, r = pair
        row = rows.index(group)
        for name, xy in (("ff", f * f), ("fr", f * r), ("rr", r * r)):
            add(name, row, xy, abs(xy))
        for name, count in (
            ("nonfinite_forget", ~np.isfinite(f)),
            ("nonfinite_retain", ~np.isfinite(r)),
            ("numel", np.ones(f.shape)),
        ):
            add(name, row, count, np.zeros(1))

    floors, certain = floors_of(sums, retain_floor, is_global)
    parts: list[tuple[np.ndarray, np.ndarray] | None] = []  # conflicts, and classes of a definition
    for group, pair, memory, dtype in zip(groups, scaled, pairs, wide, strict=True):
        if pair is None:
            parts.append(None)
            continue
        f, r = pair
        row = rows.index(group)
        near = abs(abs(r) - floors[row]) <= 1e-5 * floors[row]
        certain &= not (np.isfinite(floors[row]) and near[r != 0].any())
        read = np.where(abs(r) < floors[row], 0.0, memory[1])  # a gate reads the gradients in memory
        conflict = in_conflict(f, read)
        add("conflicts", row, conflict, np.zeros(1))
        classes = 1 - conflict if define is None else define.classes_of(memory[0], read, dtype)
        parts.append((conflict, classes))
        for k in range(3):
            x, y = f[classes == k], r[classes == k]
            products = np.array([(x * x).sum(), (x * y).sum(), (y * y).sum()])
            of_classes[row, k] += np.array([x.size, *products])
            errors[row, k, 1:] += SUM_ERROR[dtype] * np.array([products[0], abs(x * y).sum(), products[2]])
    if is_global:
        of_classes, errors = (np.broadcast_to(x.sum(0), x.shape) for x in (of_classes, errors))

    chosen = []  # for each row the coefficients `[classes, 2]`, and their errors
    for row in range(len(rows)):
        ff, fr, rr = of_classes[row, :, 1:].sum(0)
        if define is None:
            numbers = ff + eps, fr, rr + eps
            exact = np.array(coefficients(rule, *numbers, gamma, alpha))
            error = errors_of(rule, numbers, errors[row, :, 1:].sum(0), gamma, alpha)
        else:

            def evaluated(sums: np.ndarray, define: Definition = define) -> np.ndarray:
                ff, fr, rr = sums[:, 1:].sum(0).tolist()
                sixth: list[Any] = [sums.tolist()] if define.by_class else []
                return np.array(define.coefficients(ff + eps, fr, rr + eps, gamma, alpha, *sixth))

            exact = evaluated(of_classes[row])
            error = errors_of_definition(evaluated, of_classes[row], errors[row])
        chosen.append((exact.reshape(-1, 2), error.reshape(-1, 2)))

    updates: list[np.ndarray | None] = []
    slack: list[np.ndarray | None] = []
    for group, pair, part, dtype in zip(groups, scaled, parts, wide, strict=True):
        if pair is None or part is None:
            updates.append(None)
            slack.append(None)
            continue
        f, r = pair
        row = rows.index(group)
        u, whole, error = (np.zeros(f.shape) for _ in range(3))
        for k, ((a, b), (da, db)) in enumerate(zip(*chosen[row], strict=True)):
            here = part[1] == k
            # A coefficient is a difference from its weight, and the two may cancel.
            terms = abs(a) and abs(gamma) + abs(a - gamma), abs(b) and abs(alpha) + abs(b - alpha)
            u = np.where(here, times(a, f) + times(b, r), u)
            whole = np.where(here, times(terms[0], abs(f)) + times(terms[1], abs(r)), whole)
            error = np.where(here, times(da, abs(f)) + times(db, abs(r)), error)
        updates.append(u)
        slack.append(4 * ROUNDING[dtype] * whole + error + 4 * SMALLEST[dtype])
        whole = whole + error / SUM_ERROR[dtype]
        add("uu", row, u * u, whole * whole)
        add("uf", row, u * f, whole * abs(f))
        add("ur", row, u * r, whole * abs(r))
    return Expected(updates, slack, sums, magnitudes, rows, certain)


def floors_of(sums: dict[str, np.ndarray], retain_floor: float, is_global: bool) -> tuple[np.ndarray, bool]:
    """The magnitude of each row below which an element of retain is 0 in a gate, and whether it is certain.

    A retain gradient that is smaller than 2**-16 of the forget gradient is below it as a whole.
    """
    if retain_floor == 0.0:
        return np.zeros(len(sums["rr"])), True
    ff, rr, numel = (
        np.full(len(x), x.sum()) if is_global else x for x in map(sums.get, ("ff", "rr", "numel"))
    )
    certain = not (abs(rr - 2.0**-32 * ff) <= 1e-5 * rr)[rr > 0].any()
    return np.where(rr < 2.0**-32 * ff, np.inf, retain_floor * np.sqrt(rr / np.maximum(numel, 1))), certain
