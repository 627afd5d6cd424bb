"""Describes the record of an experiment as text. `docs/experiment.md` contains these tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.measure import table
from examples.recovery import (
    CHOICE,
    LEVELS,
    Reached,
    Record,
    abilities,
    at_level,
    entries,
    mean_over,
    runs_of,
)

SAFE = ("pcgrad", "pcgrad_global", "sago")  # the rules that promise <u, r> >= 0
FRONT = 0.2  # the level in README.md

DEFINITION = f"""\
Recovery is the number of right answers at a level divided by the number before unlearning. For text it is the
perplexity before divided by the perplexity at the level. A run is at a level at the first measurement from
which on the mean probability of a forget answer stays at or below it. "mean" is the mean recovery over the
sets of facts, and is given if all seeds reach the level. The columns after it have one value for each seed,
and "-" for a seed that does not reach the level. The trials chose lr and gamma once, at {CHOICE:g}.
Seconds are those of training, without the measurements."""


def worlds_told(record: Record) -> str:
    """The facts, and what the model and a random model know of them: means over the seeds."""
    worlds, rows = record["worlds"], []
    for name, count in worlds[0]["facts"].items():
        known = [world["known"][name] for world in worlds]
        row = {
            "set": name,
            "facts": str(count),
            "right": f"{statistics.fmean(values['answers'] for values in known):.0%}",
            "probability": f"{statistics.fmean(values['probability'] for values in known):.2f}",
        }
        for column, key in (("of four", "choices"), ("of four, random model", "random")):
            shares = [world[key][name] for world in worlds if name in world[key]]
            row[column] = f"{statistics.fmean(shares):.0%}" if shares else ""
        rows.append(row)
    counts = [
        (round(share * world["facts"][name]), world["facts"][name])
        for world in worlds
        for name, share in world["random"].items()
    ]
    told = table(rows, list(rows[0]))
    if not counts:
        return told
    right, total = (sum(column) for column in zip(*counts, strict=True))
    chance = f"25% ± {(0.25 * 0.75 / total) ** 0.5:.1%}"
    return f"{told}\n\nRandom models, all sets: {right} of {total} ({right / total:.1%}). Chance: {chance}."


def promises_told(record: Record) -> str:
    """The least cosine of update and retain gradient over all steps of all runs, trials included."""
    rows, failed = [], broken(record)
    for rule in record["grid"]["rules"]:
        kept = [
            value
            for run in (*record["trials"], *record["runs"])
            if run["rule"] == rule
            for value in run["steps"]["cos_update_retain"]
        ]
        rows.append(
            {
                "rule": rule,
                "steps": len(kept),
                "cos(u,r) < 0": f"{sum(value < 0 for value in kept) / len(kept):.0%}",
                "least cos(u,r)": f"{min(kept):+.3f}",
                "promise": "none" if rule not in SAFE else "BROKEN" if rule in failed else "kept",
            }
        )
    return table(rows, list(rows[0]))


def equal_told(record: Record) -> str:
    """The rules at the same learning rate and weight: the trials with the middle one of each.

    The cosines are means over the first steps, as many as all rules of a loss have.
    """
    grid, rows = record["grid"], []
    rate, gamma = (sorted(values)[len(values) // 2] for values in (grid["rates"], grid["gammas"]))
    trials = [run for run in record["trials"] if (run["rate"], run["gamma"]) == (rate, gamma)]
    for run in trials:
        common = min(len(other["seconds"]) for other in trials if other["objective"] == run["objective"])
        row = {"loss": run["objective"], "rule": run["rule"]}
        seen = at_level(run, FRONT)
        row[f"steps to {FRONT:g}"] = "-" if seen is None else str(seen.step)
        for name in abilities(run):
            row[name] = "-" if seen is None else f"{seen.recovery[name]:.0%}"
        row["first steps"] = f"1 to {common}"
        for label, name in (
            ("cos(f,r)", "cos_forget_retain"),
            ("cos(u,f)", "cos_update_forget"),
            ("cos(u,r)", "cos_update_retain"),
        ):
            row[label] = f"{statistics.fmean(run['steps'][name][:common]):+.2f}"
        rows.append(row)
    return f"lr {rate:g}, gamma {gamma:g}, seed {grid['trial_seed']}\n\n{table(rows, list(rows[0]))}"


def broken(record: Record) -> list[str]:
    """The rules that promise `<u, r> >= 0` but have a step that breaks the promise."""
    runs = [*record["trials"], *record["runs"]]
    return [
        rule
        for rule in SAFE
        if any(min(run["steps"]["cos_update_retain"]) < 0 for run in runs if run["rule"] == rule)
    ]


def told_broken(record: Record) -> int:
    """The exit status: 1 if a rule has broken its promise. Then a message names the rule."""
    rules = broken(record)
    if rules:
        print(f"<u, r> is negative in a step of {', '.join(rules)}. The rule promises that it is not.")
    return 1 if rules else 0


def recovery_told(record: Record, level: float) -> str:
    """The table of one level."""
    rows = []
    for entry in entries(record, level):
        row = {
            "loss": entry.objective,
            "rule": entry.rule,
            "lr": f"{entry.rate:g}",
            "gamma": f"{entry.gamma:g}",
            "mean": _mean_told(entry.seeds),
            "by seed": _each_told(seen and 100 * seen.mean for seen in entry.seeds),
            "steps": _each_told(seen and seen.step for seen in entry.seeds),
            "seconds": _each_told(seen and seen.seconds for seen in entry.seeds),
        }
        for name in abilities(record["runs"][0]):
            row[name] = _each_told(seen and 100 * seen.recovery[name] for seen in entry.seeds)
        rows.append(row)
    return table(rows, list(rows[0]))


def _each_told(values: Iterable[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values)


def _mean_told(seeds: Sequence[Reached | None]) -> str:
    """The mean recovery, or how many seeds reach the level if not all do."""
    mean = mean_over(seeds)
    return f"{sum(map(bool, seeds))} of {len(seeds)}" if mean is None else f"{mean:.0%}"


def rates_told(record: Record, level: float) -> str:
    """The mean recovery of the results with every learning rate that was kept."""
    grid = record["grid"]
    rows = []
    for objective, rule in itertools.product(grid["objectives"], grid["rules"]):
        row = {"loss": objective, "rule": rule}
        for rate in grid["rates"]:
            runs = runs_of(record, objective, rule, rate)
            told = _mean_told([at_level(run, level) for run in runs]) if runs else ""
            row[f"lr {rate:g}"] = f"gamma {runs[0]['gamma']:g}: {told}" if runs else ""
        rows.append(row)
    return table(rows, list(rows[0]))


def trials_told(record: Record, level: float) -> str:
    """The mean recovery on the trial seed with every weight and learning rate."""
    grid = record["grid"]
    rows = []
    for objective, rule in itertools.product(grid["objectives"], grid["rules"]):
        row = {"loss": objective, "rule": rule}
        for rate, gamma in itertools.product(grid["rates"], grid["gammas"]):
            wanted = objective, rule, rate, gamma
            runs = [
                run
                for run in record["trials"]
                if (run["objective"], run["rule"], run["rate"], run["gamma"]) == wanted
            ]
            (run,) = runs
            seen = at_level(run, level)
            row[f"{rate:g} / {gamma:g}"] = "-" if seen is None else f"{seen.mean:.0%}"
        rows.append(row)
    return table(rows, list(rows[0]))


def front_page(record: Record) -> str:
    """The table of README.md: the mean recovery at `FRONT`, and the steps of each seed."""
    rules, found = record["grid"]["rules"], {}
    for entry in entries(record, FRONT):
        steps = [str(seen.step) for seen in entry.seeds if seen is not None]
        mean = mean_over(entry.seeds)
        found[entry.objective, entry.rule] = (
            f"{len(steps)} of {len(entry.seeds)} seeds"
            if mean is None
            else f"{100 * mean:.0f} %, {' and '.join(steps)} steps"
        )
    lines = ["| | " + " | ".join(f"`{rule}`" for rule in rules) + " |", "|---" * (1 + len(rules)) + "|"]
    lines += [
        f"| {objective} | " + " | ".join(found[objective, rule] for rule in rules) + " |"
        for objective in record["grid"]["objectives"]
    ]
    return "\n".join(lines)


def noise_told(record: Record) -> str:
    """The first step of `sago` with NPO and a KL divergence as the retain loss."""
    rows = [
        {
            "retain_floor": f"{noise['retain_floor']:g}",
            "|f|": f"{noise['norm_forget'][0]:.2g}",
            "|r|": f"{noise['norm_retain'][0]:.2g}",
            "conflict": f"{noise['conflict_fraction'][0]:.0%}",
            "cos(u,f)": f"{noise['cos_update_forget'][0]:+.2f}",
        }
        for noise in record["noise"]
    ]
    return table(rows, list(rows[0]))


def tell(record: Record) -> str:
    """The report that is printed after the runs."""
    levels = (
        f"Recovery where the mean probability of a forget answer falls to {level:g}\n\n"
        f"{recovery_told(record, level)}"
        for level in LEVELS
    )
    earlier = record.get("trials_from")
    source = "" if earlier is None else f", from the record of {earlier['date']}"
    parts = (
        f"The facts, and what the model knows of them before unlearning\n\n{worlds_told(record)}",
        f"The cosine of update u and retain gradient r in all runs\n\n{promises_told(record)}",
        DEFINITION,
        *levels,
        f"The mean at {FRONT:g} with every learning rate that was kept\n\n{rates_told(record, FRONT)}",
        "All rules at the same learning rate and weight: recovery, and cosines of forget gradient f, retain "
        f"gradient r and update u\n\n{equal_told(record)}",
        f"The trials: the mean at {CHOICE:g} with every learning rate / gamma, seed "
        f"{record['grid']['trial_seed']}{source}\n\n{trials_told(record, CHOICE)}",
        f"The first step of sago with NPO and the KL divergence to the start model\n\n{noise_told(record)}",
    )
    return "\n\n".join(parts)
