"""What the benchmarks share: the table, the record, the machine and the sources they were taken with."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text: numbers to the right, None as `-`."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in (columns, *cells)) for i in range(len(columns))]
    right = [any(isinstance(row.get(column), (int, float)) for row in rows) for column in columns]
    lines = []
    for line in (columns, *cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.2f}"
    return str(value)


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def source_hash(*paths: str) -> str:
    """The start of a SHA-256 over the names and texts of these Python files and folders of the repository."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
