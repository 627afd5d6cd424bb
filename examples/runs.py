"""The runs of unlearning, spread over processes, each of which is written to a file."""

from __future__ import annotations

import copy
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import write_json
from examples.grid import Cell, Grid
from examples.losses import OfAnswers
from examples.unlearn import unlearn
from examples.worlds import Kind
from examples.worlds.world import Known, World

# What is recorded of each step.
STEP = ("cos_forget_retain", "cos_update_retain", "cos_update_forget", "conflict_fraction")


@lru_cache(maxsize=1)
def opened(kind: Kind, folder: Path, seed: int) -> tuple[World, Known, dict[str, float]]:
    """The world of a seed, and what its model knows before unlearning."""
    world = kind.open(folder, seed)
    return world, world.known(world.model), world.choices(world.model)


def described(kind: Kind, folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Prepares the world of each seed. Returns what its model and a random model know before unlearning."""
    rows = []
    for seed in tqdm(seeds, "preparing", unit="world", file=sys.stderr):
        kind.prepare(folder, seed)
        world, known, choices = opened(kind, folder, seed)
        torch.manual_seed(seed)
        random = type(world.model)(world.model.config).eval()
        rows.append(
            {
                "seed": seed,
                "parameters": sum(p.numel() for p in world.model.parameters()),
                "facts": {name: len(facts) for name, facts in world.facts.items()},
                "known": {name: _rounded(values) for name, values in known.items()},
                "choices": _rounded(choices),
                "random": _rounded(world.choices(random)),
            }
        )
    return rows


def run(
    kind: Kind, folder: Path, grid: Grid, cell: Cell, prompts: Sequence[str] = (), progress: bool = False
) -> dict[str, Any]:
    """Unlearns from the model of the cell's seed.

    Returns what is known before the first step and after the steps in `measured`, and the cosines and seconds
    of each step. If there are `prompts`, also their completions and the right choices after the last step.
    """
    world, before, _ = opened(kind, folder, cell.seed)
    model = copy.deepcopy(world.model)
    steps = unlearn(
        model,
        OfAnswers(cell.objective, grid.retain),
        world.batches(grid.steps, grid.batch_size, cell.seed),
        cell.rule,
        cell.rate,
        cell.gamma,
        max_norm=grid.max_norm,
    )
    known, measured, seen = [before], [0], []
    bar = tqdm(steps, cell.rule, grid.steps, unit="step", file=sys.stderr, disable=not progress)
    for step in bar:
        seen.append(step)
        if len(seen) in grid.measured:
            known.append(world.known(model))
            measured.append(len(seen))
            if known[-1]["forget"]["probability"] <= grid.enough:
                break
    found = {
        **cell._asdict(),
        "measured": measured,
        "known": {name: _columns([k[name] for k in known], 4) for name in before},
        "steps": _columns([{name: step[name] for name in STEP} for step in seen], 3),
        "seconds": [float(f"{step['seconds']:.3g}") for step in seen],
    }
    if prompts:
        found["completions"] = [world.complete(model, prompt) for prompt in prompts]
        found["choices"] = _rounded(world.choices(model))
    return found


def first_steps(
    kind: Kind, folder: Path, grid: Grid, seed: int, retain_floor: float, count: int = 1
) -> dict[str, Any]:
    """The norms, the cosine of update and forget gradient, and the share of conflicts in the first steps of
    `sago` with NPO and the KL divergence to the start model, whose gradient is rounding noise in step 1."""
    world, _, _ = opened(kind, folder, seed)
    losses, batches = OfAnswers("NPO", "KL"), world.batches(count, grid.batch_size, seed)
    model = copy.deepcopy(world.model)
    steps = list(unlearn(model, losses, batches, "sago", grid.rates[0], retain_floor=retain_floor))
    names = ("norm_forget", "norm_retain", "conflict_fraction", "cos_update_forget")
    return {
        "retain_floor": retain_floor,
        **_columns([{name: step[name] for name in names} for step in steps], 3),
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _columns(rows: Sequence[Mapping[str, float]], digits: int) -> dict[str, list[float]]:
    return {name: [float(f"{row[name]:.{digits}g}") for row in rows] for name in rows[0]}


def completed(
    kind: Kind, folder: Path, grid: Grid, cells: Sequence[Cell], workers: int, name: str
) -> list[dict[str, Any]]:
    """The results of all cells, in order. Reads those that `folder` has, and writes the others to it.

    `workers` processes of one thread each make the runs. If it is 0, this process makes them.
    """
    paths = {cell: folder / "runs" / f"{cell}.json" for cell in cells}
    missing = [cell for cell, path in paths.items() if not path.exists()]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    options = [kind] * len(missing), [folder] * len(missing), [grid] * len(missing), missing
    for cell, found in zip(missing, _bar(_map(run, options, workers), len(missing), name), strict=True):
        write_json(paths[cell], found)
    return [json.loads(path.read_text()) for path in paths.values()]


def _map(function: Any, columns: Sequence[Sequence[Any]], workers: int) -> Iterator[Any]:
    if workers == 0:
        yield from map(function, *columns)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, *columns)


def _bar(results: Iterator[Any], total: int, name: str) -> Iterator[Any]:
    return tqdm(results, name, total, unit="run", file=sys.stderr)
