"""Code that all benchmarks share: the printed table, the JSON record and its origin."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def percentile(values: Sequence[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as aligned text. Numbers are aligned to the right, and None is printed as `-`."""
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


def judge(row: Mapping[str, Any], targets: Iterable[tuple[str, str, float]]) -> dict[str, str | None]:
    """Returns the targets of a row, each a field, `<=` or `>=` and a bound, and whether they are met.

    A field without a value has no target.
    """
    known = [target for target in targets if row[target[0]] is not None]
    met = [row[field] <= bound if sense == "<=" else row[field] >= bound for field, sense, bound in known]
    texts = [f"{field} {sense} {bound:g}" for field, sense, bound in known]
    return {"target": "; ".join(texts) or None, "met": "; ".join(map(_cell, met)) or None}


def write_json(path: str | Path, record: Mapping[str, Any], suffix: str = "") -> None:
    """Replaces the file at once, so that an interrupted run leaves the record that was there before.

    If `path` is a folder, the file is named after the record's device and the suffix.
    """
    path = Path(path)
    if path.is_dir():
        name = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
        path = path / f"{name}{suffix}.json"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def source_hash(*paths: str) -> str:
    """Returns the start of a SHA-256 over the names and texts of these Python files and folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class StaleRecord(UserWarning):
    """The sources have changed since a record was taken."""


def origin(device: str, *sources: str) -> dict[str, Any]:
    """Describes the machine and the versions. The numbers of the record depend on the files in `sources`."""
    cuda = device != "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _driver() if cuda else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "sources": list(sources),
        "source": source_hash(*sources),
    }


def warn_if_stale(path: str | Path) -> None:
    """Warns with `StaleRecord` if the sources have changed since the record was taken."""
    record = json.loads(Path(path).read_text())
    sources = record.get("sources")
    known = sources and all((ROOT / source).exists() for source in sources)
    if not known or record["source"] != source_hash(*sources):
        named = ", ".join(sources or ["the record does not name them"])
        message = f"{Path(path).name} was taken with other sources ({named}). Take the record again."
        warnings.warn(message, StaleRecord, stacklevel=2)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
