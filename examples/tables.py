"""Describes the record of an experiment as text. `docs/experiment.md` contains these tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import table
from examples.recovery import CHOICE, LEVELS, Record, at_level, entries, mean_recovery, runs_of

SAFE = ("pcgrad", "pcgrad_global", "sago")  # the rules that promise <u, r> >= 0

DEFINITION = """\
Recovery: the answers right at the level over the answers right before unlearning, and for text the perplexity
before over the perplexity at the level. The level is the mean probability of the forget answers; between two
measurements by linear interpolation; mean ± standard deviation over the seeds that reach it. lr and gamma are
those with the largest mean recovery on the trial seed. Seconds: of training, without the measurements."""


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
    return table(rows, list(rows[0]))


def cosines_told(record: Record) -> str:
    """The cosines over all steps of the results, for each rule."""
    rows, failed = [], broken(record)
    for rule in record["grid"]["rules"]:
        steps = [run["steps"] for run in record["runs"] if run["rule"] == rule]
        conflict, kept, forgot = (
            [value for step in steps for value in step[name]]
            for name in ("cos_forget_retain", "cos_update_retain", "cos_update_forget")
        )
        rows.append(
            {
                "rule": rule,
                "steps": len(kept),
                "cos(f,r)": f"{statistics.fmean(conflict):+.2f}",
                "cos(u,f)": f"{statistics.fmean(forgot):+.2f}",
                "cos(u,r)": f"{statistics.fmean(kept):+.2f}",
                "cos(u,r) < 0": f"{sum(value < 0 for value in kept) / len(kept):.0%}",
                "least cos(u,r)": f"{min(kept):+.3f}",
                "promise": "none" if rule not in SAFE else "BROKEN" if rule in failed else "kept",
            }
        )
    return table(rows, list(rows[0]))


def equal_told(record: Record) -> str:
    """The rules at the same learning rate and weight: the trials with the middle one of each."""
    grid, rows = record["grid"], []
    rate, gamma = (sorted(values)[len(values) // 2] for values in (grid["rates"], grid["gammas"]))
    for run in record["trials"]:
        if (run["rate"], run["gamma"]) != (rate, gamma):
            continue
        row = {"loss": run["objective"], "rule": run["rule"]}
        for level in LEVELS:
            seen = at_level(run, level)
            row[f"steps to {level:g}"] = "" if seen is None else f"{seen.step:.1f}"
        seen = at_level(run, CHOICE)
        row[f"recovery at {CHOICE:g}"] = "" if seen is None else f"{100 * mean_recovery(seen):.0f}%"
        for label, name in (
            ("cos(f,r)", "cos_forget_retain"),
            ("cos(u,f)", "cos_update_forget"),
            ("cos(u,r)", "cos_update_retain"),
        ):
            row[label] = f"{statistics.fmean(run['steps'][name]):+.2f}"
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


def recovery_told(record: Record, level: float) -> str:
    """The table of one level."""
    rows = []
    for entry in entries(record, level):
        row = {
            "loss": entry.objective,
            "rule": entry.rule,
            "lr": f"{entry.rate:g}",
            "gamma": f"{entry.gamma:g}",
            "seeds": f"{entry.seeds} of {len(record['grid']['seeds'])}",
            "steps": f"{entry.step:.0f}" if entry.seeds else "",
            "seconds": f"{entry.seconds:.0f}" if entry.seeds else "",
        }
        for name in names(record):
            mean, deviation = entry.recovery.get(name, (None, None))
            row[name] = "" if mean is None else f"{100 * mean:3.0f} ± {100 * deviation:2.0f}%"
        rows.append(row)
    return table(rows, list(rows[0]))


def names(record: Record) -> list[str]:
    """The abilities of the record's world."""
    return [name for name in record["runs"][0]["known"] if name != "forget"]


def rates_told(record: Record, level: float) -> str:
    """The mean recovery over all abilities with every learning rate, means over the seeds that get there."""
    grid = record["grid"]
    rows = []
    for objective, rule in itertools.product(grid["objectives"], grid["rules"]):
        row = {"loss": objective, "rule": rule}
        for rate in grid["rates"]:
            runs = runs_of(record, objective, rule, rate)
            row[f"lr {rate:g}"] = f"gamma {runs[0]['gamma']:g}: {_mean_told(runs, level)}" if runs else ""
        rows.append(row)
    return table(rows, list(rows[0]))


def trials_told(record: Record, level: float) -> str:
    """The mean recovery of the trial seed with every weight and learning rate."""
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
            row[f"{rate:g} / {gamma:g}"] = _mean_told(runs, level)
        rows.append(row)
    return table(rows, list(rows[0]))


def _mean_told(runs: Sequence[Mapping[str, Any]], level: float) -> str:
    """The mean recovery in percent, and the seeds that get there if there are several."""
    there = [mean_recovery(seen) for run in runs if (seen := at_level(run, level)) is not None]
    told = f"{100 * statistics.fmean(there):.0f}%" if there else "none"
    return told if len(runs) == 1 else f"{told} ({len(there)} of {len(runs)})"


def front_page(record: Record) -> str:
    """The table of README.md: the mean recovery over all abilities at `CHOICE`, and the steps."""
    rules, found = record["grid"]["rules"], {}
    for entry in entries(record, CHOICE):
        there = [
            mean_recovery(seen)
            for run in runs_of(record, entry.objective, entry.rule, entry.rate)
            if (seen := at_level(run, CHOICE)) is not None
        ]
        told = f"{100 * statistics.fmean(there):.0f} % in {entry.step:.0f} steps" if there else "not reached"
        if 0 < len(there) < len(record["grid"]["seeds"]):
            told += f" ({len(there)} of {len(record['grid']['seeds'])} seeds)"
        found[entry.objective, entry.rule] = told
    lines = ["| | " + " | ".join(f"`{rule}`" for rule in rules) + " |", "|---" * (1 + len(rules)) + "|"]
    lines += [
        f"| {objective} | " + " | ".join(found[objective, rule] for rule in rules) + " |"
        for objective in record["grid"]["objectives"]
    ]
    return "\n".join(lines)


def noise_told(record: Record) -> str:
    """The first steps of `sago` with NPO and a KL divergence as the retain loss."""
    rows = [
        {
            "retain_floor": f"{noise['retain_floor']:g}",
            "step": i + 1,
            "|f|": f"{noise['norm_forget'][i]:.2g}",
            "|r|": f"{noise['norm_retain'][i]:.2g}",
            "conflict": f"{noise['conflict_fraction'][i]:.0%}",
            "cos(u,f)": f"{noise['cos_update_forget'][i]:+.2f}",
        }
        for noise in record["noise"]
        for i in range(len(noise["norm_retain"]))
    ]
    return table(rows, list(rows[0]))


def tell(record: Record) -> str:
    """The report that is printed after the runs."""
    levels = (
        f"Recovery where the mean probability of the forget answers falls to {level:g}:\n\n"
        f"{recovery_told(record, level)}"
        for level in LEVELS
    )
    parts = (
        f"The facts, and what the model knows of them before unlearning\n\n{worlds_told(record)}",
        f"Cosines of forget gradient f, retain gradient r and update u, means over all steps\n\n"
        f"{cosines_told(record)}",
        DEFINITION,
        *levels,
        f"Mean recovery over all abilities at {CHOICE:g} with every learning rate (seeds that get there)"
        f"\n\n{rates_told(record, CHOICE)}",
        f"All rules at the same learning rate and weight\n\n{equal_told(record)}",
        f"The trials: mean recovery at {CHOICE:g} with every learning rate / gamma, seed "
        f"{record['grid']['trial_seed']}\n\n{trials_told(record, CHOICE)}",
        f"The first steps of sago with NPO and the KL divergence to the start model\n\n{noise_told(record)}",
    )
    return "\n\n".join(parts)
