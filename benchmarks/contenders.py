"""What is timed: the entry points of sago, what people write instead, and the ceiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import sago
from benchmarks import peers
from benchmarks.gradients import ALPHA, GAMMA, Gradients, Prepared, Tensors
from benchmarks.released import released

# Tolerances by dtype, of `Gradients.check`; 0 asks for the same bits.
EXACT = {torch.bfloat16: 0.0, torch.float32: 0.0}
# The coefficient may differ in its last bits, and the update be rounded the other way: one step of bf16 is
# 2^-7 of its value.
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-22}
# Every step is rounded, and in the released code so are products before they are summed.
STEPWISE = {torch.bfloat16: 2**-6, torch.float32: 2**-20}

Update = Callable[[Tensors, Tensors, float, float], Tensors]
ENTRIES = ("synthesize_", "Plan", "GradientBuckets")
CEILING = "torch.add, flat"


class Contender(NamedTuple):
    """`prepare(gradients)` gives what is called once a round.

    Attributes:
        stats: Whether it takes statistics; None for those that know none.
        mode: "eager" or "graph", a CUDA graph.
        passes: Over one gradient, that the rule has to read or write at the least.
        compiles: Whether its first call runs torch.compile.
    """

    name: str
    rule: str
    prepare: Callable[[Gradients], Prepared]
    tolerance: dict[torch.dtype, float]
    stats: bool | None = None
    mode: str = "eager"
    in_place: bool = True
    passes: int = 3
    compiles: bool = False

    @property
    def label(self) -> str:
        stats = {None: "", False: ", no statistics", True: ", statistics"}[self.stats]
        return f"{self.name} {self.rule}{stats}{', graph' if self.mode == 'graph' else ''}"


def passes(rule: str) -> int:
    """Reads of f and r and the write of the update; a second read for the inner products of a rule."""
    return 3 if rule in ("add", "sum", "sago", "sago_prefer_retain") else 5


def ours(
    rule: str, stats: bool, entry: str = "synthesize_", mode: str = "eager", name: str | None = None
) -> Contender:
    """`sago.synthesize_` on lists, `sago.Plan` or `sago.GradientBuckets`."""
    prepare = {"synthesize_": _list, "Plan": _plan, "GradientBuckets": _buckets}[entry]
    make = partial(prepare, rule=rule, stats=stats)
    return Contender(
        name or f"sago.{entry}",
        rule,
        partial(_graph, make) if mode == "graph" else make,
        EXACT if passes(rule) == 3 else ROUNDING,
        stats,
        mode,
        passes=passes(rule),
    )


def peer(
    name: str,
    rule: str,
    update: Update,
    tolerance: dict[torch.dtype, float] = EXACT,
    in_place: bool = True,
    flat: bool = False,
) -> Contender:
    """A function of lists, or of the flat buffers that they lie in."""
    prepare = partial(_function, update, flat)
    return Contender(name, rule, prepare, tolerance, in_place=in_place, passes=passes(rule))


def compiled_peer(
    name: str, rule: str, make: Callable[[], Update], in_place: bool = True, flat: bool = False
) -> Contender:
    """A peer that `make` compiles, anew whenever it is prepared."""

    def prepare(gradients: Gradients) -> Prepared:
        return _function(make(), flat, gradients)

    tolerance = EXACT if rule == "sago" else STEPWISE  # which sums it takes, and how, is left to the compiler
    return Contender(name, rule, prepare, tolerance, None, "eager", in_place, passes(rule), compiles=True)


def ceiling() -> list[Contender]:
    """Two reads and a write of the same bytes."""
    return [
        peer(CEILING, "add", peers.add_, flat=True),
        peer("torch.add, foreach", "add", peers.foreach_add_),
    ]


def others(rule: str, compile_lists: bool) -> list[Contender]:
    """The peers that have `rule`."""
    found = [peer("released", rule, partial(_released, rule), EXACT if rule == "sago" else STEPWISE, False)]
    if rule == "sago":
        found.append(peer("torch.where", rule, peers.where, in_place=False))
    if rule in peers.FOREACH:
        found.append(peer("foreach", rule, peers.FOREACH[rule], EXACT if rule == "sago" else STEPWISE))
    if rule in ("sum", "sago"):
        flat = partial(peers.compiled, peers.FORMULAS[rule])
        found.append(compiled_peer("torch.compile, flat", rule, flat, flat=True))
    if rule in peers.FORMULAS and compile_lists:
        whole = partial(peers.compiled_list, peers.FORMULAS[rule])
        found.append(compiled_peer("torch.compile, list", rule, whole))
    return found


def _released(rule: str, forget: Tensors, retain: Tensors, gamma: float, alpha: float) -> Tensors:
    return released(forget, retain, rule, gamma, alpha)


def _function(update: Update, flat: bool, gradients: Gradients) -> Prepared:
    g = gradients
    if not flat:
        return Prepared(lambda: update(g.forget, g.retain, GAMMA, ALPHA), g.restore)

    def run() -> Tensors:
        update(g.flat_forget, g.flat_retain, GAMMA, ALPHA)
        return g.retain

    return Prepared(run, g.restore)


def _list(gradients: Gradients, rule: str, stats: bool) -> Prepared:
    def run() -> Tensors:
        sago.synthesize_(gradients.forget, gradients.retain, rule, GAMMA, ALPHA, stats=stats)
        return gradients.retain

    return Prepared(run, gradients.restore)


def _plan(gradients: Gradients, rule: str, stats: bool) -> Prepared:
    plan = sago.Plan(gradients.forget, gradients.retain, rule, stats=stats)

    def run() -> Tensors:
        plan.synthesize_(GAMMA, ALPHA)
        return gradients.retain

    return Prepared(run, gradients.restore)


def _buckets(gradients: Gradients, rule: str, stats: bool) -> Prepared:
    def run() -> Tensors:
        gradients.buckets.synthesize_(rule, GAMMA, ALPHA, stats=stats)
        return gradients.retain

    return Prepared(run, gradients.restore_buckets)


def _graph(make: Callable[[Gradients], Prepared], gradients: Gradients) -> Prepared:
    """The call captured in a CUDA graph, to be replayed on the same memory."""
    prepared = make(gradients)
    stream = torch.cuda.Stream()
    prepared.restore()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call makes is not captured
        prepared.run()
    torch.cuda.current_stream().wait_stream(stream)
    prepared.restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()

    def run() -> Tensors:
        graph.replay()
        return gradients.retain

    return Prepared(run, prepared.restore, keeps=prepared)  # a replay needs its plan
