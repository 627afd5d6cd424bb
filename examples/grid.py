"""The grid of the experiment: its runs, and which weight is chosen for each rule."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.recovery import LEVELS, at_level, mean_recovery


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

    The weight `gamma` is chosen for each of them by one run with every value in `gammas` on the trial seed.
    The results are those of the other seeds. A run measures before the first step and after each step in
    `measured`, more often in the beginning, because some rules forget within a few steps. It ends after the
    last of them, or when the mean probability of the forget answers is at most `enough`.
    """

    objectives: tuple[str, ...] = ("GradDiff", "NPO", "SimNPO")
    retain: str = "NLL"
    rules: tuple[str, ...] = ("sum", "pcgrad", "pcgrad_global", "sago")
    rates: tuple[float, ...] = (2e-5, 6e-5, 1.8e-4)
    gammas: tuple[float, ...] = (0.2, 1.0, 5.0)
    trial_seed: int = 0
    seeds: tuple[int, ...] = (1, 2)
    measured: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24)
    batch_size: int = 8
    max_norm: float = 1.0
    enough: float = 0.01

    @property
    def steps(self) -> int:
        """Of a run that does not end early."""
        return self.measured[-1]

    def trials(self) -> list[Cell]:
        """The runs that choose the weights."""
        grid = itertools.product(self.objectives, self.rules, self.rates, self.gammas)
        return [Cell(*cell, self.trial_seed) for cell in grid]

    def final(self, gammas: Mapping[tuple[str, str, float], float]) -> list[Cell]:
        """The runs of the results. `gammas` has the weight of each loss, rule and learning rate."""
        return [Cell(*key, gamma, seed) for seed in self.seeds for key, gamma in gammas.items()]

    def chosen(self, trials: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, float], float]:
        """The weight of each loss, rule and learning rate.

        Among the trials that reach the first level of forgetting, it is the weight with the largest mean
        recovery over all abilities there. If no trial reaches the level, it is the weight that forgets most.
        """
        best = {}
        for key in self._keys():
            runs = [run for run in trials if (run["objective"], run["rule"], run["rate"]) == key]
            best[key] = max(runs, key=self._score)["gamma"]
        return best

    def _keys(self) -> list[tuple[str, str, float]]:
        return list(itertools.product(self.objectives, self.rules, self.rates))

    def _score(self, run: Mapping[str, Any]) -> tuple[bool, float]:
        seen = at_level(run, LEVELS[0])
        if seen is None:
            return False, -min(run["known"]["forget"]["probability"])
        return True, mean_recovery(seen)

    def __str__(self) -> str:
        cells, weights, size = len(self._keys()), len(self.gammas), self.batch_size
        losses, rules, rates = (len(part) for part in (self.objectives, self.rules, self.rates))
        return (
            f"{losses} forget losses x {rules} rules x {rates} learning rates\n"
            f"{cells * weights} trials with seed {self.trial_seed} choose one of {weights} weights gamma\n"
            f"{cells * len(self.seeds)} runs with other seeds give the results\n"
            f"A run has at most {self.steps} steps of AdamW with {size} facts to forget and to retain.\n"
            f"The norm of the update is clipped to {self.max_norm:g}, the retain loss is {self.retain}, and "
            "alpha = 1."
        )
