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

import torch

from examples.draw import draw
from examples.grid import Grid
from examples.record import record_of, write
from examples.runs import completed, described, first_steps
from examples.tables import broken, tell
from examples.worlds.choose import WORLDS, kind_of
from examples.worlds.smollm import Unavailable

FLOORS = (0.0, 1e-3)  # `retain_floor` in the first steps with a KL divergence as the retain loss


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=WORLDS, default="capitals")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, torch.get_num_threads()),
        help="processes of one thread each, by default one a core; 0 for none but this one",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/experiment"), help="folder for runs and results"
    )
    parser.add_argument("--report", type=Path, metavar="RECORD", help="prints and draws this record instead")
    return parser.parse_args(argv)


def check_folder(folder: Path, world: str, grid: Grid) -> None:
    """Notes the grid of the runs in `folder`, and refuses runs of another grid.

    Raises:
        ValueError: The folder has runs of another world or grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "grid.json", json.dumps({"world": world, **asdict(grid)})
    if not path.exists():
        path.write_text(wanted)
    elif path.read_text() != wanted:
        raise ValueError(
            f"Parameter `--out` should be a new folder, or one with runs of the same grid. Found {path} with "
            f"{path.read_text()}. Now the grid is {wanted}."
        )


def main(argv: Sequence[str] | None = None, grid: Grid | None = None) -> int:
    args = parse(argv)
    if args.report is not None:
        record = json.loads(args.report.read_text())
    else:
        kind, default = kind_of(args.world)
        grid = grid or default
        check_folder(args.out, args.world, grid)
        try:
            worlds = described(kind, args.out, (grid.trial_seed, *grid.seeds))
        except Unavailable as error:
            print(f"{error}\nThe world of invented people needs no download: --world people", file=sys.stderr)
            return 1
        print(f"{grid}\n", flush=True)
        trials = completed(kind, args.out, grid, grid.trials(), args.workers, "trials")
        cells = grid.final(grid.chosen(trials))
        runs = completed(kind, args.out, grid, cells, args.workers, "results")
        noise = [first_steps(kind, args.out, grid, grid.trial_seed, floor) for floor in FLOORS]
        record = record_of(args.world, grid, worlds, trials, runs, noise, args.workers)
        write(record, args.out / "experiment.json")
    print(tell(record))
    print("\nWritten: " + ", ".join(map(str, draw(record, args.out))))
    return 1 if broken(record) else 0


if __name__ == "__main__":
    sys.exit(main())
