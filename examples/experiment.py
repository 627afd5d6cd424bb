"""The paper's comparison of rules on a pretrained language model: `python -m examples.experiment`.

The model is to forget the capitals of some countries and to retain those of others, with the losses GradDiff,
NPO and SimNPO, the rules sum, pcgrad, pcgrad_global and sago, and several learning rates, weights and seeds.
Every run is written to a file, so that an interrupted experiment continues where it stopped. Prints the
recovery of each rule at equal forgetting, draws plots, and writes the record. Exits with 1 if a rule breaks
its promise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.measure import source_hash, write_json
from examples.draw import draw
from examples.grid import Cell, Grid
from examples.record import ORIGIN, SOURCES, record_of, write
from examples.runs import completed, described, first_steps
from examples.tables import tell, told_broken
from examples.worlds import Kind
from examples.worlds.choose import WORLDS, kind_of
from examples.worlds.smollm import Unavailable

FLOORS = (0.0, 1e-3)  # `retain_floor` in the first steps with a KL divergence as the retain loss


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=WORLDS, default="capitals")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes of one thread and about 5 GB of memory each; 0 for this process alone",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/experiment"), help="folder for runs and results"
    )
    parser.add_argument(
        "--trials",
        type=Path,
        metavar="RECORD",
        help="takes the trials from this record of the same grid instead of running them",
    )
    parser.add_argument("--report", type=Path, metavar="RECORD", help="prints and draws this record instead")
    return parser.parse_args(argv)


def check_folder(folder: Path, kind: Kind, grid: Grid) -> None:
    """Notes in `folder` what its runs depend on, and refuses runs that depend on something else.

    Raises:
        ValueError: The folder has runs of another world, grid, source or version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.json"
    wanted = {
        "world": repr(kind),
        "grid": repr(asdict(grid)),
        "source": source_hash(*SOURCES),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not path.exists():
        write_json(path, wanted)
    found = json.loads(path.read_text())
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        told = "; ".join(f"`{name}` is {wanted[name]}, and was {found.get(name)}" for name in other)
        raise ValueError(
            f"Parameter `--out` should be a new folder, or one with runs of the same experiment. Found "
            f"{path} of another one: {told}. Name another folder, or delete this one."
        )


def trials_of(path: Path, world: str, grid: Grid) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The trials of an earlier record, without their text, and where that record comes from.

    The trials choose learning rates and weights by their facts alone, so the text may have changed since.

    Raises:
        ValueError: The record is of another world, or of a grid with other trials.
    """
    record = json.loads(path.read_text())
    found = [Cell(*(trial[name] for name in Cell._fields)) for trial in record["trials"]]
    same = {"world": world, "grid": json.loads(json.dumps(asdict(grid)))}
    other = [name for name, value in same.items() if record[name] != value]
    if other or found != grid.trials():
        raise ValueError(
            f"Parameter `--trials` should be a record with the trials of this experiment. Found another "
            f"{' and '.join(other) or 'list of trials'} in {path}."
        )
    trials = [
        {**trial, "known": {name: known for name, known in trial["known"].items() if name != "text"}}
        for trial in record["trials"]
    ]
    return trials, {name: record[name] for name in ORIGIN}


def main(argv: Sequence[str] | None = None, grid: Grid | None = None) -> int:
    args = parse(argv)
    if args.report is not None:
        record = json.loads(args.report.read_text())
    else:
        kind, default = kind_of(args.world)
        grid = grid or default
        check_folder(args.out, kind, grid)
        try:
            worlds = described(kind, args.out, (grid.trial_seed, *grid.seeds))
        except Unavailable as error:
            print(f"{error}\nThe world of invented people needs no download: --world people", file=sys.stderr)
            return 1
        print(f"{grid}\n", flush=True)
        if args.trials is None:
            trials, earlier = completed(kind, args.out, grid, grid.trials(), args.workers, "trials"), None
        else:
            trials, earlier = trials_of(args.trials, args.world, grid)
        cells = grid.final(grid.chosen(trials))
        runs = completed(kind, args.out, grid, cells, args.workers, "results")
        noise = [first_steps(kind, args.out, grid, grid.trial_seed, floor) for floor in FLOORS]
        record = record_of(args.world, grid, worlds, trials, runs, noise, args.workers, earlier)
        write(record, args.out / "experiment.json")
    print(tell(record))
    print("\nWritten: " + ", ".join(map(str, draw(record, args.out))))
    return told_broken(record)


if __name__ == "__main__":
    sys.exit(main())
