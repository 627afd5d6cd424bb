"""Steps of a program on the windows of `GradientBuckets`, over random models and schedules of captures.

Accumulators have to have the bits of separate `torch.autograd.grad` runs added up in the order of the
schedule. Updates have the bits of the reference for elementwise rules, and otherwise those of the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import sago
from tests.fuzz import lists
from tests.fuzz.lists import Options, raises
from tests.fuzz.rules import Name, definition_of, rule_of
from tests.support import oracle, properties
from tests.support.backends import DTYPES, on_device

SIDES = ("forget", "retain")
WIDTH, VOCABULARY, BRANCHES = 4, 5, 3
KINDS = ("linear", "no bias", "norm", "transposed", "channels_last")
COUNT = 21  # of parameters, at most


class Transposed(nn.Module):
    """A linear layer whose weight is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, WIDTH, (1, 2)).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(-1, 2, 1, 2)).flatten(1)


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
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

    def __init__(self, embedding: torch.dtype, trunk: Sequence[Any], branches: Sequence[Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=embedding)
        self.trunk = nn.ModuleList(layer(*kind) for kind in trunk)
        self.branches = nn.ModuleList(layer(*kind) for kind in branches)
        self.scales = nn.ParameterList(torch.tensor(0.5) for _ in range(BRANCHES + 1))
        self.unused = nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """The loss of every branch."""
        x = self.embedding(tokens)
        for inner in self.trunk:
            x = self.through(inner, x)
        outputs = [self.through(branch, x) for branch in self.branches]
        outputs.append(x.float() @ self.embedding.weight.float().t())
        return [s * y.double().cos().sum() for s, y in zip(self.scales, outputs, strict=True)]

    @staticmethod
    def through(inner: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(inner(x.to(next(inner.parameters()).dtype)))


class Model(NamedTuple):
    """A model and its buckets. `frozen` are the positions of parameters."""

    embedding: torch.dtype
    trunk: tuple[tuple[str, torch.dtype], ...]
    branches: tuple[tuple[str, torch.dtype], ...]
    seed: int
    frozen: frozenset[int]
    frozen_later: frozenset[int]
    params: str  # in which form the buckets get them
    groups: int | None  # the number of groups
    accumulate_dtype: torch.dtype | None
    accumulation: str
    bucket_cap_mb: float
    one_copy: bool


class Backward(NamedTuple):
    tokens: tuple[int, ...] | None  # None for the forward that the window shares
    branches: tuple[int, ...]


class Capture(NamedTuple):
    side: str
    inner: tuple[Any, ...]  # of backwards, captures and FAIL


class Window(NamedTuple):
    """A schedule of captures and a synthesis, in the backward `last` if there is one."""

    schedule: tuple[Capture, ...]
    last: Backward | None
    options: Options
    max_norm: float | None
    mistake: bool  # a synthesis with a wrong argument comes first
    foreign_zero: bool


FAIL = "fail"


class Failed(Exception):
    pass


class OnWindows:
    """Runs windows on the latest model, and adds up what autograd.grad gives for each backward."""

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self.model: Model | None = None

    def make(self, model: Model) -> None:
        torch.manual_seed(model.seed)
        self.model = model
        self.net = net = Net(model.embedding, model.trunk, model.branches)
        named = dict(net.named_parameters())
        for i, (name, p) in enumerate(named.items()):
            p.requires_grad_(i not in model.frozen or name.startswith("scales"))
        tensors = list(named.values())
        forms = {
            "module": net,
            "parameters": net.parameters(),
            "named_parameters": net.named_parameters(),
            "doubled": tensors + tensors[:2],
        }
        length = len(tensors) + 2 * (model.params == "doubled")
        groups = None if model.groups is None else [i % model.groups for i in range(length)]
        self.buckets = sago.GradientBuckets(
            forms[model.params],
            groups=groups,
            accumulate_dtype=model.accumulate_dtype,
            accumulation=model.accumulation,
            bucket_cap_mb=model.bucket_cap_mb,
            backend=self._backend,
            one_copy=model.one_copy,
        )
        kept = [i for i, p in enumerate(tensors) if p.requires_grad]
        self.params = [tensors[i] for i in kept]
        wide = model.accumulate_dtype
        self.dtypes = [p.dtype if wide is None else torch.promote_types(p.dtype, wide) for p in self.params]
        keys = list(named) if model.params in ("module", "named_parameters") else range(len(tensors))
        self.names = [keys[i] for i in kept]
        self.groups = None if groups is None else [groups[i] for i in kept]
        for i in kept:
            if i in model.frozen_later and tensors[i].ndim:
                tensors[i].requires_grad_(False)

    def run(self, window: Window) -> None:
        if self.model is None:
            return
        self.totals: dict[str, list[Tensor | None]] = {side: [None] * len(self.params) for side in SIDES}
        self.captures = dict.fromkeys(SIDES, 0)
        self.broken = False
        self.shared = self.net(torch.tensor([0, 1, 1]))
        one_copy = self.model.one_copy
        try:
            for capture in window.schedule:
                if capture.side == "forget" or not one_copy:
                    self.capture(capture)
        except Failed:
            pass
        options = self.allowed(window)
        needed = SIDES[:1] if one_copy else SIDES
        complete = not self.broken and all(self.captures[side] for side in needed)
        if not complete:
            self.refuse(options)
        else:
            self.check_accumulators()
            if window.mistake:
                with raises(ValueError, TypeError):
                    self.synthesize(window, options._replace(eps=-1.0))
                self.check_accumulators()
            report = self.synthesize(window, options)
            self.check_updates(window, options, report)
        if window.foreign_zero and complete:
            self.net.zero_grad(set_to_none=True)
        else:
            self.buckets.zero_()
            assert all(g is None for side in SIDES for g in getattr(self.buckets, f"{side}_grads"))
        assert all(p.grad is None for p in self.params)

    def allowed(self, window: Window) -> Options:
        """The options, with another rule if the buckets do not take this one."""
        model = self.model
        options = window.options._replace(groups=None, reduces=False)
        if rule_of(options.rule).seed is not None:
            options = options._replace(rule="sago")
        rule = rule_of(options.rule)
        last = int(self.in_backward(window))
        forget, retain = self.divisors(self.captures["forget"], self.captures["retain"] + last)
        if not rule.by_sign and forget != retain:
            options = options._replace(rule="sago")
        if model.one_copy and rule.scope == "global":
            options = options._replace(rule="pcgrad")
        return options.checked(0)

    def divisors(self, forget: int, retain: int) -> tuple[float, float]:
        """The numbers of captures by which a mean is divided."""
        return (float(forget), float(retain)) if self.model.accumulation == "mean" else (1.0, 1.0)

    def in_backward(self, window: Window) -> bool:
        return self.model.one_copy or window.last is not None

    def capture(self, capture: Capture) -> None:
        """Runs a capture. With `one_copy`, it leaves out those of retain, and is not empty without them."""
        reached = nested = False
        try:
            with getattr(self.buckets, capture.side)():
                for inner in capture.inner:
                    if inner == FAIL:
                        raise Failed
                    if isinstance(inner, Backward):
                        self.backward(capture.side, inner)
                        reached = True
                    elif inner.side == "forget" or not self.model.one_copy:
                        self.capture(inner)
                        nested = True
                if not (reached or nested):
                    self.backward(capture.side, ONE)
                    reached = True
        except Failed:
            self.broken |= reached
            raise
        self.captures[capture.side] += reached

    def backward(self, side: str, backward: Backward) -> None:
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

    def synthesize(self, window: Window, options: Options) -> sago.SynthesisReport:
        self.max_norm: float | None = None
        made = {k: v for k, v in options.made.items() if k not in ("groups", "reduce_gram")}
        arguments = {**made, **options.weights}
        if self.in_backward(window):
            before = self.captures["retain"], list(self.totals["retain"])
            try:
                with self.buckets.synthesize_in_backward(**arguments) as step:
                    self.captures["retain"] += 1
                    self.backward("retain", window.last or ONE)
                return step.report
            except ValueError as error:
                if self.model.one_copy or "synthesize_in_backward" not in str(error):
                    raise
                # A rule of global scope, or a group in several buffers. Nothing was written.
                assert (self.captures["retain"], self.totals["retain"]) == before
                self.check_accumulators()
                self.capture(Capture("retain", (window.last or ONE,)))
        self.max_norm = None if self.model.accumulation == "mean" else window.max_norm
        return self.buckets.synthesize_(max_norm=self.max_norm, **arguments)

    def refuse(self, options: Options) -> None:
        """No synthesis of an incomplete window."""
        rule = options.made["rule"]
        synthesis = self.buckets.synthesize_in_backward if self.model.one_copy else self.buckets.synthesize_
        with raises(ValueError, text="captured|whole"):
            synthesis(rule).__enter__()  # a report has none
        assert all(p.grad is None for p in self.params)

    def check_accumulators(self) -> None:
        for side in SIDES[:1] if self.model.one_copy else SIDES:
            found = getattr(self.buckets, f"{side}_grads")
            properties.assert_equal_bits(found, self.totals[side])
            for g, p in zip(found, self.params, strict=True):
                if g is not None:
                    assert g.data_ptr() % 16 == 0
                    assert g.stride() == p.stride()
                    assert not g.requires_grad
        assert all(p.grad is None for p in self.params)

    def check_updates(self, window: Window, options: Options, report: sago.SynthesisReport) -> None:
        forget, retain = (self.totals[side] for side in SIDES)
        updates = [p.grad for p in self.params]
        for u, p in zip(updates, self.params, strict=True):
            assert u is None or (u.dtype, u.shape, u.stride()) == (p.dtype, p.shape, p.stride())
        rule, known, mean = rule_of(options.rule), options.known, self.model.accumulation == "mean"
        groups = self.groups
        if groups is None and rule.scope != "global":
            groups = self.names
        known["groups"] = groups
        scales = tuple(1 / n for n in self.divisors(**self.captures))
        expected = oracle.expect(forget, retain, definition_of(options.rule), scales=scales, **known)
        if not expected.certain:
            return
        clipped = self.max_norm is not None
        if rule.scope == "element" and not clipped and (not mean or isinstance(options.rule, str)):
            # Every rule with a name takes a mean like weights.
            weights = {w: known[w] * s for w, s in zip(("gamma", "alpha"), scales, strict=True)}
            poisoned = [
                None if f is None and r is None else on_device(p, "cpu").fill_(torch.nan)
                for f, r, p in zip(forget, retain, self.params, strict=True)
            ]
            rule_ = options.made["rule"]
            sago.reference.synthesize_(forget, retain, rule_, out=poisoned, **known | weights)
            properties.assert_equal_bits(updates, poisoned)
        if clipped:
            expected = clip(expected, self.max_norm)
        if expected is None:
            return
        properties.assert_expected(updates, expected)
        if options.stats and not clipped:
            properties.assert_expected_report(report, expected)


def clip(expected: oracle.Expected, max_norm: float) -> oracle.Expected | None:
    """The updates, clipped to this norm. None if the norm is not known, because its terms cancel."""
    square, size = expected.sums["uu"].sum(), expected.magnitudes["uu"].sum()
    error = 4 * oracle.SUM_ERROR[torch.float32] * size / square if square > 0 else 1.0
    if error > 0.1:
        return None
    factor = min(1.0, max_norm / (np.sqrt(square) + 1e-6))
    pairs = zip(expected.updates, expected.slack, strict=True)
    slack = [None if u is None else factor * (s + 2 * error * abs(u)) for u, s in pairs]
    return expected._replace(
        updates=[None if u is None else factor * u for u in expected.updates], slack=slack
    )


TOKENS = ((0, 1), (2,), (3, 0, 1, 4), (2, 2, 2), (1, 4, 3), None, None, None)
# Most often one branch, so that windows reach different parameters.
BRANCHES_OF_A_LOSS = [b for n in (1, 1, 1, 1, 2, 3) for b in combinations(range(BRANCHES + 1), n)]
BACKWARDS = st.sampled_from([Backward(*x) for x in product(TOKENS, BRANCHES_OF_A_LOSS)])
ONE = Backward((0, 1), (0, 1))


def _draw_capture(draw: Any, side: str | None, depth: int, fails: bool = False) -> Capture:
    """A capture with some backwards, captures and failures."""
    side = side or draw(st.sampled_from(SIDES))
    inner: list[Any] = []
    for kind in draw(FAILING if fails else NESTED if depth else BACKWARD):
        if kind == "capture":
            inner.append(_draw_capture(draw, None, depth - 1, fails and depth > 1))
        else:
            inner.append(FAIL if kind == FAIL else draw(BACKWARDS))
    return Capture(side, tuple(inner))


# What is inside a capture.
B, C = "backward", "capture"
BACKWARD = st.sampled_from([(B,), (B,), (B,), (B, B), (B, B, B)])
NESTED = st.sampled_from([(B,), (C,), (B, C), (C, B), (B, C, B), (C, C), (B, B)])
FAILING = st.sampled_from([(B, FAIL), (FAIL,), (C, FAIL), (B, C, FAIL), (C,), (B, C)])


def _draw_schedule(draw: Any) -> tuple[Capture, ...]:
    """Captures of both sides and perhaps others, of which one may fail."""
    found = [_draw_capture(draw, side, 0) for side in SIDES]
    kind = draw(st.sampled_from(["two", "two", "more", "fails"]))
    if kind == "more":
        found += [_draw_capture(draw, None, 2) for _ in range(draw(st.integers(1, 2)))]
    elif kind == "fails":
        found.append(_draw_capture(draw, None, 2, fails=True))
    return tuple(draw(st.permutations(found)))


def _turned(inner: Any, by: int) -> Any:
    """The same capture or backward with other branches."""
    if isinstance(inner, Backward):
        return inner._replace(branches=tuple((b + by) % (BRANCHES + 1) for b in inner.branches))
    if isinstance(inner, Capture):
        return inner._replace(inner=tuple(_turned(x, by) for x in inner.inner))
    return inner


BUCKETS = st.sampled_from(
    list(
        product(
            ("module", "parameters", "named_parameters", "doubled"),
            (None, None, 1, 2, 3),
            (None, None, torch.float32, torch.float64),
            ("sum", "sum", "mean"),
            (256.0, 3e-4, 1e-6),
        )
    )
)


def draw_model(draw: Any) -> Model:
    dtypes = st.sampled_from(draw(st.sampled_from([*((dtype,) for dtype in DTYPES), DTYPES])))
    one_copy = draw(st.sampled_from([False, False, True]))
    positions = st.frozensets(st.integers(0, COUNT), max_size=6)
    frozen, frozen_later = draw(st.sampled_from([(0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]))

    count = draw(st.integers(0, 3))
    kind = draw(st.sampled_from([None, *KINDS]))  # branches that are alike have equally many parameters
    layers = [(kind or draw(st.sampled_from(KINDS)), draw(dtypes)) for _ in range(BRANCHES + count)]
    form, groups, accumulate_dtype, accumulation, bucket_cap_mb = draw(BUCKETS)
    return Model(
        draw(dtypes),
        tuple(layers[BRANCHES:]),
        tuple(layers[:BRANCHES]),
        draw(st.integers(0, 1000)),
        draw(positions) if frozen else frozenset(),
        draw(positions) if frozen_later else frozenset(),
        form,
        groups,
        None if one_copy else accumulate_dtype,
        accumulation,
        bucket_cap_mb,
        one_copy,
    )


ENDS = st.sampled_from(
    list(product((None, None, None, 0.1, 1e6), (False, False, False, True), (False, True)))
)


def draw_window(draw: Any, rules: st.SearchStrategy[Name], before: Sequence[Any]) -> Window:
    """A new window, or the one before it with other branches on one side or on both."""
    windows = [step for step in before if isinstance(step, Window)]
    by, sides = draw(TURNS) if windows else (0, ())
    if by:
        last = windows[-1]
        schedule = tuple(_turned(x, by) if x.side in sides else x for x in last.schedule)
        retain = last.last and _turned(last.last, by) if "retain" in sides else last.last
        return last._replace(schedule=schedule, last=retain)
    retain = draw(BACKWARDS) if draw(st.booleans()) else None
    return Window(_draw_schedule(draw), retain, lists.draw_options(draw, rules), *draw(ENDS))


TURNS = st.sampled_from([(0, ()), (0, ()), *product((1, 2, 3), (SIDES, SIDES[1:], SIDES[1:], SIDES[:1]))])
