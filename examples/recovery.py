"""The abilities that a rule leaves to a model at a level of forgetting, from the runs of a record."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Levels of the mean probability of the forget answers: those of the report, and the one at which the trials
# choose learning rates and weights.
LEVELS = (0.2, 0.1, 0.02)
CHOICE = 0.1

Run = Mapping[str, Any]
Record = Mapping[str, Any]


class Reached(NamedTuple):
    """A run at a level: the step, the seconds of training up to it, and the recovery of each ability."""

    step: int
    seconds: float
    recovery: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean recovery over the sets of facts. The text does not count."""
        return statistics.fmean(value for name, value in self.recovery.items() if name != "text")


class Entry(NamedTuple):
    """A rule with an objective at a level, with the learning rate and the weight that the trials chose.

    `seeds` has one value for each seed of the results. It is None if the run does not reach the level.
    """

    objective: str
    rule: str
    rate: float
    gamma: float
    seeds: list[Reached | None]


def abilities(run: Run) -> list[str]:
    """All sets of the run except `forget`."""
    return [name for name in run["known"] if name != "forget"]


def ability(run: Run, name: str) -> list[float]:
    """An ability at each measurement, relative to the first one.

    For facts it is the share of right answers. For text it is the inverse perplexity.
    """
    known = run["known"][name]
    if "answers" in known:
        return [value / known["answers"][0] for value in known["answers"]]
    return [math.exp(known["loss"][0] - value) for value in known["loss"]]


def at_level(run: Run, level: float) -> Reached | None:
    """The measurement from which on the mean probability of the forget answers stays at or below `level`.

    A model that forgets and then learns again has not reached the level. None if the last measurement is
    above the level, or if none is.
    """
    above = [i for i, p in enumerate(run["known"]["forget"]["probability"]) if p > level]
    if not above or above[-1] + 1 == len(run["measured"]):
        return None
    i = above[-1] + 1
    step = run["measured"][i]
    seconds = statistics.median(run["seconds"]) * step
    return Reached(step, seconds, {name: ability(run, name)[i] for name in abilities(run)})


def mean_over(seeds: Sequence[Reached | None]) -> float | None:
    """The mean recovery over the seeds.

    None if one of them does not reach the level, because the mean of the others would be too large.
    """
    there = [seen.mean for seen in seeds if seen is not None]
    return statistics.fmean(there) if len(there) == len(seeds) else None


def merit(trial: Run) -> tuple[bool, float]:
    """The larger, the better the trial.

    A trial that reaches the level `CHOICE` is better than one that does not. Among those that reach it, the
    one with the largest mean recovery there is best. Among the others, the one that forgets most is best.
    """
    seen = at_level(trial, CHOICE)
    return (False, -min(trial["known"]["forget"]["probability"])) if seen is None else (True, seen.mean)


def runs_of(record: Record, objective: str, rule: str, rate: float) -> list[Run]:
    """One run for each seed of the results. None if it is not one of the best learning rates of the rule."""
    wanted = objective, rule, rate
    return [run for run in record["runs"] if (run["objective"], run["rule"], run["rate"]) == wanted]


def entries(record: Record, level: float) -> list[Entry]:
    """One for each objective and rule of the record.

    The trials alone choose the learning rate and the weight, among those that the results have. So they are
    the same at every level.
    """
    found = []
    for objective, rule in itertools.product(record["grid"]["objectives"], record["grid"]["rules"]):
        best = max(
            (
                trial
                for trial in record["trials"]
                if (trial["objective"], trial["rule"]) == (objective, rule)
                and any(
                    run["gamma"] == trial["gamma"] for run in runs_of(record, objective, rule, trial["rate"])
                )
            ),
            key=merit,
        )
        seeds = [at_level(run, level) for run in runs_of(record, objective, rule, best["rate"])]
        found.append(Entry(objective, rule, best["rate"], best["gamma"], seeds))
    return found
