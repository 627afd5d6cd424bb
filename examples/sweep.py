"""The runs of unlearning, spread over processes."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.grid import Cell, Setup
from examples.learn import KNOWLEDGE
from examples.objectives import FORGET, RETAIN
from examples.unlearn import unlearn
from examples.world import SETS, learned, pairs

COSINES = ("cos_forget_retain", "cos_update_retain", "cos_update_forget")


def run(setup: Setup, cell: Cell, path: Path) -> dict[str, Any]:
    """Unlearns from the model at `path`. Returns what is known every `setup.every` steps, the start included,
    and the cosines of each step."""
    world, before = learned(setup, cell.seed, path)
    model = copy.deepcopy(world.model)
    steps = unlearn(
        model,
        pairs(setup, world, cell.seed),
        FORGET[cell.objective],
        RETAIN[setup.retain],
        cell.rule,
        cell.rate,
        setup.gamma,
    )
    known, seen = [before], []
    for step in steps:
        seen.append(step)
        if len(seen) % setup.every == 0:
            known.append(world.known(model))
    return {
        **cell._asdict(),
        "known": {name: _columns([k[name] for k in known], KNOWLEDGE, 4) for name in SETS},
        "cosines": _columns(seen, COSINES, 3),
    }


def _columns(
    rows: Sequence[Mapping[str, float]], names: Sequence[str], digits: int
) -> dict[str, list[float]]:
    return {name: [float(f"{row[name]:.{digits}g}") for row in rows] for name in names}


@contextmanager
def workers(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over `count` processes of one thread each, or in this process where that is 0."""
    if count == 0:
        yield map
        return
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


def bar(results: Iterator[Any], total: int, name: str, unit: str) -> Iterator[Any]:
    return tqdm(results, name, total, unit=unit, file=sys.stderr)
