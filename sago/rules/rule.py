"""`Rule`: a pure function from the inner products of a group to the coefficients of its update.

All rules have one formula. With `f` the forget and `r` the retain gradient, it is

    out_i = a_k * f_i + b_k * r_i,   k = gate(f_i, r_i)

A gate divides the elements into two or three classes. A rule without a gate has one class. A rule with
`gated=True` has two: 0 where f_i and r_i have strictly opposite signs, and 1 elsewhere. A rule computes the
coefficients `(a_0, b_0, a_1, b_1, ...)` from `ff = <f,f>`, `fr = <f,r>`, `rr = <r,r>` and the weights `gamma`
(forget) and `alpha` (retain).

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
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sago.rules.form import Helpers, check_gate, helpers, is_ours, replaced
from sago.rules.reads import CASES, PRODUCTS, Names, Reads, reads

Scope = Literal["element", "tensor", "global"]
Term = Literal["zero", "nonzero", "any"]
Gate = Callable[..., Any]


class Guarantees(NamedTuple):
    """Properties of the update `u` for all gradients, `gamma >= 0` and `alpha >= 0`.

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


_KINDS = {
    "name": str,
    "gated": bool,
    "formula": str,
    "by_class": bool,
    "guarantees": Guarantees,
    "source": str,
}


@dataclass(frozen=True)
class Rule:
    """A rule: how the update is computed from the forget and the retain gradient.

    Args:
        name: The name of the rule in reports and error messages.
        coefficients: A pure function `(ff, fr, rr, gamma, alpha)` of five fp64 values (tensors of shape
            `[groups]`, or scalars inside the kernel) that returns `(a, b)`, or for a gate `(a, b)` of each
            class, one after another: `(a_c, b_c, a, b)` if `gated`, where the first two are for elements in
            conflict. A coefficient that is exactly 0 switches its gradient off: NaN and inf in that gradient
            do not reach the update. The library makes a coefficient NaN if an inner product that it depends
            on is not finite, even if the function only compares that product.
        scope: The elements that an inner product runs over: `"tensor"` (each tensor, or each of `groups`) or
            `"global"` (all tensors). `"element"` means that the rule reads no inner products, and a function
            that reads one is refused.
        gated: Whether elements in conflict have coefficients of their own.
        gate: A pure function `(f, r)` of two tensors that returns the class of each element as a number, 0.0,
            1.0 or 2.0. It is computed in the precision of the update, and must be written in the language of
            `sago.rules`, because it is compiled into the kernels. It should return the same class if both
            gradients are multiplied by one positive number.
        seed: For a random gate, a number of 64 bits. The gate takes a third argument `u`, a number from 0 to
            1 (exclusive) for each element, which is a hash of the seed, the step and the position of the
            element in the list. `sago.GradientBuckets` counts the steps. Other calls are at step 0.
        by_class: Whether `coefficients` takes a sixth argument: for each class the sums over its elements
            `(n, ff, fr, rr)`, where `n` is their number. It needs a `gate`. It is not compiled into the
            kernel.
        state: The initial values of numbers that the rule keeps for each group from step to step, such as a
            running mean. `coefficients` takes them as its last argument, a tuple of fp64 tensors of shape
            `[groups]`, and returns their new values after the coefficients. A new value that is NaN or inf
            is not kept. `sago.GradientBuckets` keeps the numbers, so only its `synthesize_` takes such a
            rule. It is not compiled into the kernel.
        formula: One line for tables and documentation.
        guarantees: What holds for every update of the rule; see `Guarantees`. `sago.testing.check_rule` tests
            it.
        source: Where the rule was published.

    Attributes:
        reads: For each case `(gamma == 0, alpha == 0)`, the names of the inner products that each coefficient
            depends on. The cases differ because `scaled` ignores its coefficient if its weight is 0. If this
            cannot be determined, for example because of `.item()`, all names are listed.
        classes: The number of classes of elements: 1, 2 or 3.
        by_sign: Whether the class of an element depends only on the signs of its gradients.

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
    gate: Gate | None = None
    by_class: bool = False
    state: tuple[float, ...] = ()
    seed: int | None = None
    guarantees: Guarantees = field(default=Guarantees(), compare=False)
    source: str = field(default="", compare=False)
    reads: Reads = field(init=False, repr=False, compare=False)
    classes: int = field(init=False, repr=False, compare=False)
    by_sign: bool = field(init=False, repr=False, compare=False)
    helpers: Helpers = field(init=False, repr=False, compare=False)
    built_in: bool = field(init=False, repr=False, compare=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> Rule:
        made = super().__new__(cls)
        _alive[id(made)] = made
        return made

    def __post_init__(self) -> None:
        if not callable(self.coefficients):
            raise TypeError(
                f"Parameter `coefficients` should be a callable. Found {type(self.coefficients).__name__}."
            )
        if self.scope not in ("element", "tensor", "global"):
            raise ValueError(
                f"Parameter `scope` should be 'element', 'tensor' or 'global'. Found {self.scope!r}."
            )
        for name, wanted in _KINDS.items():
            if not isinstance(getattr(self, name), wanted):
                given = type(getattr(self, name)).__name__
                raise TypeError(f"Parameter `{name}` should be a {wanted.__name__}. Found {given}.")
        classes, by_sign = self._classes_of_gate() if self.gate else (2 if self.gated else 1, True)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "by_sign", by_sign)
        object.__setattr__(self, "helpers", helpers(self.coefficients) + helpers(self.gate))
        object.__setattr__(self, "built_in", is_ours(self.coefficients))
        if self.by_class and self.gate is None:
            raise ValueError("Parameter `by_class` should be False for a rule without a `gate`. Found True.")
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"Parameter `seed` should be None or an int of 64 bits. Found {self.seed!r}.")
        if self.seed is not None and self.gate is None:
            raise ValueError("Parameter `seed` should be None for a rule without a `gate`. Found a number.")
        with torch.inference_mode(False):  # tensors of inference mode have no versions
            ones = torch.ones(2, dtype=torch.float64, device="cpu")
        object.__setattr__(self, "state", self._initial())
        more: list[Any] = [[(ones,) * 4] * classes] if self.by_class else []
        more += [(ones,) * len(self.state)] if self.state else []
        try:
            found = self.coefficients(ones, ones, ones, ones[0], ones[0], *more)
        except Exception as error:  # code of the user may raise any class
            names = (", classes" if self.by_class else "") + (", state" if self.state else "")
            raise ValueError(
                f"Parameter `coefficients` should take `(ff, fr, rr, gamma, alpha{names})` as tensors, with "
                f"`sago.rules.where` instead of `if`. Found that it raises {error!r}."
            ) from error
        if ones._version:
            raise ValueError(
                "Parameter `coefficients` should not change its arguments, which the report shows. Found an "
                "operation in place. Use the form without `_`, for example `ff.mul(2.0)`."
            )
        if not (
            isinstance(found, tuple)
            and len(found) == 2 * classes + len(self.state)
            and all(map(_is_number, found))
        ):
            kind = f"has a gate of {classes} classes" if self.gate else "is gated"
            kind = "is not gated" if classes == 1 else kind
            kept = f" and keeps {len(self.state)} numbers" if self.state else ""
            raise ValueError(
                f"Parameter `coefficients` should return a tuple of {2 * classes + len(self.state)} numbers, "
                f"because the rule {kind}{kept}. A number is real, or a tensor of shape `[groups]`. Found "
                f"{found!r}."
            )
        seen = reads(self.coefficients, classes if self.by_class else 0, len(self.state))
        object.__setattr__(self, "reads", {case: names[: 2 * classes] for case, names in seen.items()})
        read = sorted(frozenset().union(*(names for case in self.reads.values() for names in case)))
        if self.scope == "element" and read:
            raise ValueError(
                "Parameter `scope` should be 'tensor' or 'global' for coefficients that depend on inner "
                f"products. Found 'element' for the rule {self.name!r}, which reads "
                f"{', '.join(f'`{name}`' for name in read)}."
            )

    def sample(self) -> list[float]:
        """The coefficients for two fixed rows of inner products. Rules of one name may differ in them."""
        products = torch.tensor([[2.0, -0.5, 3.0], [1.5, 0.25, 0.5]], dtype=torch.float64, device="cpu")
        more: list[Any] = [[(2.0 * products[:, 0], *products.T)] * self.classes] if self.by_class else []
        more += [tuple(torch.full((2,), x, dtype=torch.float64) for x in self.state)] if self.state else []
        weights = torch.tensor([0.75, 1.25], dtype=torch.float64, device="cpu").unbind()
        found = self.coefficients(*products.unbind(1), *weights, *more)
        return [float(x) for value in found for x in torch.as_tensor(value).cpu().flatten()]

    def check_helpers(self) -> None:
        """Raises ValueError if a function that the rule calls was replaced after the rule was made.

        Kernels keep the function with which they were compiled, and `reads` describes that function, too.
        """
        name = replaced(self.helpers)
        if name is not None:
            raise ValueError(
                f"The function `{name}`, which the rule {self.name!r} calls, should be the one with which "
                "the rule was made. Found that the name has another value. Make the sago.Rule again."
            )

    def _initial(self) -> tuple[float, ...]:
        if not (isinstance(self.state, tuple) and all(isinstance(x, Real) for x in self.state)):
            raise TypeError(f"Parameter `state` should be a tuple of numbers. Found {self.state!r}.")
        return tuple(map(float, self.state))

    def _classes_of_gate(self) -> tuple[int, bool]:
        """`classes` and `by_sign`, from the values of the gate on combinations of signs and sizes."""
        if self.gated:
            raise ValueError("Parameter `gate` should be None for a rule with gated=True. Found a function.")
        sizes = torch.tensor([0.0, 2.0**-40, 1.0, 2.0, 2.0**40], dtype=torch.float32, device="cpu")
        numbers = torch.cat([sizes, -sizes])
        drawn = [] if self.seed is None else [torch.linspace(0.0, 1.0 - 2.0**-24, 9).to(sizes)]
        f, r, *u = torch.cartesian_prod(numbers, numbers, *drawn).unbind(1)
        try:
            found = self.gate(f, r, *u)  # type: ignore[misc]
        except Exception as error:  # code of the user may raise any class
            raise ValueError(
                f"Parameter `gate` should take `(f, r{', u' if u else ''})` as tensors, with "
                f"`sago.rules.where` instead of `if`. Found that it raises {error!r}."
            ) from error
        if not isinstance(found, Tensor) or found.shape != f.shape or not set(found.tolist()) <= {0, 1, 2}:
            raise ValueError(
                "Parameter `gate` should return the class of each element, 0.0, 1.0 or 2.0, as a tensor of "
                f"the shape of its arguments. Found {found!r}."
            )
        check_gate(self.gate)
        signs = 3 * f.sign() + r.sign()
        by_sign = all(len(found[signs == s].unique()) == 1 for s in signs.unique())
        return max(2, 1 + int(found.max())), by_sign


# The arguments of an operator can be numbers, and no rules.
_alive: WeakValueDictionary[int, Rule] = WeakValueDictionary()


def with_id(number: int) -> Rule:
    """The rule whose `id` is `number`."""
    found = _alive.get(number)
    if found is None:
        raise RuntimeError(
            "The rule of a graph with `sago::synthesize` should be alive. Found that it was deleted, or that "
            "the graph was made in another process. Trace the function again."
        )
    return found


class Coefficients(NamedTuple):
    """The coefficients of every row, fp64 `[rows, 2 * classes]`: a and b of each class.

    `terms` tells which columns are known to be zero or nonzero without reading the values. A single row is
    used for all rows. `state` has the numbers that the rule keeps for the next step, fp64 `[rows, n]`.
    """

    values: Tensor
    terms: tuple[Term, ...]
    state: Tensor | None = None


def evaluate(
    rule: Rule,
    gram: Tensor | None,
    gamma: float | Tensor,
    alpha: float | Tensor,
    eps: float,
    device: torch.device,
    state: Tensor | None = None,
) -> Coefficients:
    """The coefficients of `rule`.

    `gram` is fp64 `[rows, >= 3]` with `ff, fr, rr` first, followed by `n, ff, fr, rr` of each class for a
    rule with `by_class`. None is one row of NaN, which shows if a rule reads a sum that it did not read when
    it was made. `state` has the numbers that the rule kept, fp64
    `[rows, n]`.
    """
    zero = torch.zeros(1 if state is None else len(state), dtype=torch.float64, device=device)
    ff, fr, rr = (torch.full_like(zero, torch.nan),) * 3 if gram is None else gram.unbind(1)[:3]
    weights = [_as_double(w, device).view(()) for w in (gamma, alpha)]
    products = dict(zip(PRODUCTS, (ff + eps, fr, rr + eps), strict=True))
    more: list[Any] = []
    if rule.by_class:
        assert gram is not None
        more = [[tuple(gram[:, k : k + 4].unbind(1)) for k in range(3, 3 + 4 * rule.classes, 4)]]
    if rule.state:
        assert state is not None
        more.append(state.unbind(1))
    values = rule.coefficients(*products.values(), *weights, *more)
    kept = None
    if state is not None:
        after = [_by_row(rule, _as_double(v, device), zero.shape) for v in values[2 * rule.classes :]]
        kept = torch.stack(after, dim=1)
        kept = torch.where(kept.isfinite(), kept, state)
    values = values[: 2 * rule.classes]
    # The host knows the values of literals, and of weights that are floats and returned unchanged.
    known = (gamma if v is weights[0] else alpha if v is weights[1] else v for v in values)
    terms: list[Term] = [_term(v) for v in known]
    columns = [_as_double(v, device) for v in values]
    for i, by_case in enumerate(zip(*(rule.reads[case] for case in CASES), strict=True)):
        if any(by_case):
            columns[i] = columns[i] - _overflow(by_case, products, gamma, alpha)  # keeps a -0
            terms[i] = "any"
    columns = [_by_row(rule, column, ff.shape) for column in columns]
    return Coefficients(torch.stack(columns, dim=1), tuple(terms), kept)


def _is_number(value: Any) -> bool:
    """Whether a coefficient function may return the value for two groups."""
    if not isinstance(value, Tensor):
        return isinstance(value, Real)
    return not value.is_complex() and not value.is_meta and value.shape in ((), (1,), (2,))


def _by_row(rule: Rule, value: Tensor, shape: torch.Size) -> Tensor:
    """The value of each row."""
    if value.ndim > 1 or value.numel() not in (1, *shape):
        raise ValueError(
            f"Parameter `coefficients` of the rule {rule.name!r} should return numbers, or tensors of shape "
            f"`[groups]`, {tuple(shape)} here. Found shape {tuple(value.shape)}."
        )
    return torch.broadcast_to(value, shape)


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
