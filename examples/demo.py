"""A pretrained language model forgets the capitals of some countries: `python -m examples.demo`.

From the same start, `sum`, `pcgrad` and `sago` unlearn until the model has forgotten. Prints for each rule
the completions of some prompts, what is left of the abilities, and the cosines of gradients and update, and
draws abilities against forgetting. Exits with 1 if a rule breaks its promise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from examples.draw import pareto, save
from examples.grid import Cell, Grid
from examples.objectives import FORGET
from examples.recovery import CHOICE, entries
from examples.runs import opened, run
from examples.tables import told_broken
from examples.worlds import Kind
from examples.worlds.choose import WORLDS, kind_of
from examples.worlds.smollm import Unavailable
from examples.worlds.world import World

SEED = 0
RULES = ("sum", "pcgrad", "sago")
RECORD = Path(__file__).parent / "results" / "experiment.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--world",
        choices=WORLDS,
        default="capitals",
        help="the capitals that SmolLM2-135M knows, or invented people, which need no download",
    )
    parser.add_argument("--objective", choices=FORGET, default="NPO", help="the forget loss")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder for the plot and the known facts"
    )
    return parser.parse_args(argv)


def cells_of(world: str, objective: str) -> list[Cell]:
    """A run for each rule. Learning rate and weight are those that the experiment chose for the rule, if its
    record is of this world."""
    record = json.loads(RECORD.read_text())
    if record["world"] != world:
        rate = kind_of(world)[1].rates[0]
        return [Cell(objective, rule, rate, 1.0, SEED) for rule in RULES]
    chosen = {(entry.objective, entry.rule): entry for entry in entries(record, CHOICE)}
    found = [chosen[objective, rule] for rule in RULES]
    return [Cell(objective, entry.rule, entry.rate, entry.gamma, SEED) for entry in found]


def prompts_of(world: World, count: int = 12) -> list[tuple[str, str, str]]:
    """Set, prompt and answer of `count` facts, equally many of each set."""
    each = count // len(world.facts)
    return [
        (name, fact.prompt, fact.answer.strip())
        for name, facts in world.facts.items()
        for fact in facts[:: max(len(facts) // each, 1)][:each]
    ]


def measured(
    rule: str, known: Mapping[str, Mapping[str, float]], choices: Mapping[str, float]
) -> dict[str, str]:
    """A row of the table: what is known after a rule."""
    row = {"rule": rule, "forget probability": f"{known['forget']['probability']:.3f}"}
    for name, values in known.items():
        if name == "text":
            row["perplexity"] = f"{World.perplexity(values):.1f}"
        else:
            row[f"{name} right"] = f"{values['answers']:.0%}"
            if name in choices:
                row[f"{name} of four"] = f"{choices[name]:.0%}"
    return row


def compare(kind: Kind, grid: Grid, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    """Runs the cells, and prints what they leave. Returns their record."""
    kind.prepare(folder, SEED)
    world, known, choices = opened(kind, folder, SEED)
    counts = ", ".join(f"{len(facts)} {name}" for name, facts in world.facts.items())
    print(
        f"A model of {sum(p.numel() for p in world.model.parameters()):,} parameters. Facts: {counts}.\n"
        f"{cells[0].objective}, until the mean probability of a forget answer is at most {grid.enough:g}.\n"
    )
    shown = prompts_of(world)
    prompts = [prompt for _, prompt, _ in shown]
    before = [world.complete(world.model, prompt) for prompt in prompts]
    runs = [run(kind, folder, grid, cell, prompts, progress=True) for cell in cells]

    rows = [measured("before", known, choices)]
    for found in runs:
        last = {name: {key: v[-1] for key, v in values.items()} for name, values in found["known"].items()}
        row = measured(found["rule"], last, found["choices"])
        cosines = {name: statistics.fmean(values) for name, values in found["steps"].items()}
        row["steps"] = str(len(found["seconds"]))
        row["cos(f,r)"] = f"{cosines['cos_forget_retain']:+.2f}"
        row["cos(u,f)"] = f"{cosines['cos_update_forget']:+.2f}"
        row["cos(u,r)"] = f"{cosines['cos_update_retain']:+.2f}"
        rows.append(row)
    print(table(rows, list(rows[-1])))
    print("\nf, r, u: forget gradient, retain gradient and update; cosines are means over the steps\n")
    completions = [
        {
            "set": name,
            "prompt": " ".join(prompt.split()),
            "answer": answer,
            "before": said,
            **{found["rule"]: found["completions"][i] for found in runs},
        }
        for i, ((name, prompt, answer), said) in enumerate(zip(shown, before, strict=True))
    ]
    print(table(completions, list(completions[0])))
    return {"grid": asdict(grid), "trials": [], "runs": runs}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    kind, grid = kind_of(args.world)
    cells = cells_of(args.world, args.objective)
    rates = tuple(sorted({cell.rate for cell in cells}))
    grid = replace(grid, objectives=(args.objective,), rules=RULES, rates=rates, seeds=(SEED,), enough=0.05)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        record = compare(kind, grid, cells, args.out)
    except Unavailable as error:
        print(f"{error}\nThe world of invented people needs no download: --world people", file=sys.stderr)
        return 1
    print(f"\nWritten: {save(pareto(record), args.out / 'pareto.png')}")
    return told_broken(record)


if __name__ == "__main__":
    sys.exit(main())
