"""The contenders that are timed: the entry points of sago, their peers, and the ceiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import sago
from benchmarks import peers
from benchmarks.gradients import ALPHA, GAMMA, Gradients, Prepared, Tensors
from benchmarks.released import released

# Tolerances of `Gradients.check`, by dtype. A tolerance of 0 asks for the same bits.
EXACT = {torch.bfloat16: 0.0, torch.float32: 0.0}
# The coefficient may differ in its last bits, so that the update may be rounded the other way. One step of
# bf16 is 2^-7 of its value.
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-22}
# Peers round every step, and the released code also rounds products before it sums them.
STEPWISE = {torch.bfloat16: 2**-6, torch.float32: 2**-20}

ENTRIES = ("synthesize_", "Plan", "GradientBuckets")
CEILING = "torch.add, flat"


class Contender(NamedTuple):
    """`prepare(gradients)` returns the call that is timed once a round.

    Attributes:
        stats: Whether the call takes statistics. None for peers, which have none.
        mode: "eager", or "graph" for a CUDA graph.
        passes: The least number of passes over one gradient that the rule reads or writes.
        compiles: Whether the first call runs torch.compile.
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
    """Counts the reads of f and r and the write of the update. Inner products take a second read."""
    return 3 if rule in ("add", "sum", "sago", "sago_prefer_retain") else 5


def ours(
    rule: str, stats: bool, entry: str = "synthesize_", mode: str = "eager", name: str | None = None
) -> Contender:
    """`sago.synthesize_` on lists, `sago.Plan` or `sago.GradientBuckets`."""
    make = partial(_entry, entry=entry, rule=rule, stats=stats)
    prepare = partial(_graph, make) if mode == "graph" else make
    tolerance = EXACT if passes(rule) == 3 else ROUNDING
    return Contender(name or f"sago.{entry}", rule, prepare, tolerance, stats, mode, True, passes(rule))


def peer(
    name: str, rule: str, update: Any, in_place: bool = True, flat: bool = False, compiles: bool = False
) -> Contender:
    """Makes a contender of a function of lists, or of the flat buffers that hold them.

    If it compiles, `update` makes the function, and is called whenever the contender is prepared.
    """

    def prepare(gradients: Gradients) -> Prepared:
        g, function = gradients, update() if compiles else update
        if not flat:
            return Prepared(lambda: function(g.forget, g.retain, GAMMA, ALPHA), g.restore)
        return _in_place(g, partial(function, g.flat_forget, g.flat_retain, GAMMA, ALPHA), g.restore)

    tolerance = EXACT if rule in ("add", "sago") else STEPWISE
    return Contender(name, rule, prepare, tolerance, None, "eager", in_place, passes(rule), compiles)


def ceiling() -> list[Contender]:
    """Returns the contenders that read and write the same bytes with one addition."""
    flat = peer(CEILING, "add", peers.add_, flat=True)
    return [flat, peer("torch.add, foreach", "add", peers.foreach_add_)]


def others(rule: str, compile_lists: bool) -> list[Contender]:
    """Returns the peers that implement `rule`."""
    found = [peer("released", rule, lambda f, r, *weights: released(f, r, rule, *weights), in_place=False)]
    if rule == "sago":
        found.append(peer("torch.where", rule, peers.where, in_place=False))
    if rule in peers.FOREACH:
        found.append(peer("foreach", rule, peers.FOREACH[rule]))
    if rule in ("sum", "sago"):
        each = partial(peers.compiled, peers.FORMULAS[rule])
        found.append(peer("torch.compile, flat", rule, each, flat=True, compiles=True))
    if rule in peers.FORMULAS and compile_lists:
        whole = partial(peers.compiled_list, peers.FORMULAS[rule])
        found.append(peer("torch.compile, list", rule, whole, compiles=True))
    return found


def _entry(gradients: Gradients, entry: str, rule: str, stats: bool) -> Prepared:
    g = gradients
    if entry == "GradientBuckets":
        call: Callable[[], Any] = partial(g.buckets.synthesize_, rule, GAMMA, ALPHA, stats=stats)
        return _in_place(g, call, g.restore_buckets)
    if entry == "Plan":
        call = partial(sago.Plan(g.forget, g.retain, rule, stats=stats).synthesize_, GAMMA, ALPHA)
    else:
        call = partial(sago.synthesize_, g.forget, g.retain, rule, GAMMA, ALPHA, stats=stats)
    return _in_place(g, call, g.restore)


def _in_place(gradients: Gradients, call: Callable[[], Any], restore: Callable[[], None]) -> Prepared:
    def run() -> Tensors:
        call()
        return gradients.retain

    return Prepared(run, restore)


def _graph(make: Callable[[Gradients], Prepared], gradients: Gradients) -> Prepared:
    """Captures the call in a CUDA graph, which is replayed on the same memory."""
    prepared = make(gradients)
    stream = torch.cuda.Stream()
    prepared.restore()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations of a first call are not captured
        prepared.run()
    torch.cuda.current_stream().wait_stream(stream)
    prepared.restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()

    replay = _in_place(gradients, graph.replay, prepared.restore)
    replay.keeps = prepared  # a replay needs the plan alive
    return replay
