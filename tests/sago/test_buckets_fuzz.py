"""Random models and schedules of captures: accumulators and updates against autograd.grad and the reference.

Accumulators have to have the bits of separate `torch.autograd.grad` runs added up in the order of the
schedule. Updates have the bits of the reference for elementwise rules, those of the oracle for the others.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sago
from tests.support import properties
from tests.support.backends import DTYPES, ELEMENTWISE, GLOBAL, INTERPRETED, RULES, has_triton

SIDES = ("forget", "retain")
WIDTH, VOCABULARY, BRANCHES = 4, 5, 3
KINDS = ("linear", "no bias", "norm", "transposed", "channels_last")


pytestmark = pytest.mark.usefixtures("one_thread")


class Transposed(nn.Module):
    """A linear layer whose weight is not contiguous."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())

    def forward(self, x):
        return x @ self.weight


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, WIDTH, (1, 2)).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.inner(x.view(-1, 2, 1, 2)).flatten(1)


def layer(kind, dtype):
    make = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
        "norm": lambda: nn.LayerNorm(WIDTH),
        "transposed": Transposed,
        "channels_last": Convolution,
    }[kind]
    return make().to(dtype)


class Net(nn.Module):
    """An embedding, a trunk, branches of which a loss takes some, and a layer that no loss takes.

    The last branch is the embedding once more, as tied weights are. Every branch has a 0-d parameter.
    """

    def __init__(self, embedding, trunk, branches):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=embedding)
        self.trunk = nn.ModuleList(layer(*kind) for kind in trunk)
        self.branches = nn.ModuleList(layer(*kind) for kind in branches)
        self.scales = nn.ParameterList(torch.tensor(0.5) for _ in range(BRANCHES + 1))
        self.unused = nn.Linear(3, 1)

    def forward(self, tokens):
        """The loss of every branch."""
        x = self.embedding(tokens)
        for inner in self.trunk:
            x = self.through(inner, x)
        outputs = [self.through(branch, x) for branch in self.branches]
        outputs.append(x.float() @ self.embedding.weight.float().t())
        return [s * y.double().cos().sum() for s, y in zip(self.scales, outputs, strict=True)]

    @staticmethod
    def through(inner, x):
        return torch.tanh(inner(x.to(next(inner.parameters()).dtype)))


class Backward(NamedTuple):
    tokens: tuple[int, ...] | None  # None for the forward that the window shares
    branches: tuple[int, ...]


class Capture(NamedTuple):
    side: str
    inner: list[Any]  # of backwards and captures


class Case(NamedTuple):
    layers: dict[str, Any]
    seed: int
    frozen: set[int]
    frozen_later: set[int]
    params: str
    groups: list[int] | None
    windows: list[list[Capture]]
    buckets: dict[str, Any]
    call: dict[str, Any]
    foreign_zero: bool
    last: Backward | None  # of a synthesis in backward


BACKWARDS = st.builds(
    Backward,
    st.none() | st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4).map(tuple),
    st.lists(st.integers(0, BRANCHES), min_size=1, max_size=3, unique=True).map(tuple),
)


def captures(inner, sides=SIDES):
    return st.builds(Capture, st.sampled_from(sides), st.lists(inner, min_size=1, max_size=3))


NESTED = captures(BACKWARDS | BACKWARDS | captures(BACKWARDS | BACKWARDS | captures(BACKWARDS)))
# With a capture of both sides among them.
SCHEDULES = st.tuples(
    captures(BACKWARDS, ["forget"]), captures(BACKWARDS, ["retain"]), st.lists(NESTED, max_size=3)
).flatmap(lambda found: st.permutations([*found[:2], *found[2]]))


@st.composite
def cases(draw):
    dtype = st.sampled_from(DTYPES) if draw(st.booleans()) else st.just(draw(st.sampled_from(DTYPES)))
    kinds = st.tuples(st.sampled_from(KINDS), dtype)
    layers = {
        "embedding": draw(dtype),
        "trunk": draw(st.lists(kinds, max_size=3)),
        "branches": draw(st.lists(kinds, min_size=BRANCHES, max_size=BRANCHES)),
    }
    count = 21  # of parameters, at most, and two that are given twice
    mean = draw(st.booleans())
    rule, divisor = draw(st.sampled_from(RULES)), draw(st.sampled_from([None, 1, 2, 3]))
    groups = None if divisor is None else [i % divisor for i in range(count)]
    # A group may lie in several buffers, which a synthesis in backward refuses.
    in_backward = rule in ELEMENTWISE or (rule == "pcgrad" and groups is None)
    return Case(
        layers,
        draw(st.integers(0, 1000)),
        draw(st.sets(st.integers(0, count), max_size=6)),
        draw(st.sets(st.integers(0, count), max_size=3)),
        draw(st.sampled_from(["module", "parameters", "named_parameters", "doubled"])),
        groups,
        draw(st.lists(SCHEDULES, min_size=1, max_size=2)),
        {
            "accumulate_dtype": draw(st.sampled_from([None, None, torch.float32, torch.float64])),
            "accumulation": "mean" if mean else "sum",
            "bucket_cap_mb": draw(st.sampled_from([1e-6, 3e-4, 256.0])),
        },
        {
            "rule": rule,
            "gamma": draw(st.sampled_from([1.0, 0.75, 1 / 3, 0.0, -1.5])),
            "alpha": draw(st.sampled_from([1.0, 2.0, 0.3, 0.0])),
            "stats": draw(st.booleans()),
            # Added to the products of the means: nothing that weights could stand for.
            "eps": 0.0 if mean else draw(st.sampled_from([0.0, 1e-3])),
        },
        draw(st.booleans()),
        draw(st.none() | BACKWARDS) if in_backward else None,
    )


class Window:
    """Runs a schedule with captures, and adds up what autograd.grad gives for each backward."""

    def __init__(self, net, buckets, params, dtypes):
        self.net, self.buckets, self.params, self.dtypes = net, buckets, params, dtypes
        self.totals = {side: [None] * len(params) for side in SIDES}
        self.captures = dict.fromkeys(SIDES, 0)
        self.shared = net(torch.tensor([0, 1, 1]))

    def run(self, schedule):
        for capture in schedule:
            self.capture(capture)
        return self

    def capture(self, capture):
        with getattr(self.buckets, capture.side)():
            for inner in capture.inner:
                if isinstance(inner, Capture):
                    self.capture(inner)
                else:
                    self.backward(capture.side, inner)
        self.captures[capture.side] += any(isinstance(inner, Backward) for inner in capture.inner)

    def backward(self, side, backward):
        losses = self.shared if backward.tokens is None else self.net(torch.tensor(backward.tokens))
        loss = sum(losses[branch] for branch in backward.branches)
        # A frozen tensor is no input of the graph, and autograd.grad refuses to be asked for it.
        wanted = [i for i, p in enumerate(self.params) if p.requires_grad]
        grads = torch.autograd.grad(
            loss, [self.params[i] for i in wanted], retain_graph=True, allow_unused=True
        )
        total = self.totals[side]
        for i, g in zip(wanted, grads, strict=True):
            if g is not None:
                total[i] = g.to(self.dtypes[i]) if total[i] is None else total[i] + g
        loss.backward(retain_graph=backward.tokens is None)

    def synthesize_in_backward(self, last, call):
        with self.buckets.synthesize_in_backward(**call) as step:
            self.backward("retain", last)
        self.captures["retain"] += 1
        return step.report

    def check_accumulators(self):
        for side in SIDES:
            found = getattr(self.buckets, f"{side}_grads")
            properties.assert_equal_bits(found, self.totals[side])
            for g, p in zip(found, self.params, strict=True):
                if g is not None:
                    assert g.data_ptr() % 16 == 0
                    assert g.stride() == p.stride()
                    assert not g.requires_grad
        assert all(p.grad is None for p in self.params)


def check_updates(window, report, case, groups, names):
    forget, retain = (window.totals[side] for side in SIDES)
    updates = [p.grad for p in window.params]
    known = {name: value for name, value in case.call.items() if name != "stats"}
    rule = known.pop("rule")
    if case.buckets["accumulation"] == "mean":  # every rule takes it like weights
        known["gamma"] *= 1 / window.captures["forget"]
        known["alpha"] *= 1 / window.captures["retain"]
    if rule in ELEMENTWISE:
        expected = [
            None if f is None and r is None else torch.full_like(p, torch.nan, requires_grad=False)
            for f, r, p in zip(forget, retain, window.params, strict=True)
        ]
        sago.reference.synthesize_(forget, retain, rule, out=expected, groups=groups, **known)
        properties.assert_equal_bits(updates, expected)
    if groups is None and rule not in GLOBAL:
        groups = names
    with np.errstate(all="ignore"):
        properties.assert_updates(updates, forget, retain, rule, groups=groups, **known)
        if case.call["stats"] and case.buckets["accumulation"] == "sum":
            properties.assert_report(report, forget, retain, rule, groups=groups, **known)


def check(case, backend):
    torch.manual_seed(case.seed)
    net = Net(**case.layers)
    given = dict(net.named_parameters())
    for i, (name, p) in enumerate(given.items()):
        p.requires_grad_(i not in case.frozen or name.startswith("scales"))
    tensors = list(given.values())
    forms = {
        "module": net,
        "parameters": net.parameters(),
        "named_parameters": net.named_parameters(),
        "doubled": tensors + tensors[:2],
    }
    length = len(tensors) + 2 * (case.params == "doubled")
    groups = None if case.groups is None else case.groups[:length]
    buckets = sago.GradientBuckets(forms[case.params], groups=groups, backend=backend, **case.buckets)

    kept = [i for i, p in enumerate(tensors) if p.requires_grad]
    params = [tensors[i] for i in kept]
    wide = case.buckets["accumulate_dtype"]
    dtypes = [p.dtype if wide is None else torch.promote_types(p.dtype, wide) for p in params]
    keys = list(given) if case.params in ("module", "named_parameters") else range(len(tensors))
    names = [keys[i] for i in kept]
    if groups is not None:
        groups = [groups[i] for i in kept]
    for i in kept:
        if i in case.frozen_later and tensors[i].ndim:
            tensors[i].requires_grad_(False)

    for schedule in case.windows:
        window = Window(net, buckets, params, dtypes).run(schedule)
        window.check_accumulators()
        if case.last is None:
            report = buckets.synthesize_(**case.call)
        else:
            report = window.synthesize_in_backward(case.last, case.call)
        check_updates(window, report, case, groups, names)
        if case.foreign_zero:
            net.zero_grad(set_to_none=True)
        else:
            buckets.zero_()


@given(cases())
@settings(max_examples=150)
def test_windows_of_random_models(case):
    check(case, None)


@given(cases())
@settings(max_examples=30)
def test_windows_of_random_models_on_the_reference_backend(case):
    check(case, "reference")


if has_triton() and INTERPRETED:

    @given(cases())
    @settings(max_examples=15)
    def test_windows_of_random_models_in_the_kernels(case):
        check(case, "triton")
