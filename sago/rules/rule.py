"""`Rule`: a pure function from the inner products of a group to the coefficients of its update.

All rules have one formula. With `f` the forget and `r` the retain gradient, it is

    out_i = a_c * f_i + b_c * r_i   where f_i and r_i have strictly opposite signs (gated rules only)
            a   * f_i + b   * r_i   elsewhere

A rule computes the coefficients from `ff = <f,f>`, `fr = <f,r>`, `rr = <r,r>` and the weights `gamma`
(forget) and `alpha` (retain). A gated rule returns `(a_c, b_c, a, b)`, and other rules return `(a, b)`.

A coefficient function runs in two places: on fp64 tensors of shape `[groups]`, and, recompiled, on
fp64 scalars inside the combine kernel. It is compiled into the kernel if it is defined in a file, has no
annotations, and uses only `+ - * /`, comparisons, the functions of `sago.rules.language` and functions of the
same kind. Any other torch code is also a valid rule. Torch operations compute its coefficients before the
kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sago.rules.reads import CASES, PRODUCTS, Names, Reads, reads

Scope = Literal["element", "tensor", "global"]
Term = Literal["zero", "nonzero", "any"]


class Guarantees(NamedTuple):
    """What holds for the update `u` of any pair of gradients with `gamma >= 0` and `alpha >= 0`.

    Attributes:
        non_negative_with_retain: `<u,r> >= 0` over the elements of each group.
        non_negative_with_forget: `<u,f> >= 0` over the elements of each group.
        agrees_with_retain: `u_i * r_i >= 0` at every element.
        degree: If both gradients are multiplied by `c > 0`, the update is multiplied by `c ** degree`. A rule
            of degree 1 can work on the scaled gradients of `torch.amp.GradScaler`.
    """

    non_negative_with_retain: bool = False
    non_negative_with_forget: bool = False
    agrees_with_retain: bool = False
    degree: int = 1


@dataclass(frozen=True)
class Rule:
    """A rule: how the update is computed from the forget and the retain gradient.

    Args:
        name: The name of the rule in reports and error messages.
        coefficients: A pure function `(ff, fr, rr, gamma, alpha)` of five fp64 values (tensors of shape
            `[groups]`, or scalars inside the kernel) that returns `(a_c, b_c, a, b)` for a gated rule,
            `(a, b)` for an ungated one. A coefficient that is exactly 0 switches its gradient off: NaN and
            inf in that gradient do not reach the update. The library makes a coefficient NaN if an inner
            product that it depends on is not finite, even if the function only compares that product.
        scope: The elements that an inner product runs over: `"tensor"` (each tensor, or each of `groups`) or
            `"global"` (all tensors). `"element"` means that the rule reads no inner products, and a function
            that reads one is refused.
        gated: Whether elements in conflict have coefficients of their own.
        formula: One line for tables and documentation.
        guarantees: What holds for every update of the rule; see `Guarantees`. `sago.testing.check_rule` tests
            it.
        source: Where the rule was published.

    Attributes:
        reads: For each case `(gamma == 0, alpha == 0)`, the names of the inner products that each coefficient
            depends on. The cases differ because `scaled` ignores its coefficient if its weight is 0. If this
            cannot be determined, for example because of `.item()`, all names are listed.

    Example:
        >>> from sago.rules import ratio, where
        >>> def a_gem(ff, fr, rr, gamma, alpha):  # arXiv 1812.00420
        ...     return gamma, -gamma * where(fr < 0.0, ratio(fr, rr), 0.0)
        >>> sago.synthesize_(forget, retain, rule=sago.Rule("a_gem", a_gem, scope="global"))
    """

    name: str
    coefficients: Callable[..., Any]
    scope: Scope
    gated: bool = False
    formula: str = ""
    guarantees: Guarantees = field(default=Guarantees(), compare=False)
    source: str = field(default="", compare=False)
    reads: Reads = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.coefficients):
            raise TypeError(
                f"Parameter `coefficients` should be a callable. Found {type(self.coefficients).__name__}."
            )
        if self.scope not in ("element", "tensor", "global"):
            raise ValueError(
                f"Parameter `scope` should be 'element', 'tensor' or 'global'. Found {self.scope!r}."
            )
        if not isinstance(self.name, str):
            raise TypeError(f"Parameter `name` should be a str. Found {type(self.name).__name__}.")
        ones = torch.ones(2, dtype=torch.float64, device="cpu")
        try:
            found = self.coefficients(ones, ones, ones, ones[0], ones[0])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                "Parameter `coefficients` should take `(ff, fr, rr, gamma, alpha)` as tensors, with "
                f"`sago.rules.where` instead of `if`. Found that it raises {error!r}."
            ) from error
        expected = 4 if self.gated else 2
        if not (
            isinstance(found, tuple)
            and len(found) == expected
            and all(isinstance(value, (Real, Tensor)) for value in found)
        ):
            raise ValueError(
                f"Parameter `coefficients` should return a tuple of {expected} numbers, because the rule is "
                f"{'gated' if self.gated else 'not gated'}. Found {found!r}."
            )
        object.__setattr__(self, "reads", reads(self.coefficients))
        read = sorted(frozenset().union(*(names for case in self.reads.values() for names in case)))
        if self.scope == "element" and read:
            raise ValueError(
                "Parameter `scope` should be 'tensor' or 'global' for coefficients that depend on inner "
                f"products. Found 'element' for the rule {self.name!r}, which reads "
                f"{', '.join(f'`{name}`' for name in read)}."
            )


class Coefficients(NamedTuple):
    """The coefficients of every row, fp64: `[rows, 4]` for a gated rule, `[rows, 2]` for other rules.

    `terms` tells which columns are known to be zero or nonzero without reading the values. A single row is
    used for all rows.
    """

    values: Tensor
    terms: tuple[Term, ...]


def evaluate(
    rule: Rule,
    gram: Tensor | None,
    gamma: float | Tensor,
    alpha: float | Tensor,
    eps: float,
    device: torch.device,
) -> Coefficients:
    """The coefficients of `rule`.

    `gram` is fp64 `[rows, >= 3]` with `ff, fr, rr` first. None is one row of zeros.
    """
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    ff, fr, rr = (zero, zero, zero) if gram is None else gram.unbind(1)[:3]
    weights = [_as_double(w, device).view(()) for w in (gamma, alpha)]
    products = dict(zip(PRODUCTS, (ff + eps, fr, rr + eps), strict=True))
    values = rule.coefficients(*products.values(), *weights)
    # The host knows the values of literals, and of weights that are floats and returned unchanged.
    known = (gamma if v is weights[0] else alpha if v is weights[1] else v for v in values)
    terms: list[Term] = [_term(v) for v in known]
    columns = [_as_double(v, device) for v in values]
    for i, by_case in enumerate(zip(*(rule.reads[case] for case in CASES), strict=True)):
        if any(by_case):
            columns[i] = columns[i] - _overflow(by_case, products, gamma, alpha)  # keeps a -0
            terms[i] = "any"
    columns = [torch.broadcast_to(column, ff.shape) for column in columns]
    return Coefficients(torch.stack(columns, dim=1), tuple(terms))


def _overflow(
    by_case: Sequence[Names], products: dict[str, Tensor], gamma: float | Tensor, alpha: float | Tensor
) -> Any:
    """0, or NaN where an inner product that a coefficient reads is not finite."""
    # x - x is 0 for a finite x and NaN for NaN and inf.
    found = {
        names: sum(products[name] - products[name] for name in PRODUCTS if name in names)
        for names in set(by_case)
    }
    a, b, c, d = (found[names] for names in by_case)
    return _by_weight(gamma, _by_weight(alpha, a, b), _by_weight(alpha, c, d))


def _by_weight(weight: float | Tensor, nonzero: Any, zero: Any) -> Any:
    if isinstance(weight, Tensor):
        return nonzero if nonzero is zero else torch.where(weight == 0.0, zero, nonzero)
    return zero if weight == 0.0 else nonzero


def _term(value: float | Tensor) -> Term:
    if isinstance(value, Tensor) or 0.0 < abs(value) < torch.finfo(torch.float32).tiny:  # may be 0 in fp32
        return "any"
    return "zero" if value == 0.0 else "nonzero"


def _as_double(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
