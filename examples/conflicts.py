"""Draws the conflicts of two gradients in a pretrained language model: `python -m examples.conflicts`.

The model forgets the capitals of some countries. Draws the conflicts of the first step by layer and kind of
parameter, and those of all steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import sago
from examples.grid import Grid
from examples.losses import OfAnswers
from examples.objectives import FORGET
from examples.worlds.choose import WORLDS, kind_of
from examples.worlds.smollm import Unavailable
from examples.worlds.world import World

SEED = 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.conflicts", description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=WORLDS, default="capitals")
    parser.add_argument("--objective", choices=FORGET, default="GradDiff", help="the forget loss")
    parser.add_argument("--rule", choices=sago.list_rules(), default="sago")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/conflicts"), help="folder for the pictures")
    return parser.parse_args(argv)


def monitored(
    world: World, grid: Grid, objective: str, rule: str, steps: int
) -> sago.monitor.ConflictMonitor:
    """The reports of some steps, which train the model of the world."""
    model, losses = world.model, OfAnswers(objective, grid.retain)
    frozen = copy.deepcopy(model).requires_grad_(False) if losses.compares else None
    buckets = sago.GradientBuckets(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=grid.rates[0])
    monitor = sago.monitor.ConflictMonitor()
    batches = world.batches(steps, grid.batch_size, SEED)
    for forget, retain in tqdm(batches, rule, steps, unit="step", file=sys.stderr):
        with buckets.forget():
            losses.forget_loss(model, frozen, forget).backward()
        with buckets.retain():
            losses.retain_loss(model, frozen, retain).backward()
        monitor.add(buckets.synthesize_(rule, max_norm=grid.max_norm))
        optimizer.step()
        buckets.zero_()
    return monitor


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    kind, grid = kind_of(args.world)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        kind.prepare(args.out, SEED)
    except Unavailable as error:
        print(f"{error}\nThe world of invented people needs no download: --world people", file=sys.stderr)
        return 1
    monitor = monitored(kind.open(args.out, SEED), grid, args.objective, args.rule, args.steps)
    first = monitor.reports[0]
    print(first.total().table())
    first.plot(args.out / "conflicts.png")
    monitor.plot(args.out / "steps.png")
    print(f"Written: {args.out / 'conflicts.png'}, {args.out / 'steps.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
