"""The gradient pairs that are timed, and the check of an update against `sago.reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import sago
from benchmarks.measure import dtype_name
from benchmarks.workloads import Shapes
from sago import reference
from sago.rules import REFERENCES, RULES

GAMMA, ALPHA = 0.75, 1.25
POOL = 1 << 22

Tensors = Sequence[Tensor]


class WrongResult(RuntimeError):
    """A contender disagrees with the reference, so that nothing is reported."""


class Gradients:
    """Pairs of random normal numbers with a correlation of -0.29, of which about two thirds conflict.

    The pairs lie in the accumulators of `sago.GradientBuckets`. Lists, flat buffers and buckets are therefore
    timed on the same memory, which is two copies of the gradients. The values come from a pool of a few
    million pairs. A tensor repeats a stretch of the pool, from an offset of its own. Billions of elements can
    thus be restored and compared with the reference without a further copy.

    Attributes:
        params: Parameters of these shapes without memory, for the buckets.
        forget, retain: The lists.
        flat_forget, flat_retain: The flat buffers that hold the lists.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str | torch.device) -> None:
        self.params = [
            # Only the gradients need memory: all elements of a parameter are one number.
            torch.empty((), dtype=dtype, device=device).expand(shape).requires_grad_()
            for shape in shapes
        ]
        self.buckets = sago.GradientBuckets(self.params)
        self.dtype, self.device = dtype, self.params[0].device
        self.numels = [p.numel() for p in self.params]
        self._length = min(POOL, max(self.numels))
        generator = torch.Generator().manual_seed(0)
        r = torch.randn(self._length, generator=generator)
        f = torch.randn(self._length, generator=generator).sub_(r, alpha=0.3)
        self._pool = [t.to(device, dtype).repeat(2) for t in (f, r)]  # twice, so that a stretch is one slice
        self._pieces: list[list[Tensor]] = []
        self.restore_buckets()
        both = self.buckets.forget_grads, self.buckets.retain_grads
        self.forget, self.retain = ([v for v in views if v is not None] for views in both)
        self.flat_forget, self.flat_retain = (_buffers(side) for side in (self.forget, self.retain))

    def stretch(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns the stretches that forget and retain of tensor `i` repeat."""
        start, length = 16 * 7919 * i % self._length, min(self.numels[i], self._length)
        forget, retain = (side[start : start + length] for side in self._pool)
        return forget, retain

    def restore(self) -> None:
        """Writes the retain gradients again, because the updates have replaced them."""
        self._copy(1)

    def restore_buckets(self) -> None:
        """Captures both gradients again."""
        self.buckets.zero_()
        for side, capture in enumerate((self.buckets.forget, self.buckets.retain)):
            with capture():
                if len(self._pieces) <= side:
                    self._pieces.append([piece for p in self.params for piece in self._split(p.grad)])
                self._copy(side)

    def check(self, name: str, rule: str, updates: Tensors, tolerance: float) -> None:
        """Raises `WrongResult` if an error against the reference is above `tolerance * (|a*f| + |b*r|)`.

        `a` and `b` are the coefficients of the rule, or the larger ones of both branches of a gated rule. The
        rule "add" is `f + r`, rounded once.
        """
        right = torch.ones((), dtype=torch.bool, device=self.device)
        for i, (u, coefficients) in enumerate(zip(updates, self._coefficients(rule), strict=True)):
            f, r = self.stretch(i)
            expected = torch.empty_like(r)
            reference.write(reference.update(f, r, coefficients), expected)
            a_c, b_c, a, b = map(abs, coefficients)
            allowed = (max(a, a_c) * f.float().abs() + max(b, b_c) * r.float().abs()) * tolerance
            for piece in self._split(u):
                error = (piece.float() - expected[: len(piece)].float()).abs()
                right &= (error <= allowed[: len(piece)]).all()  # not `>`: a NaN must fail
        if not right.item():
            raise WrongResult(
                f"{name} ({dtype_name(self.dtype)}) is not `{rule}` of sago.reference within {tolerance} * "
                "(|a*f| + |b*r|). Nothing is reported."
            )

    @cached_property
    def _gram(self) -> list[list[float]]:
        """The inner products ff, fr, rr of every tensor, by the reference."""
        table = []
        for i, numel in enumerate(self.numels):
            f, r = self.stretch(i)
            whole, rest = divmod(numel, len(f))
            sums = reference.sums(f, r) * whole + reference.sums(f[:rest], r[:rest])
            table.append(sums[0:3] + sums[6:9])
        found: list[list[float]] = torch.stack(table).tolist()
        return found

    def _coefficients(self, rule: str) -> list[reference.FourFloats]:
        if rule == "add":
            return [(1.0, 1.0, 1.0, 1.0)] * len(self.numels)
        function, scope = REFERENCES[rule], RULES[rule].scope
        if scope == "element":
            return [function(0.0, 0.0, 0.0, GAMMA, ALPHA)] * len(self.numels)
        gram = self._gram
        if scope == "global":
            gram = [[sum(column) for column in zip(*gram, strict=True)]] * len(gram)
        return [function(*row, GAMMA, ALPHA) for row in gram]

    def _split(self, t: Tensor | None) -> Sequence[Tensor]:
        return () if t is None else t.view(-1).split(self._length)

    def _copy(self, side: int) -> None:
        torch._foreach_copy_(self._pieces[side], self._values[side])

    @cached_property
    def _values(self) -> list[list[Tensor]]:
        """The values of each of `_pieces`."""
        values: list[list[Tensor]] = [[], []]
        for i, numel in enumerate(self.numels):
            whole, rest = divmod(numel, self._length)
            for side, stretch in enumerate(self.stretch(i)):
                values[side] += [stretch] * whole + [stretch[:rest]] * (rest > 0)
        return values


class Prepared:
    """Is timed by `restore()`, then `run()`, which returns the updates. It keeps a reference to `keeps`."""

    def __init__(self, run: Callable[[], Tensors], restore: Callable[[], None], keeps: Any = None) -> None:
        self.run, self.restore, self.keeps = run, restore, keeps


def _buffers(views: Tensors) -> list[Tensor]:
    """Returns the flat tensors that hold the views."""
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in views}
    like = views[0]
    return [torch.empty(0, dtype=like.dtype, device=like.device).set_(s) for s in storages.values()]
