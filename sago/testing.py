"""`check_rule`: tests a rule on every backend, against its independent definition and its guarantees.

from sago.testing import check_rule

def test_my_rule():
    check_rule(MY_RULE, reference=my_definition)
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.reference import definition
from sago.reference import synthesize as synthesize_plainly
from sago.rules import REFERENCES, RULES, Rule, resolve
from sago.rules.draws import of_pair
from sago.synthesis import synthesize

Definition = Callable[..., tuple[float, ...]]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SUM_ERROR = 1e-6  # relative, of every sum that a backend computes
_WEIGHTS = ((1.0, 1.0), (0.75, 1.5), (2.0, 0.25), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))


class Case(NamedTuple):
    """A list of gradient pairs and the weights of a call."""

    name: str
    forget: list[Tensor]
    retain: list[Tensor]
    gamma: float
    alpha: float


def check_rule(rule: str | Rule, reference: Definition | None = None, cases: int = 60, seed: int = 0) -> None:
    """Raises AssertionError if the rule is not what it says. Takes a few seconds.

    These properties are checked on random and on degenerate gradients, in four dtypes, with equal and unequal
    weights, on every backend that can run on this machine:

    - The update equals that of the independent definition. For elementwise rules, it has the same bits as the
      rule's own coefficients in plain torch.
    - Gradients that are equal, opposite, parallel or zero give a finite update.
    - A sum that overflows and that the rule reads makes the update NaN.
    - The gate gives the same class if both gradients are multiplied by one number. The definition takes its
      classes from the gate, so a test of your own has to say what they should be.
    - `rule.guarantees` holds.

    Args:
        rule: A name or a `sago.Rule`.
        reference: The independent definition: `(ff, fr, rr, gamma, alpha)` on floats, with the sums of the
            classes as a sixth argument for a rule with `by_class`. It returns `a` and `b` of each class, and
            for a rule without a gate `(a, b, a, b)`. None takes that of a built-in rule. For another rule,
            None compares the backends with the rule's own function in plain torch.
        cases: The number of random cases.
        seed: The seed of the random cases.

    A rule with `state` is checked at its first step.
    """
    rule = resolve(rule)
    if not (reference is None or callable(reference)):
        raise TypeError(
            f"Parameter `reference` should be None or a function. Found {type(reference).__name__}."
        )
    if rule.state:
        rule = _at_first_step(rule)
    if reference is None and RULES.get(rule.name) is rule:
        reference = REFERENCES[rule.name]
    for case in itertools.islice(_cases(seed), cases):
        expected, slack = _expected(rule, reference, case)
        for backend in _backends():
            found, _ = synthesize(case.forget, case.retain, rule, case.gamma, case.alpha, backend=backend)
            where = f"rule {rule.name!r}, backend {backend!r}, {case.name}"
            for u, e, s in zip(found, expected, slack, strict=True):
                _require(u.isfinite().all(), f"{where}: the update of finite gradients is not finite")
                error = (u.double() - e).abs()
                text = f"{where}: an element is off by {error.max():.3g}"
                _require((error <= s).all(), text)
            if rule.scope == "element":
                same, _ = synthesize_plainly(case.forget, case.retain, rule, case.gamma, case.alpha)
                _require(all(map(torch.equal, found, same)), f"{where}: bits differ from plain torch")
        _check_guarantees(rule, case)
    _check_overflow(rule)
    _check_gate(rule)


def _at_first_step(rule: Rule) -> Rule:
    """Returns the rule with its state fixed to the initial one."""

    def coefficients(*numbers: Any) -> tuple[Any, ...]:
        state = tuple(torch.full_like(numbers[0], x) for x in rule.state)
        found: tuple[Any, ...] = rule.coefficients(*numbers, state)[: 2 * rule.classes]
        return found

    return replace(rule, coefficients=coefficients, state=())


def _backends() -> list[str]:
    kernels = os.environ.get("TRITON_INTERPRET") == "1"
    return ["reference", "compiled", *(["triton"] if kernels else [])]


def _cases(seed: int) -> Iterator[Case]:
    """First every kind of degenerate gradients, then random ones, all with the weights in turn."""
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "equal": lambda f, r: (f, f),
        "opposite": lambda f, r: (f, -f),
        "parallel": lambda f, r: (f, 4 * f),
        "antiparallel": lambda f, r: (-4 * r, r),
        "forget is 0": lambda f, r: (0 * f, r),
        "retain is 0": lambda f, r: (f, 0 * r),
        "both are 0": lambda f, r: (0 * f, 0 * r),
        "some zeros": lambda f, r: (f * (r > 0), r * (f < 1)),
        "agreeing": lambda f, r: (f, f + 0.5 * r),
        "in conflict": lambda f, r: (f, 0.5 * r - f),
        "small retain": lambda f, r: (f, r / 1024),
    }
    every = itertools.cycle([*kinds.items(), *[("random", lambda f, r: (f, r))] * len(kinds)])
    for i, (name, kind) in enumerate(every):
        sizes = torch.randint(1, 90, (1 + i % 3,), generator=generator).tolist()
        pairs = [kind(*torch.randn(2, n, generator=generator, dtype=torch.float64)) for n in sizes]
        dtype = _DTYPES[i % len(_DTYPES)]
        gamma, alpha = _WEIGHTS[(i // len(_DTYPES)) % len(_WEIGHTS)]
        forget, retain = ([t.to(dtype) for t in side] for side in zip(*pairs, strict=True))
        text = (
            f"{name} gradients, {dtype}, sizes {sizes}, gamma={gamma}, alpha={alpha}, seed={seed}, case {i}"
        )
        yield Case(text, forget, retain, gamma, alpha)


def _expected(rule: Rule, reference: Definition | None, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The update in fp64, and by how much each of its elements may be off.

    An element differs by its roundings, and by the change of the coefficients within the errors of the sums.
    """
    define = definition(rule) if reference is None else reference
    members = range(len(case.forget))
    starts = [0, *itertools.accumulate(f.numel() for f in case.forget)]
    groups = [list(members)] if rule.scope == "global" else [[i] for i in members]
    expected, slack = list(case.forget), list(case.forget)
    for group in groups:
        f, r = (torch.cat([side[i].double() for i in group]) for side in (case.forget, case.retain))
        sums = [_sums(f, r, part) for part in _parts(rule, f, r, starts[group[0]])]
        exact = _coefficients(rule, define, sums, case)
        near = [exact]
        if rule.scope != "element":
            for signs in itertools.product((-1, 0, 1), repeat=3):
                near.append(_coefficients(rule, define, [_moved(x, signs) for x in sums], case))
        cancelled = 1e-14 * max(map(abs, exact))  # by which a coefficient that is 0 may be off
        errors = [max(abs(other[j] - a) for other in near) + cancelled for j, a in enumerate(exact)]
        for i in group:
            f, r = case.forget[i].double(), case.retain[i].double()
            info = torch.finfo(case.retain[i].dtype)
            rounding = info.eps + 4 * (info.eps if info.bits == 64 else torch.finfo(torch.float32).eps)
            u, off = torch.zeros_like(f), torch.zeros_like(f)
            for k, part in enumerate(_parts(rule, f, r, starts[i])):
                (a, b), (p, q) = exact[2 * k : 2 * k + 2], errors[2 * k : 2 * k + 2]
                terms = (a * f).abs() + (b * r).abs()
                u += torch.where(part, a * f + b * r, 0.0)
                off += torch.where(part, 2 * (p * f.abs() + q * r.abs()) + rounding * terms + info.tiny, 0.0)
            expected[i], slack[i] = u, off
    return expected, slack


def _parts(rule: Rule, f: Tensor, r: Tensor, start: int) -> list[Tensor]:
    """Which elements belong to each class, in the order of the coefficients of a definition."""
    if rule.gate is not None:
        draw = None if rule.seed is None else torch.tensor([rule.seed, 0])
        classes = of_pair(rule.gate, draw, [start], 0)(f, r)
        return [classes == k for k in range(rule.classes)]
    conflict = f.sign() * r.sign() < 0
    return [conflict, ~conflict]


def _sums(f: Tensor, r: Tensor, part: Tensor) -> list[float]:
    """`n, ff, fr, rr` of a class."""
    f, r = f[part], r[part]
    return [float(len(f)), (f @ f).item(), (f @ r).item(), (r @ r).item()]


def _moved(sums: Sequence[float], signs: Sequence[int]) -> list[float]:
    """The sums with an error as large as a backend may have."""
    n, ff, fr, rr = sums
    p, q, s = (sign * _SUM_ERROR for sign in signs)
    return [n, ff * (1 + p), fr + q * (ff * rr) ** 0.5, rr * (1 + s)]


def _coefficients(rule: Rule, define: Definition, sums: list[list[float]], case: Case) -> tuple[float, ...]:
    totals = [sum(column) for column in zip(*sums, strict=True)][1:]
    sixth = [sums] if rule.by_class else []
    return define(*totals, case.gamma, case.alpha, *sixth)


def _check_guarantees(rule: Rule, case: Case) -> None:
    """In fp64, so that only errors of rounding have to be allowed."""
    stated = rule.guarantees
    forget, retain = ([t.double() for t in side] for side in (case.forget, case.retain))
    updates, _ = synthesize(forget, retain, rule, case.gamma, case.alpha, backend="reference")
    groups = [range(len(forget))] if rule.scope == "global" else [[i] for i in range(len(forget))]
    for group in groups:
        f, r, u = (torch.cat([side[i] for i in group]) for side in (forget, retain, updates))
        size = (u.norm() * f.norm(), u.norm() * r.norm())
        # The errors of an update that cancels are relative to its terms.
        slack = 1e-9 * (max(case.gamma, case.alpha) + 1) * (f.norm() + r.norm()) * max(f.norm(), r.norm())
        where = f"rule {rule.name!r}, {case.name}"
        if stated.non_negative_with_forget:
            _require(u @ f >= -slack - 1e-9 * size[0], f"{where}: <u,f> is {u @ f:.3g}")
        if stated.non_negative_with_retain:
            _require(u @ r >= -slack - 1e-9 * size[1], f"{where}: <u,r> is {u @ r:.3g}")
        if stated.agrees_with_retain:
            _require((u.sign() * r.sign() >= 0).all(), f"{where}: an element opposes retain")
    # Powers of 2 change no rounding.
    for factor in (2.0**-20, 2.0**20):
        f2, r2 = ([factor * t for t in side] for side in (forget, retain))
        others, _ = synthesize(f2, r2, rule, case.gamma, case.alpha, backend="reference")
        for u, other in zip(updates, others, strict=True):
            # Scaled sums have the same roundings. Functions such as a power may have others, of 1e-16 each.
            hint = (
                ", because the update changes otherwise when both losses are scaled. Make thresholds "
                "relative, for example to the other gradient, or state another degree in `guarantees`"
            )
            same = torch.allclose(other, factor**stated.degree * u, rtol=1e-12, atol=0)
            _require(same, f"rule {rule.name!r}, {case.name}: the degree is not {stated.degree}{hint}")


def _check_overflow(rule: Rule) -> None:
    """A sum of 1e400 is inf in every precision."""
    if not any(names for names in rule.reads[False, False]):
        return
    f, r = torch.tensor([1e200, -1e200, 1.0]).double() * torch.tensor([[1.0], [-0.5]]).double()
    for backend in _backends():
        u, _ = synthesize(f, r, rule, backend=backend)
        _require(
            u.isnan().any(), f"rule {rule.name!r}, backend {backend!r}: an overflow is not in the update"
        )


def _check_gate(rule: Rule) -> None:
    if rule.gate is None:
        return
    numbers = torch.tensor([-3.0, -1.0, -0.0, 0.0, 1.0, 3.0, torch.nan], dtype=torch.float64)
    drawn = [] if rule.seed is None else [torch.linspace(0.0, 1.0 - 2.0**-24, 9, dtype=torch.float64)]
    f, r, *u = torch.cartesian_prod(numbers, numbers, *drawn).unbind(1)
    classes = rule.gate(f, r, *u)
    _require(
        ((classes >= 0) & (classes < rule.classes)).all(), f"rule {rule.name!r}: the gate has other classes"
    )
    for factor in (2.0**-60, 2.0**60):
        same = torch.equal(rule.gate(factor * f, factor * r, *u), classes)
        _require(same, f"rule {rule.name!r}: the gate changes if both gradients are scaled by {factor:g}")


def _require(holds: Tensor | bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)
