"""`python -m benchmarks`: the commands, their tables and records."""

from __future__ import annotations

import argparse
import sys

from benchmarks.measure import table, write_json


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

    try:
        if options.accuracy:
            record, columns = cpu.accuracy(options.elements), cpu.ACCURACY_COLUMNS
        else:
            record = cpu.run(options.elements, options.tensors, options.repeats)
            columns = cpu.COLUMNS
    except cpu.WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, record)
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "rows"), end="\n\n")
    print(table(record["rows"], columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
