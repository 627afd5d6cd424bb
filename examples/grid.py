"""The sizes and the grid of the experiment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """One run of unlearning."""

    objective: str
    rule: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Setup:
    """Sizes and grid. A world and its model depend on the first block and a seed."""

    people: int = 60
    islands: int = 20
    digits: int = 9
    vocab: int = 1024
    hidden: int = 128
    layers: int = 2
    train_steps: int = 450
    train_lr: float = 3e-3

    objectives: tuple[str, ...] = ("GradDiff", "NPO", "SimNPO")
    retain: str = "NLL"
    rules: tuple[str, ...] = ("sum", "pcgrad", "pcgrad_global", "sago")
    rates: tuple[float, ...] = (4e-4, 7e-4, 1.2e-3)
    gamma: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    every: int = 5
    batch_size: int = 12

    def cells(self) -> list[Cell]:
        """The runs of a seed are neighbours, so that a process reads its model once."""
        grid = itertools.product(self.seeds, self.objectives, self.rules, self.rates)
        return [Cell(objective, rule, rate, seed) for seed, objective, rule, rate in grid]

    def __str__(self) -> str:
        return (
            f"{len(self.objectives)} forget losses x {len(self.rules)} rules x {len(self.rates)} learning "
            f"rates x {len(self.seeds)} seeds = {len(self.cells())} runs\n"
            f"each {self.steps} steps of AdamW, {self.batch_size} facts to forget and {self.batch_size} to "
            f"retain a step, retain loss {self.retain}, gamma = {self.gamma:g}, alpha = 1"
        )


QUICK = Setup(
    people=10,
    islands=4,
    digits=3,
    vocab=512,
    hidden=64,
    layers=1,
    train_steps=300,
    train_lr=1e-2,
    rates=(3e-3,),
    seeds=(0, 1),
    steps=12,
    every=4,
)
