"""Reads the PTX of one kernel: its parameters, and its instructions in segments without a branch."""

from __future__ import annotations

import re
from typing import NamedTuple

THREADS = 128
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,)]*?(\w+)\s*[,\n]")


class Unknown(Exception):
    """Code that the emulator cannot execute. It does not say that a kernel is wrong."""


class Instruction(NamedTuple):
    """`@predicate opcode operands`.

    Attributes:
        opcode: The parts between the dots.
        operands: Registers, constants, `[address]` and `{a, b}` as they are written.
        predicate: A register, or None. If `negated`, the instruction runs where it is false.
        text: The instruction and the line of the source that it belongs to, for messages.
    """

    opcode: tuple[str, ...]
    operands: list[str]
    predicate: str | None
    negated: bool
    text: str


class Program(NamedTuple):
    """A kernel.

    Attributes:
        parameters: The type of each parameter, such as `u64`.
        segments: Runs of instructions. Only the last of a run branches, waits or writes to global memory.
        labels: The segment at which each label stands.
    """

    parameters: list[str]
    segments: list[list[Instruction]]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Reads a module with one kernel of 128 threads."""
    head, body = re.sub(r"//.*", "", ptx).split(".entry", 1)[1].split("{", 1)
    if f".reqntid {THREADS}" not in head:
        raise Unknown(f"The kernel should have {THREADS} threads. Found: {head}")
    parameters = [kind for kind, _ in _PARAMETER.findall(head.split(")")[0] + "\n")]
    files = dict(re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^"/]+)"', ptx))
    segments: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    where = ""
    for statement in _statements(body.split("\n}")[0]):
        if statement.startswith("."):
            location = re.match(r"\.loc\s+(\d+)\s+(\d+)", statement)
            if location:
                where = f"{files.get(location[1], '?')}:{location[2]}"
            continue
        if statement.endswith(":"):
            if not statement.startswith(("$L__tmp", "$L__func")):
                if segments[-1]:
                    segments.append([])
                labels[statement[:-1]] = len(segments) - 1
            continue
        found = _STATEMENT.fullmatch(statement)
        if found is None:
            raise Unknown(f"Unknown statement: {statement!r}")
        negated, predicate, opcode, operands = found.groups()
        text = f"{' '.join(statement.split())}  [{where}]"
        one = Instruction(tuple(opcode.split(".")), _split(operands), predicate, negated == "!", text)
        segments[-1].append(one)
        if one.opcode[0] in ("bra", "ret", "bar", "atom") or one.opcode[:2] == ("st", "global"):
            segments.append([])
    return Program(parameters, segments, labels)


def _statements(body: str) -> list[str]:
    """Statements end with a semicolon, labels with a colon, directives with the line."""
    found, pending = [], ""
    for line in body.splitlines():
        line = line.strip()
        if not pending and (line.startswith(".") or re.fullmatch(r"\$\w+:", line)):
            found.append(line)
            continue
        pending = f"{pending} {line}".strip()
        while ";" in pending:
            statement, pending = pending.split(";", 1)
            found.append(statement.strip())
            pending = pending.strip()
    return [statement for statement in found if statement]


def _split(operands: str) -> list[str]:
    """Splits at the commas that stand in no bracket."""
    found, depth = [""], 0
    for c in operands:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [x.strip() for x in found if x.strip()]
