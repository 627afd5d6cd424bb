"""The difference between the two versions of a recipe, as the documentation shows it."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from typing import Any


def lines_of(thing: Any) -> list[str]:
    """The lines of a function's body, or of a class's methods."""
    source = textwrap.dedent(inspect.getsource(thing))
    body = ast.parse(source).body[0].body
    return textwrap.dedent("\n".join(source.splitlines()[body[0].lineno - 1 :])).splitlines()


def difference(before: Any, after: Any) -> list[str]:
    """All lines of both in the form of a unified diff."""
    left, right = lines_of(before), lines_of(after)
    return [line.rstrip() for line in difflib.unified_diff(left, right, n=len(left), lineterm="")][3:]


def counts(lines: list[str]) -> tuple[int, int]:
    """Lines added and removed."""
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)
