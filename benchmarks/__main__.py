"""`python -m benchmarks`: the commands, their tables and records."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from benchmarks import speed, workloads
from benchmarks.measure import table, write_json
from benchmarks.released import RULES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "compile",
        help="compile every kernel configuration without a GPU: registers, spills, vector widths",
    )
    command.set_defaults(run=_compile)
    command.add_argument("--arch", nargs="+", metavar="ARCH", help="default: sm_80 sm_90 sm_100 gfx942")
    command.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    command.add_argument("--jobs", type=int, help="processes (default: one a CPU)")
    command.add_argument("--json", metavar="FILE")

    command = commands.add_parser("cpu", help="time sago beside its peers on the CPU")
    command.set_defaults(run=_cpu)
    command.add_argument("--elements", type=int, default=1 << 26, help="in all (default: 64 Mi)")
    command.add_argument("--tensors", type=int, default=1, help="to spread them over (default: 1)")
    command.add_argument("--repeats", type=int, default=10, help="rounds (default: 10)")
    command.add_argument("--accuracy", action="store_true", help="measure the errors of the sums instead")
    command.add_argument("--json", metavar="FILE")

    command = commands.add_parser("speed", help="time sago beside its peers on lists of gradients of models")
    command.set_defaults(run=_speed)
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    command.add_argument("--suite", choices=speed.SUITES, default="quick", help="default: quick")
    names = [*workloads.WORKLOADS, *workloads.SWEEP]
    command.add_argument(
        "--workload", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )  # fmt: skip
    command.add_argument("--rule", nargs="+", choices=RULES, metavar="RULE", help=f"of {', '.join(RULES)}")
    command.add_argument("--dtype", nargs="+", choices=speed.DTYPES, metavar="DTYPE")
    command.add_argument(
        "--elements", type=int, metavar="N",
        help="shrink the tensors of larger lists (default: 4 Mi on the CPU, not at all on a GPU)",
    )  # fmt: skip
    command.add_argument("--repeats", type=int, default=20, help="rounds (default: 20)")
    command.add_argument("--json", metavar="FILE", help="or a folder; written anew after each list")

    command = commands.add_parser("plot", help="draw a record of speed, and one of memory if there is one")
    command.set_defaults(run=_plot)
    command.add_argument("record", metavar="RECORD")
    command.add_argument("--memory", metavar="FILE")
    command.add_argument("--out", metavar="DIR", default=".", help="default: here")

    command = commands.add_parser("sanitize", help="a few launches for compute-sanitizer, checked")
    command.set_defaults(run=_sanitize)
    command.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: cuda")

    command = commands.add_parser("host", help="what a call costs the host, without a GPU")
    command.set_defaults(run=_host)
    command.add_argument("--pairs", type=int, nargs="+", default=[291], metavar="N", help="default: 291")
    command.add_argument("--repeats", type=int, default=300, help="timed calls (default: 300)")
    command.add_argument("--json", metavar="FILE")

    command = commands.add_parser(
        "shards", help="what several ranks put on the wire, and how far updates move with their number"
    )
    command.set_defaults(run=_shards)
    command.add_argument(
        "--shards", type=int, nargs="+", metavar="N", help="simulated (default: 1 2 3 8 64 255 1024)"
    )  # fmt: skip
    command.add_argument("--rule", nargs="+", choices=RULES, metavar="RULE")
    command.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"])
    command.add_argument("--json", metavar="FILE")

    command = commands.add_parser("memory", help="peak memory of an unlearning step, and passes it adds")
    command.set_defaults(run=_memory)
    command.add_argument("--shape", choices=["small", "llama-3-8b"], default="small", help="default: small")
    command.add_argument("--hidden", type=int, help="in place of the shape's, as the next two")
    command.add_argument("--layers", type=int)
    command.add_argument("--vocabulary", type=int)
    command.add_argument(
        "--rule", nargs="+", choices=RULES, default=["sago", "pcgrad_global"], metavar="RULE",
        help="default: sago pcgrad_global",
    )  # fmt: skip
    command.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float32"],
        help="default: both; bfloat16 for llama-3-8b",
    )  # fmt: skip
    command.add_argument("--micro-batches", type=int, default=2, metavar="N", help="default: 2")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    command.add_argument("--json", metavar="FILE")

    options = parser.parse_args(arguments)
    result: int = options.run(options)
    return result


def _compile(options: argparse.Namespace) -> int:
    from benchmarks import compile

    record = compile.run(options.arch or compile.ARCHS, options.quick, options.jobs)
    if options.json:
        write_json(options.json, record)
    print(table([compile.shown(row) for row in record["rows"]], compile.COLUMNS))
    failed = sum(bool(row["failures"]) for row in record["rows"])
    print(f"\n{len(record['rows'])} configurations, {failed} with failures (Triton {record['triton']})")
    return 1 if failed else 0


def _cpu(options: argparse.Namespace) -> int:
    from benchmarks import cpu
    from benchmarks.gradients import WrongResult

    try:
        if options.accuracy:
            record, columns = cpu.accuracy(options.elements), cpu.ACCURACY_COLUMNS
        else:
            record = cpu.run(options.elements, options.tensors, options.repeats)
            columns = cpu.COLUMNS
    except WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, record)
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "rows"), end="\n\n")
    print(table(record["rows"], columns))
    return 0


def _speed(options: argparse.Namespace) -> int:
    most = 1 << 22 if options.elements is None and options.device == "cpu" else options.elements
    record = speed.run(
        options.device,
        options.suite,
        options.workload,
        options.rule,
        options.dtype,
        most,
        options.repeats,
        write=lambda so_far: write_json(options.json, so_far) if options.json else None,
    )
    shown = ("workloads", "targets", "rows")
    print(", ".join(f"{key} {value}" for key, value in record.items() if key not in shown), end="\n\n")
    print(table(record["rows"], speed.COLUMNS))
    if record["targets"]:
        print("\n" + table(record["targets"], ("target", "bound", "found", "met")))
    # A peer that does not fit in memory is a result.
    return int(any(row["note"] not in (None, "out of memory") for row in record["rows"]))


def _plot(options: argparse.Namespace) -> int:
    from benchmarks import plot

    for path in plot.draw(options.record, options.memory, options.out):
        print(path)
    return 0


def _sanitize(options: argparse.Namespace) -> int:
    from benchmarks import sanitize

    print(f"{sanitize.run(options.device)} syntheses as the reference has them")
    return 0


def _host(options: argparse.Namespace) -> int:
    from benchmarks import host

    record = host.run(options.pairs, options.repeats)
    if options.json:
        write_json(options.json, record)
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "rows"), end="\n\n")
    print(table(record["rows"], host.COLUMNS))
    return 0


def _shards(options: argparse.Namespace) -> int:
    from benchmarks import shards, wire
    from benchmarks.gradients import WrongResult

    dtypes = [getattr(torch, dtype) for dtype in options.dtype or ()]
    try:
        record = shards.run(
            options.shards or shards.SHARDS, options.rule or shards.RULES, dtypes or shards.DTYPES
        )
    except WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, record)
    tables = ("engines", "tables", "latencies", "rows")
    print(", ".join(f"{key} {value}" for key, value in record.items() if key not in tables), end="\n\n")
    print(table(record["engines"], wire.ENGINE_COLUMNS), end="\n\n")
    print(table(record["tables"], tuple(record["tables"][0])), end="\n\n")
    print(table(record["latencies"], wire.LATENCY_COLUMNS), end="\n\n")
    print(table(record["rows"], shards.COLUMNS))
    return 0


def _memory(options: argparse.Namespace) -> int:
    from benchmarks import memory

    # libkineto, which counts the memory of the CPU, announces the start and stop of every count on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    named = {name: getattr(options, name) for name in ("hidden", "layers", "vocabulary")}
    shape = memory.SHAPES[options.shape]._replace(**{k: v for k, v in named.items() if v is not None})
    dtypes = options.dtype or ["bfloat16", "float32"][: 1 if options.shape == "llama-3-8b" else 2]
    try:
        record = memory.run(
            shape,
            options.rule,
            [getattr(torch, dtype) for dtype in dtypes],
            options.device,
            options.micro_batches,
        )
    except memory.WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, record, "-memory")
    print(", ".join(f"{k} {v}" for k, v in record.items() if k not in ("sizes", "rows")))
    for dtype, sizes in record["sizes"].items():
        print(f"{dtype}:", ", ".join(f"{k} {v:.4g}" for k, v in sizes.items()))
    print()
    print(table(record["rows"], memory.COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
