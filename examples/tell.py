"""Describes a record of the sweep as text."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import table
from examples.recovery import ABILITIES, LEAST, LEVELS, at_level, entries, runs_of
from examples.world import SETS

SAFE = ("pcgrad", "pcgrad_global", "sago")  # the rules that promise <u, r> >= 0

DEFINITION = f"""\
Recovery: the answers right over the answers right before unlearning, where the mean probability of the
forget answers first falls to the level; between two measurements by linear interpolation; mean ± standard
deviation over the seeds that get there. The paper's recovery is that of MMLU; general answers stand for it.
lr: the smallest learning rate with which most seeds get there. Grid, levels and lr are chosen by forgetting
alone. Regained: 1 - (1 - recovery) / (1 - recovery of sum), from the means: the share of what sum loses that
the rule does not lose. Left out where sum loses less than {LEAST:.0%}."""

LIMITS = """\
Too small for more than a look: half a million parameters that know invented facts by heart and nothing else,
tens of steps, and a general ability that is recall as well. At scale effects may be larger, smaller or
reversed. The promise is of the update and the retain batch of its step: AdamW rescales each coordinate
afterwards, and general facts are in no loss."""


def models_told(models: Sequence[Mapping[str, Any]]) -> str:
    """What the models of a record know before unlearning."""
    facts = ", ".join(f"{count} {name}" for name, count in models[0]["facts"].items())
    rows = [
        {
            "seed": model["seed"],
            "steps": model["steps"],
            **{f"{name} right": f"{model['known'][name]['answers']:.1%}" for name in SETS},
        }
        for model in models
    ]
    return (
        "Each seed makes a world of its own and teaches it to a Llama of "
        f"{models[0]['parameters']:,} parameters.\n"
        f"Facts: {facts}. Right: whole answers, before unlearning.\n\n{table(rows, list(rows[0]))}"
    )


def broken(record: Mapping[str, Any]) -> list[str]:
    """The rules that promise `<u, r> >= 0` but have a step that breaks the promise."""
    runs = record["runs"]
    return [
        rule
        for rule in SAFE
        if any(min(run["cosines"]["cos_update_retain"]) < 0 for run in runs if run["rule"] == rule)
    ]


def cosines_told(record: Mapping[str, Any]) -> str:
    """The table of the cosines over all steps of all runs, for each rule."""
    rows, failed = [], broken(record)
    for rule in record["setup"]["rules"]:
        runs = [run["cosines"] for run in record["runs"] if run["rule"] == rule]
        conflict, kept = (
            [value for cosines in runs for value in cosines[name]]
            for name in ("cos_forget_retain", "cos_update_retain")
        )
        rows.append(
            {
                "rule": rule,
                "steps": len(kept),
                "cos(f,r) < 0": f"{sum(value < 0 for value in conflict) / len(conflict):.1%}",
                "cos(u,r) < 0": f"{sum(value < 0 for value in kept) / len(kept):.1%}",
                "least cos(u,r)": f"{min(kept):+.4f}",
                "promise": "none" if rule not in SAFE else "BROKEN" if rule in failed else "kept",
            }
        )
    return table(rows, list(rows[0]))


def recovery_told(record: Mapping[str, Any], level: float) -> str:
    """The table of one level."""
    rows = []
    for entry in entries(record, level):
        row = {
            "loss": entry.objective,
            "rule": entry.rule,
            "lr": f"{entry.rate:g}",
            "seeds": f"{entry.seeds} of {len(record['setup']['seeds'])}",
            "step": f"{entry.step:.0f}" if entry.seeds else "",
        }
        for name in ABILITIES:
            mean, deviation = entry.recovery.get(name, (None, None))
            row[f"{name} recovery"] = "" if mean is None else f"{100 * mean:5.1f} ± {100 * deviation:4.1f}%"
            row[f"{name} regained"] = f"{entry.regained[name]:5.0%}" if name in entry.regained else ""
        rows.append(row)
    return table(rows, list(rows[0]))


def rates_told(record: Mapping[str, Any], level: float) -> str:
    """The recoveries at a level with every learning rate: general / retain in percent, means over the seeds
    that get there."""
    setup = record["setup"]
    rows = []
    for objective, rule in itertools.product(setup["objectives"], setup["rules"]):
        row = {"loss": objective, "rule": rule}
        for rate in setup["rates"]:
            seen = [at_level(run, level, setup["every"]) for run in runs_of(record, objective, rule, rate)]
            there = [kept for kept in seen if kept is not None]
            shares = " / ".join(
                f"{100 * statistics.fmean(kept[name] for kept in there):4.1f}" for name in ABILITIES if there
            )
            row[f"lr {rate:g}"] = shares and f"{shares}  ({len(there)} of {len(seen)})"
        rows.append(row)
    return table(rows, list(rows[0]))


def last_told(record: Mapping[str, Any]) -> str:
    """What the models know after the last step with the smallest learning rate, means over seeds."""
    setup = record["setup"]
    rows = []
    for objective, rule in itertools.product(setup["objectives"], setup["rules"]):
        runs = runs_of(record, objective, rule, setup["rates"][0])
        row = {"loss": objective, "rule": rule}
        for name in SETS:
            known = [run["known"][name] for run in runs]
            row[f"{name} probability"] = f"{statistics.fmean(k['probability'][-1] for k in known):.4f}"
            row[f"{name} right"] = f"{statistics.fmean(k['answers'][-1] for k in known):6.1%}"
        rows.append(row)
    return table(rows, list(rows[0]))


def tell(record: Mapping[str, Any]) -> str:
    """The text that is printed after the runs."""
    levels = (
        f"Where the forget answers' probability falls to {level:g}:\n\n{recovery_told(record, level)}"
        for level in LEVELS
    )
    parts = (
        f"4. Updates against retain, over all steps of all runs\n\n{cosines_told(record)}",
        f"5. Recovery\n\n{DEFINITION}",
        *levels,
        f"With every learning rate, at {LEVELS[0]:g}: general / retain recovery in percent (seeds that get "
        f"there):\n\n{rates_told(record, LEVELS[0])}",
        f"After the last step, learning rate {record['setup']['rates'][0]:g}, means over seeds; "
        f"levels of forgetting differ:\n\n{last_told(record)}",
        LIMITS,
    )
    return "\n\n".join(parts)
