"""`python -m benchmarks`: the commands, their tables and their records."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import speed, step, workloads
from benchmarks.gradients import WrongResult
from benchmarks.measure import table, write_json
from benchmarks.released import RULES


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
    except WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    return result


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"should be an integer of at least {least}. Found {text!r}.")
        return int(text)

    return number


_count, _positive, _several = map(_at_least, range(3))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(run: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(run.__name__[1:], help=text)
        command.set_defaults(run=run)
        if run is not _sanitize:
            command.add_argument("--json", metavar="FILE", help="write the record to a file or folder")
        return command.add_argument

    option = add(_compile, "compile every kernel without a GPU, and inspect the code")
    option("--arch", nargs="+", metavar="ARCH", help="default: sm_80 sm_90 sm_100 gfx942")
    option("--quick", action="store_true", help="compile the subset of the tests")
    option("--configuration", type=_positive, nargs=3, metavar=("CHUNK", "BLOCK", "THREADS"))
    option("--jobs", type=_positive, help="number of processes (default: one a CPU)")

    option = add(_cpu, "time sago beside its peers on the CPU")
    option("--elements", type=_positive, default=1 << 26, help="in all (default: 64 Mi)")
    option("--tensors", type=_positive, default=1, help="that hold the elements (default: 1)")
    option("--repeats", type=_positive, default=10, help="number of rounds (default: 10)")

    names = [*workloads.WORKLOADS, *workloads.SIZES]
    for run, text in (
        (_speed, "time sago beside its peers on the gradients of models"),
        (_sweep, "time the kernels in other configurations on a GPU"),
    ):
        option = add(run, text)
        option("--device", choices=["cpu", "cuda"], default="cpu" if run is _speed else "cuda")
        option("--workload", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
        option("--rule", nargs="+", choices=RULES, metavar="RULE", help=", ".join(RULES))
        option("--dtype", nargs="+", choices=speed.DTYPES, metavar="DTYPE", help=", ".join(speed.DTYPES))
        option("--elements", type=_positive, help="of a list, to which longer lists are shrunk (CPU: 4 Mi)")
        option("--repeats", type=_positive, default=20, help="number of rounds (default: 20)")
    option(
        "--chunk", type=_positive, nargs="+", default=[16384, 32768, 65536], help="default: 16384 32768 65536"
    )
    option("--block", type=_positive, nargs="+", default=[1024, 2048, 4096], help="default: 1024 2048 4096")
    option(
        "--threads", type=_positive, nargs="+", default=[128, 256, 512], help="an 8th or a 16th of the block"
    )

    option = add(_sanitize, "launch both kernels a few times for compute-sanitizer")
    option("--device", choices=["cpu", "cuda"], default="cuda", help="default: cuda")

    option = add(_host, "measure the host time of a call, without a GPU")
    option("--pairs", type=_positive, nargs="+", default=[291], metavar="N", help="default: 291")
    option("--repeats", type=_positive, default=300, help="timed calls (default: 300)")

    option = add(_shards, "count the communication of a synthesis, and compare sharded with whole gradients")
    option("--shards", type=_positive, nargs="+", metavar="N", help="default: 1 2 3 8 64 255 1024")
    option("--rule", nargs="+", choices=RULES, metavar="RULE")
    option("--dtype", nargs="+", choices=speed.DTYPES)

    option = add(_accumulation, "compare ways to add up the gradients of several micro-batches in bf16")
    option("--micro-batches", type=_positive, nargs="+", metavar="N", help="default: 4 16")

    option = add(_step, "measure time and peak memory of whole unlearning steps beside the summed loss")
    option("--shape", choices=step.SHAPES, default="smollm2-135m", help="default: smollm2-135m")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    option("--rule", nargs="+", choices=RULES, default=["sago", "pcgrad"], metavar="RULE")
    option("--dtype", nargs="+", choices=speed.DTYPES, help="default: float32, on a GPU bfloat16")
    option("--tokens", type=_several, default=256, help="of each text, at least 2 (default: 256)")
    option("--micro-batches", type=_positive, default=1, metavar="N", help="default: 1")
    option("--optimizer", choices=step.OPTIMIZERS, default="sgd", help="default: sgd")
    option("--repeats", type=_count, default=10, help="number of rounds; 0 measures no time (default: 10)")
    return parser


def _save(options: argparse.Namespace, suffix: str, record: Any) -> None:
    if options.json:
        write_json(options.json, record, suffix)


def _report(options: argparse.Namespace, record: Any, columns: Sequence[str], suffix: str = "") -> int:
    """Writes the record, and prints its numbers and names on one line and its rows as a table."""
    _save(options, suffix, record)
    plain = {key: value for key, value in record.items() if not isinstance(value, (list, dict))}
    print(", ".join(f"{key} {value}" for key, value in plain.items()), end="\n\n")
    print(table(record["rows"], columns))
    return 0


def _compile(options: argparse.Namespace) -> int:
    from benchmarks import compile
    from benchmarks.sweep import SHIPPED, Configuration

    configuration = Configuration(*options.configuration or SHIPPED)
    record = compile.run(options.arch or compile.ARCHS, options.quick, options.jobs, configuration)
    _save(options, "", record)
    print(table([compile.shown(row) for row in record["rows"]], compile.COLUMNS))
    failed = sum(bool(row["failures"]) for row in record["rows"])
    print(f"\n{len(record['rows'])} configurations, {failed} with failures (Triton {record['triton']})")
    return 1 if failed else 0


def _cpu(options: argparse.Namespace) -> int:
    from benchmarks import cpu

    return _report(options, cpu.run(options.elements, options.tensors, options.repeats), cpu.COLUMNS)


def _speed(options: argparse.Namespace) -> int:
    chosen = options.workload, options.rule, options.dtype
    return _timed(options, speed.cases(options.device == "cuda", *chosen))


def _sweep(options: argparse.Namespace) -> int:
    from benchmarks import sweep

    cases = sweep.cases(
        options.workload or ("llama-3.2-1b", "lora"),
        options.rule or ("sago", "pcgrad"),
        options.dtype or ("bfloat16",),
        [sweep.Configuration(*c) for c in product(options.chunk, options.block, options.threads)],
        "graph" if options.device == "cuda" else "eager",
    )
    return _timed(options, cases, "-sweep")


def _timed(options: argparse.Namespace, cases: Any, suffix: str = "") -> int:
    most = 1 << 22 if options.elements is None and options.device == "cpu" else options.elements
    write = partial(_save, options, suffix)
    record = speed.run(options.device, cases, most, options.repeats, write=write)
    _report(options, record, speed.COLUMNS, suffix)
    if record["targets"]:
        print("\n" + table(record["targets"], tuple(record["targets"][0])))
    # A peer that does not fit in memory is a result, not a failure.
    return int(any(row["note"] not in (None, "out of memory") for row in record["rows"]))


def _sanitize(options: argparse.Namespace) -> int:
    from benchmarks import sanitize

    print(f"{sanitize.run(options.device)} syntheses have the updates of the reference")
    return 0


def _host(options: argparse.Namespace) -> int:
    from benchmarks import host

    return _report(options, host.run(options.pairs, options.repeats), host.COLUMNS)


def _shards(options: argparse.Namespace) -> int:
    from benchmarks import shards

    dtypes = [getattr(torch, dtype) for dtype in options.dtype or speed.DTYPES]
    record = shards.run(options.shards or shards.SHARDS, options.rule or RULES, dtypes)
    return _report(options, record, shards.COLUMNS)


def _accumulation(options: argparse.Namespace) -> int:
    from benchmarks import accumulation

    record = accumulation.run(options.micro_batches or accumulation.MICRO_BATCHES)
    return _report(options, record, accumulation.COLUMNS)


def _step(options: argparse.Namespace) -> int:
    # libkineto, which counts the memory of the CPU, otherwise logs the start and stop of every count.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    record = step.run(
        step.SHAPES[options.shape],
        options.rule,
        [getattr(torch, d) for d in options.dtype or ["bfloat16" if options.device == "cuda" else "float32"]],
        options.device,
        options.tokens,
        options.micro_batches,
        options.repeats,
        options.optimizer,
    )
    return _report(options, record, step.COLUMNS, "-step")


if __name__ == "__main__":
    sys.exit(main())
