"""The record of the experiment: everything that text and plots come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

import sago
from benchmarks.measure import origin
from examples.grid import Setup

SOURCES = tuple(
    f"examples/{name}.py"
    for name in ("general", "grid", "learn", "objectives", "people", "sweep", "unlearn", "world")
)


def record_of(
    setup: Setup,
    models: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    seconds: Mapping[str, float],
    workers: int,
) -> dict[str, Any]:
    """`seconds` of the wall clock, with `workers` processes of one thread each."""
    return {
        **origin("cpu", *SOURCES),
        "sago": sago.__version__,
        "transformers": transformers.__version__,
        "workers": workers,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "setup": asdict(setup),
        "models": list(models),
        "runs": list(runs),
    }


def write(record: Mapping[str, Any], path: Path) -> None:
    """JSON with one line for each model and each run."""
    parts = []
    for name, value in record.items():
        if name in ("models", "runs"):
            text = "[\n  " + ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f' "{name}": {text}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
