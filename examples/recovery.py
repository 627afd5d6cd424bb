"""What a rule leaves of a model's abilities at a level of forgetting, from the record of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Of the mean probability of the forget answers: where few of them are still right, and further down.
LEVELS = (0.2, 0.05)
ABILITIES = ("general", "retain")
# A share of what `sum` loses says nothing where that is hardly more than one answer.
LEAST = 0.02


class Entry(NamedTuple):
    """A rule with an objective at a level, over the `seeds` that reach it.

    `rate`: the smallest learning rate with which most seeds do, chosen by forgetting alone. `step`: where,
    the mean. `recovery`, for each of `ABILITIES`: answers right there over answers right before unlearning,
    mean and standard deviation. `regained`: `1 - (1 - recovery) / (1 - recovery of sum)` from the means, the
    share of what `sum` loses that the rule does not lose; absent where `sum` loses less than `LEAST`.
    """

    objective: str
    rule: str
    rate: float
    seeds: int
    step: float
    recovery: dict[str, tuple[float, float]]
    regained: dict[str, float]


def at_level(run: Mapping[str, Any], level: float, every: int) -> dict[str, float] | None:
    """Where the probability of the forget answers is first at or below `level`, by linear interpolation
    between two measurements: `step`, and the recovery of each of `ABILITIES`. None where it never is."""
    known = run["known"]
    forget = known["forget"]["probability"]
    after = next((i for i, p in enumerate(forget) if p <= level), 0)
    if after == 0:
        return None
    before = after - 1
    share = (forget[before] - level) / (forget[before] - forget[after])

    def between(values: Sequence[float]) -> float:
        return values[before] + share * (values[after] - values[before])

    right = {name: known[name]["answers"] for name in ABILITIES}
    return {
        "step": (before + share) * every,
        **{name: between(values) / values[0] for name, values in right.items()},
    }


def entries(record: Mapping[str, Any], level: float) -> list[Entry]:
    """One for each objective and rule of the record."""
    setup = record["setup"]
    found = []
    for objective in setup["objectives"]:
        rows = [_entry(record, objective, rule, level) for rule in setup["rules"]]
        lost = {name: 1 - row.recovery[name][0] for row in rows if row.rule == "sum" for name in row.recovery}
        for row in rows:
            regained = {
                name: 1 - (1 - mean) / lost[name]
                for name, (mean, _) in row.recovery.items()
                if row.rule != "sum" and lost.get(name, 0.0) >= LEAST
            }
            found.append(row._replace(regained=regained))
    return found


def runs_of(record: Mapping[str, Any], objective: str, rule: str, rate: float) -> list[Mapping[str, Any]]:
    """One run a seed."""
    wanted = objective, rule, rate
    return [run for run in record["runs"] if (run["objective"], run["rule"], run["rate"]) == wanted]


def _entry(record: Mapping[str, Any], objective: str, rule: str, level: float) -> Entry:
    """A result without `regained`. If no seed reaches the level, it has no recovery either."""
    every = record["setup"]["every"]
    reached: dict[float, list[dict[str, float]]] = {rate: [] for rate in sorted(record["setup"]["rates"])}
    for run in record["runs"]:
        if (run["objective"], run["rule"]) == (objective, rule):
            seen = at_level(run, level, every)
            reached[run["rate"]] += [] if seen is None else [seen]
    rate = max(reached, key=lambda rate: len(reached[rate]))  # the first of equals
    rows = reached[rate]
    if not rows:
        return Entry(objective, rule, rate, 0, 0.0, {}, {})
    values = {name: [row[name] for row in rows] for name in ("step", *ABILITIES)}
    recovery = {
        name: (statistics.fmean(values[name]), statistics.stdev(values[name]) if len(rows) > 1 else 0.0)
        for name in ABILITIES
    }
    return Entry(objective, rule, rate, len(rows), statistics.fmean(values["step"]), recovery, {})
