"""The grid of the experiment: its runs, and which weight is chosen for each rule."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.recovery import merit


class Cell(NamedTuple):
    """One run of unlearning."""

    objective: str
    rule: str
    rate: float
    gamma: float
    seed: int

    def __str__(self) -> str:
        return f"{self.objective}-{self.rule}-lr{self.rate:g}-gamma{self.gamma:g}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """Every loss with every rule and learning rate.

    The trials are one run with every value in `gammas` for each of them, on the trial seed. They choose the
    `kept` best learning rates of a rule, and the weight `gamma` for each of these. The results are those of
    the other seeds. A run measures before the first step and after each step in
    `measured`, more often in the beginning, because some rules forget within a few steps. It ends after the
    last of them, or when the mean probability of the forget answers is at most `enough`.
    """

    objectives: tuple[str, ...] = ("GradDiff", "NPO", "SimNPO")
    retain: str = "NLL"
    rules: tuple[str, ...] = ("sum", "pcgrad", "pcgrad_global", "sago")
    rates: tuple[float, ...] = (2e-5, 6e-5, 1.8e-4)
    gammas: tuple[float, ...] = (0.2, 1.0, 5.0)
    kept: int = 2
    trial_seed: int = 0
    seeds: tuple[int, ...] = (1, 2)
    measured: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24)
    batch_size: int = 8
    max_norm: float = 1.0
    enough: float = 0.01

    @property
    def steps(self) -> int:
        """The number of steps of a run that does not end early."""
        return self.measured[-1]

    def trials(self) -> list[Cell]:
        """The runs that choose the weights and the learning rates."""
        grid = itertools.product(self.objectives, self.rules, self.rates, self.gammas)
        return [Cell(*cell, self.trial_seed) for cell in grid]

    def final(self, gammas: Mapping[tuple[str, str, float], float]) -> list[Cell]:
        """The runs of the results. `gammas` has the weight of each loss, rule and learning rate."""
        return [Cell(*key, gamma, seed) for seed in self.seeds for key, gamma in gammas.items()]

    def chosen(self, trials: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, float], float]:
        """The weight of each loss and rule with each of its best learning rates, by `merit`."""
        found = {}
        for objective, rule in itertools.product(self.objectives, self.rules):
            best = []
            for rate in self.rates:
                key = objective, rule, rate
                runs = [run for run in trials if (run["objective"], run["rule"], run["rate"]) == key]
                best.append(max(runs, key=merit))
            best.sort(key=merit, reverse=True)
            kept = sorted(best[: self.kept], key=lambda run: run["rate"])
            found.update({(objective, rule, run["rate"]): run["gamma"] for run in kept})
        return found

    def __str__(self) -> str:
        kept = min(self.kept, len(self.rates))
        runs = len(self.objectives) * len(self.rules) * kept * len(self.seeds)
        return (
            f"{len(self.objectives)} forget losses x {len(self.rules)} rules\n"
            f"{len(self.trials())} trials with seed {self.trial_seed}: {len(self.rates)} learning rates x "
            f"{len(self.gammas)} weights gamma\n"
            f"{runs} runs with other seeds give the results: the {kept} best learning rates of each rule\n"
            f"A run has at most {self.steps} steps of AdamW with {self.batch_size} facts to forget and to "
            "retain.\n"
            f"The norm of the update is clipped to {self.max_norm:g}, the retain loss is {self.retain}, and "
            "alpha = 1."
        )
