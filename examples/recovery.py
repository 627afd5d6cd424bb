"""The abilities that a rule leaves to a model at a level of forgetting, from the runs of a record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Of the mean probability of the forget answers: those of the tables, and the one at which weights and
# learning rates are chosen.
LEVELS = (0.2, 0.1, 0.02)
CHOICE = 0.1

Run = Mapping[str, Any]
Record = Mapping[str, Any]


class Reached(NamedTuple):
    """A run at the point where it reaches a level: the step, the seconds of training up to it, and the
    recovery of each ability."""

    step: float
    seconds: float
    recovery: dict[str, float]


class Entry(NamedTuple):
    """A rule with an objective at a level, over the `seeds` that reach it.

    `rate` is the learning rate with which most seeds reach it, and among equal ones the rate with the largest
    mean recovery on the trial seed. `step` and `seconds` are means. `recovery` has the mean and the standard
    deviation of each ability; it is empty if no seed reaches the level.
    """

    objective: str
    rule: str
    rate: float
    gamma: float
    seeds: int
    step: float
    seconds: float
    recovery: dict[str, tuple[float, float]]


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
    """The point where the mean probability of the forget answers first falls to `level`.

    It lies between two measurements, by linear interpolation. None if the run does not reach the level after
    the first measurement.
    """
    forget = run["known"]["forget"]["probability"]
    after = next((i for i, p in enumerate(forget) if p <= level), 0)
    if after == 0:
        return None
    before = after - 1
    share = (forget[before] - level) / (forget[before] - forget[after])

    def between(values: Sequence[float]) -> float:
        return values[before] + share * (values[after] - values[before])

    step = between(run["measured"])
    seconds = statistics.median(run["seconds"]) * step
    return Reached(step, seconds, {name: between(ability(run, name)) for name in abilities(run)})


def mean_recovery(reached: Reached) -> float:
    return statistics.fmean(reached.recovery.values())


def runs_of(record: Record, objective: str, rule: str, rate: float) -> list[Run]:
    """One run for each seed of the results. None if it is not one of the best learning rates of the rule."""
    wanted = objective, rule, rate
    return [run for run in record["runs"] if (run["objective"], run["rule"], run["rate"]) == wanted]


def entries(record: Record, level: float) -> list[Entry]:
    """One for each objective and rule of the record."""
    grid = record["grid"]
    return [
        _entry(record, objective, rule, level) for objective in grid["objectives"] for rule in grid["rules"]
    ]


def _entry(record: Record, objective: str, rule: str, level: float) -> Entry:
    def reached(runs: Sequence[Run]) -> list[Reached]:
        return [seen for run in runs if (seen := at_level(run, level)) is not None]

    def merit(rate: float) -> tuple[int, float]:
        runs = runs_of(record, objective, rule, rate)
        trials = [
            trial
            for trial in record["trials"]
            if (trial["objective"], trial["rule"], trial["rate"]) == (objective, rule, rate)
            and trial["gamma"] == runs[0]["gamma"]
        ]
        return len(reached(runs)), max((mean_recovery(seen) for seen in reached(trials)), default=-1.0)

    rate = max(
        (rate for rate in record["grid"]["rates"] if runs_of(record, objective, rule, rate)), key=merit
    )
    runs = runs_of(record, objective, rule, rate)
    rows, gamma = reached(runs), runs[0]["gamma"]
    if not rows:
        return Entry(objective, rule, rate, gamma, 0, 0.0, 0.0, {})
    recovery = {}
    for name in rows[0].recovery:
        values = [row.recovery[name] for row in rows]
        recovery[name] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    step, seconds = (statistics.fmean(getattr(row, name) for row in rows) for name in ("step", "seconds"))
    return Entry(objective, rule, rate, gamma, len(rows), step, seconds, recovery)
