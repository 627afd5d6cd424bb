"""Random programs: sequences of steps that share the caches and the memory of one process."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.fsdp  # the first buckets would import it
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from sago.backends import inductor
from sago.backends.streams import Cache
from sago.core import seen
from sago.rules import RULES
from tests.fuzz import lists, rules, windows
from tests.fuzz.lists import LARGE, Call, Lists, MakePlan, Mistake, OnLists, RunPlan, Space
from tests.fuzz.windows import Model, OnWindows, Window
from tests.support.interpreter import quick_interpreter

STATELESS = tuple(name for name, rule in RULES.items() if not rule.state)
COMPILED = ("sago", "pcgrad", "ties", "cautious")
LISTS, WINDOWS = lists.STEPS, ("window",)


class Program(NamedTuple):
    """Steps on these lists. `remembered` is the number of lists that `synthesize_` remembers."""

    lists: tuple[Lists, ...]
    remembered: int
    steps: tuple[Any, ...]


def run(program: Program, target: str) -> None:
    backend = TARGETS[target].backend
    on_lists, on_windows = OnLists(program.lists, backend), OnWindows(backend)
    actions = {
        Call: on_lists.call,
        MakePlan: on_lists.make_plan,
        RunPlan: on_lists.run_plan,
        Mistake: on_lists.mistake,
        Model: on_windows.make,
        Window: on_windows.run,
    }
    with surroundings(program.remembered, target == "compiled code"):
        for step in program.steps:
            actions[type(step)](step)


@contextmanager
def surroundings(remembered: int, compiles: bool) -> Iterator[None]:
    """New caches, so that a program does the same wherever it runs."""
    kept = {name: getattr(seen, name) for name in ("_seen", "_seen_on_cpu", "_long_on_cpu")}
    at_once = inductor.COMPILE_AT_ONCE
    try:
        for name in kept:
            setattr(seen, name, Cache(remembered))
        if compiles:
            inductor.COMPILE_AT_ONCE = inductor.COMPILE_FROM
        with quick_interpreter(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        inductor.COMPILE_AT_ONCE = at_once
        for name, cache in kept.items():
            setattr(seen, name, cache)


class Target(NamedTuple):
    """A backend, and the parts from which its programs are drawn.

    Attributes:
        backend: The argument of that name.
        space: The lists.
        rules: The names of rules.
        kinds: For each program one of these sets of steps is drawn.
        makes: Whether random rules are made.
    """

    backend: str | None
    space: Space = Space()
    rules: tuple[str, ...] = STATELESS
    kinds: tuple[tuple[str, ...], ...] = (LISTS, LISTS, LISTS, WINDOWS, (*LISTS, "window", "window"))
    makes: bool = True


TARGETS = {
    "reference": Target("reference"),
    "compiled": Target(None),
    "large": Target("compiled", Space(LARGE, 3), kinds=(LISTS,)),
    # Each combination of a rule, dtypes and kinds of weights takes a second to compile.
    "compiled code": Target(
        "compiled", Space(LARGE, 2, (torch.bfloat16, torch.float32)), COMPILED, (LISTS,), makes=False
    ),
    # A window takes tens of launches, and an interpreted launch takes tens of milliseconds.
    "triton": Target("triton", Space(length=3), kinds=(LISTS,)),
    "triton windows": Target("triton", kinds=(WINDOWS,)),
}


@st.composite
def programs(draw: Any, target: str) -> Program:
    _, space, names, kinds, makes = TARGETS[target]
    known = st.sampled_from(names)
    if makes and draw(st.integers(0, 2)) == 2:
        known |= st.just(draw(rules.made()))
    found = [lists.draw_lists(draw, space)]
    for change in draw(CHANGES):
        found.append(lists.draw_changed(draw, space, found[-1]) if change else lists.draw_lists(draw, space))
    kinds = draw(st.sampled_from(kinds))
    steps = [windows.draw_model(draw)] if "window" in kinds else []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)):
        if kind == "window":
            steps.append(windows.draw_window(draw, known, steps))
        else:
            steps.append(lists.draw_step(draw, kind, known, steps))
    return Program(tuple(found), draw(st.sampled_from([16, 2, 1])), tuple(steps))


CHANGES = st.sampled_from([(), (True,), (True,), (False,), (True, True), (True, True), (True, False)])


class Independent(HypothesisProvider):
    """Draws each program independently. By default, five of six are changes of an earlier program."""

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        """Never, because these are numbers in the sources of all modules that were imported until now."""


AVAILABLE_PROVIDERS["independent"] = f"{__name__}.Independent"

SETTINGS = settings(
    backend="independent",
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    print_blob=False,
)


class Result(NamedTuple):
    """The counts of a chunk. `failure` is None, or a text with the smallest program that fails."""

    seed: int
    chunk: int
    target: str
    cases: int
    steps: int
    seconds: float
    failure: str | None = None


def run_chunk(number: int, chunk: int, target: str, cases: int, shrinks: bool = True) -> Result:
    """Runs so many programs of this chunk. The same arguments give the same programs."""
    start, latest, counts = time.perf_counter(), [Program((), 1, ())], [0, 0]

    @seed(1_000_003 * number + chunk)
    @settings(SETTINGS, max_examples=cases, phases=[Phase.generate, *([Phase.shrink] if shrinks else [])])
    @given(programs(target))
    def check(program: Program) -> None:
        latest[0] = program
        run(program, target)
        counts[0] += 1
        counts[1] += len(program.steps)

    failure = None
    try:
        with frozen_objects():
            check()
    except Exception as error:  # the library may raise any class, and a failure includes all of them
        text = "".join(traceback.format_exception(error, limit=-12))
        failure = f"{text}\nrun({latest[0]!r}, {target!r})"
    return Result(number, chunk, target, *counts, round(time.perf_counter() - start, 3), failure)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """The first capture of a model looks through all objects that are not frozen."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
