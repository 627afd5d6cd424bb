"""The paper's experiment in small: `python -m examples.demo`.

Small Llamas learn facts about invented people by heart. Then a tenth of the people is to be forgotten, with
the losses GradDiff, NPO and SimNPO, the rules sum, pcgrad, pcgrad_global and sago, several learning rates and
several seeds. Prints what each rule leaves of the abilities that `sum` loses, draws fronts, losses and
cosines, and writes the record that all of it comes from. Exits with 1 if an update is not that of the
reference, or if a rule breaks its promise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import table
from benchmarks.released import RULES
from examples.check import against_reference, both_gradients
from examples.draw import draw
from examples.grid import QUICK, Setup
from examples.objectives import RETAIN
from examples.record import record_of, write
from examples.sweep import bar, run, workers
from examples.tell import broken, models_told, tell
from examples.world import learn, learned


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and grid, for a look at the output"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="as many worlds, each with its own model")
    parser.add_argument("--rates", type=float, nargs="+", metavar="LR", help="learning rates of unlearning")
    parser.add_argument("--gamma", type=float, help="weight of the forget gradient, 1 by default")
    parser.add_argument("--retain", choices=RETAIN, help="the retain loss, NLL by default")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, torch.get_num_threads()),
        help="processes of one thread each, by default one a core; 0 for none but this one",
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for record and plots")
    parser.add_argument(
        "--plot-only", type=Path, metavar="RECORD", help="of an earlier run, instead of a run"
    )
    return parser.parse_args(argv)


def setup_of(args: argparse.Namespace) -> Setup:
    setup = QUICK if args.quick else Setup()
    if args.seeds is not None:
        setup = replace(setup, seeds=tuple(range(args.seeds)))
    if args.rates is not None:
        setup = replace(setup, rates=tuple(sorted(args.rates)))
    if args.gamma is not None:
        setup = replace(setup, gamma=args.gamma)
    if args.retain is not None:
        setup = replace(setup, retain=args.retain)
    return setup


def checked(setup: Setup, path: Path) -> tuple[str, list[str]]:
    """Every rule on the two gradients of the first model, against the reference: a text, and what failed."""
    seed = setup.seeds[0]
    forget, retain = both_gradients(setup, learned(setup, seed, path)[0], seed)
    rows, failed = [], []
    for rule in RULES:
        (passed, verdict), seen = against_reference(forget, retain, rule, ["compiled"])["compiled"]
        rows.append(
            {
                "rule": rule,
                "update": verdict,
                "cos(u,r)": seen["cos_update_retain"],
                "cos(u,f)": seen["cos_update_forget"],
            }
        )
        failed += [] if passed else [rule]
    text = (
        f"cos(f,r) = {seen['cos_forget_retain']:.2f}, and signs are opposite in "
        f"{seen['conflict_fraction']:.1%} of {sum(r.numel() for r in retain):,} elements.\n"
        "update: sago.synthesize_ against sago.reference, bitwise or max |error| / max |update|\n\n"
        + table(rows, list(rows[0]))
    )
    return text, failed


def experiment(setup: Setup, count: int) -> dict[str, Any] | None:
    """Learns, checks and unlearns, and says how it goes. Returns the record, or None where a check failed."""
    with tempfile.TemporaryDirectory() as folder, workers(count) as apply:
        paths = {seed: Path(folder, f"{seed}.pt") for seed in setup.seeds}
        start = time.perf_counter()
        learning = apply(learn, [setup] * len(paths), paths, paths.values())
        models = list(bar(learning, len(paths), "learning", "model"))
        seconds = {"learning": time.perf_counter() - start}
        print(f"1. Learning\n\n{models_told(models)}\n", flush=True)

        text, failed = checked(setup, paths[setup.seeds[0]])
        print(f"2. The two gradients of the first model, and every rule on them\n\n{text}\n", flush=True)
        if failed:
            print(f"Different from the reference: {', '.join(failed)}", file=sys.stderr)
            return None

        print(f"3. Unlearning: {setup}\n", flush=True)
        cells = setup.cells()
        start = time.perf_counter()
        unlearning = apply(run, [setup] * len(cells), cells, [paths[cell.seed] for cell in cells])
        runs = list(bar(unlearning, len(cells), "unlearning", "run"))
        seconds["unlearning"] = time.perf_counter() - start
    return record_of(setup, models, runs, seconds, count)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.plot_only is not None:
        record = json.loads(args.plot_only.read_text())
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            record = experiment(setup_of(args), args.workers)
        finally:
            torch.set_num_threads(threads)
        if record is None:
            return 1
        args.out.mkdir(parents=True, exist_ok=True)
        write(record, args.out / "demo.json")
    print(tell(record))
    paths = draw(record, args.out)
    print("\nWritten: " + ", ".join(map(str, paths)))
    return 1 if broken(record) else 0


if __name__ == "__main__":
    sys.exit(main())
