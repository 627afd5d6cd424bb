"""Captures with gradients that are known beforehand, and what the accumulators should hold."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import sago
from tests.support.backends import DTYPES
from tests.support.properties import assert_equal_bits

BF16, FP16, FP32, FP64 = DTYPES
SIDES = ("forget", "retain")
FORMS = {"in place": (FP32, None), "in fp32": (BF16, FP32)}  # parameters, accumulators


def added(total, grads):
    """Adds the gradients in the order in which autograd adds them."""
    return [t if g is None else g if t is None else t + g for t, g in zip(total, grads, strict=True)]


class Window:
    """Buckets over two parameters, and what their accumulators should hold."""

    def __init__(self, dtype=FP32, accumulate_dtype=None, **options):
        self.params = {n: nn.Parameter(torch.ones(k, dtype=dtype)) for n, k in (("w", 3), ("v", 5))}
        self.wide = accumulate_dtype or dtype
        self.buckets = sago.GradientBuckets(self.params.items(), accumulate_dtype=accumulate_dtype, **options)
        self.start_anew()

    def zero_(self):
        self.buckets.zero_()
        self.start_anew()

    def start_anew(self):
        self.totals = {side: [None] * len(self.params) for side in SIDES}

    def open(self, side):
        return getattr(self.buckets, side)()

    def enter(self, side):
        with self.open(side):
            pytest.fail("entered")

    def entries(self):
        """Calls that enter a capture."""
        return [lambda s=side: self.enter(s) for side in SIDES]

    def loss(self, **gradients):
        return sum((self.params[name] * g).sum() for name, g in gradients.items())

    def backward(self, side, **gradients):
        """Runs one random action inside a capture."""
        self.loss(**gradients).backward()
        grads = [gradients.get(name) for name in self.params]
        grads = [
            None if g is None else torch.full_like(p, g, dtype=self.wide, requires_grad=False)
            for g, p in zip(grads, self.params.values(), strict=True)
        ]
        self.totals[side] = added(self.totals[side], grads)

    def capture(self, side, **gradients):
        with self.open(side):
            self.backward(side, **gradients)

    def fail(self, error, side, **gradients):
        with self.open(side):
            if gradients:
                self.loss(**gradients).backward()
            raise error

    def grads(self):
        return [p.grad for p in self.params.values()]

    def check(self):
        """Runs one random action between captures."""
        for side in SIDES:
            assert_equal_bits(getattr(self.buckets, f"{side}_grads"), self.totals[side])
        assert self.grads() == [None, None]
        for p in self.params.values():
            assert not p._backward_hooks
            assert not p._post_accumulate_grad_hooks

    def finish(self):
        """Continues the window, which shows that no gradient was lost."""
        self.check()
        self.capture("forget", w=-3.0, v=2.0)
        self.capture("retain", v=-1.0)
        self.check()
        self.buckets.synthesize_("sum", gamma=2.0)
        for p, f, r in zip(self.params.values(), *(self.totals[side] for side in SIDES), strict=True):
            assert_equal_bits([p.grad], [(2 * f if r is None else 2 * f + r).to(p.dtype)])
        self.zero_()
        self.check()


@contextmanager
def refused(buckets, says, error=ValueError):
    """Asserts that the block raises and changes no accumulator."""
    before = [None if g is None else g.clone() for g in (*buckets.forget_grads, *buckets.retain_grads)]
    with pytest.raises(error, match=f"(?s){says}") as caught:
        yield
    assert caught.type is error
    assert_equal_bits([*buckets.forget_grads, *buckets.retain_grads], before)
