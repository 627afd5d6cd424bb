"""`python -m benchmarks.experiments`: the model, the compiled code and, on a GPU, the times."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch

from benchmarks.measure import table, write_json
from benchmarks.workloads import WORKLOADS

LISTS = ("lora", "rmu", "llama-3.2-1b", "llama-3-8b")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("model", help="what a model of the L2 predicts for the second read")
    command.set_defaults(run=_model, workload=LISTS)
    command.add_argument("--random", action="store_true", help="random replacement too")
    command.add_argument("--threads", type=int, help="of a program (default: as the kernels have)")

    command = commands.add_parser(
        "compile", help="registers, spills and widths of the experiments, without a GPU"
    )
    command.set_defaults(run=_compile)

    command = commands.add_parser("sweep", help="BLOCK and threads: compiled without a GPU, timed on one")
    command.set_defaults(run=_sweep, workload=("lora", "llama-3.2-1b"))
    command.add_argument("--jobs", type=int, help="processes (default: one a CPU)")
    command.add_argument("--kernel", nargs="+", choices=["combine", "gram"], default=["combine", "gram"])

    command = commands.add_parser("time", help="time the experiments beside what ships; needs a GPU")
    command.set_defaults(run=_time, workload=("lora", "rmu", "llama-3.2-1b", "tiny"))

    for name, command in commands.choices.items():
        command.add_argument("--json", metavar="FILE")
        if name != "compile":
            command.add_argument("--workload", nargs="+", choices=list(WORKLOADS), metavar="NAME")
            command.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])

    options = parser.parse_args(arguments)
    record, columns = options.run(options)
    if options.json:
        write_json(options.json, record)
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "rows"), end="\n\n")
    print(table(record["rows"], columns))
    return 0


def _model(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    from benchmarks.experiments import cache

    sizes = {name: [math.prod(s) for s in WORKLOADS[name]] for name in options.workload}
    replacements = ("lru", "random") if options.random else ("lru",)
    itemsizes = {dtype: getattr(torch, dtype).itemsize for dtype in options.dtype}
    threads = options.threads or cache.THREADS
    return cache.run(sizes, itemsizes, replacements=replacements, threads=threads), cache.COLUMNS


def _compile(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    from benchmarks.experiments import code

    record = code.run()
    return record, code.COLUMNS


def _sweep(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    from benchmarks.experiments import sweep, timing

    if torch.cuda.is_available():
        return timing.configurations(*_timed(options)), timing.SWEEP_COLUMNS
    record = sweep.run(kernels=options.kernel, jobs=options.jobs)
    return {**record, "rows": [sweep.shown(row) for row in record["rows"]]}, sweep.COLUMNS


def _time(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    from benchmarks.experiments import timing

    if not torch.cuda.is_available():
        raise SystemExit("Times need a CUDA device. Found none; `model` and `compile` run without.")
    return timing.second_read(*_timed(options)), timing.COLUMNS


def _timed(options: argparse.Namespace) -> tuple[dict[str, Any], list[torch.dtype]]:
    return (
        {name: WORKLOADS[name] for name in options.workload},
        [getattr(torch, dtype) for dtype in options.dtype],
    )


if __name__ == "__main__":
    sys.exit(main())
