"""Published data from files on this machine: what is missing or malformed is an error that says where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """A JSON object of a file. `where` is for messages: the file and the line, or the position in a list."""

    value: dict[str, Any]
    where: str

    def get(self, field: str, kind: type) -> Any:
        """The value of a field that has to be there and of this type."""
        found = self.value.get(field)
        if field not in self.value:
            fields = ", ".join(f"`{name}`" for name in self.value) or "none"
            raise ValueError(f"{self.where}: a record should have the field `{field}`. Found {fields}.")
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ValueError(
                f"{self.where}: field `{field}` should be {kind.__name__}. Found {type(found).__name__}."
            )
        return found

    def get_strings(self, field: str, least: int = 1) -> list[str]:
        """The value of a field that has to be a list of strings."""
        found = self.get(field, list)
        if len(found) < least or not all(isinstance(x, str) for x in found):
            raise ValueError(
                f"{self.where}: field `{field}` should be at least {least} strings. Found {found!r:.80}."
            )
        return found


def existing(path: Path, published: str) -> Path:
    """`path`, if there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. It is published as {published}.")
    return path


def records(path: Path, published: str) -> list[Record]:
    """The JSON objects of a file that has one a line, or all in one list.

    Raises:
        FileNotFoundError: With where it is published.
        ValueError: For a line that is no JSON object, with its number, and for a file without records.
    """
    text = existing(path, published).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        found = [Record(value, f"{path}, record {i}") for i, value in enumerate(_parsed(text, str(path)))]
    else:
        found = [
            Record(_parsed(line, f"{path}, line {i}"), f"{path}, line {i}")
            for i, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    for value, where in found:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a record should be a JSON object. Found {type(value).__name__}.")
    if not found:
        raise ValueError(f"{path} should hold at least one record. Found none.")
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: this should be JSON. Found {text.strip()[:40]!r}: {error}.") from error


def texts(path: Path, published: str, shortest: int = 1) -> list[str]:
    """The field `text` of each record of a .json or .jsonl file, or the lines of any other.

    Those of fewer than `shortest` characters are left out.
    """
    if path.suffix in (".json", ".jsonl"):
        found = [record.get("text", str) for record in records(path, published)]
    else:
        found = existing(path, published).read_text(encoding="utf-8").split("\n")
    found = [text for text in found if len(text.strip()) >= shortest]
    if not found:
        raise ValueError(f"{path} should hold texts of at least {shortest} characters. Found none.")
    return found


def write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_list(path: Path, values: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(list(values), indent=4), encoding="utf-8")
