"""The record of an experiment: everything that text and plots come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

import sago
from benchmarks.measure import origin
from examples.grid import Grid

SOURCES = (
    *(f"examples/{name}.py" for name in ("grid", "losses", "objectives", "recovery", "runs", "unlearn")),
    "examples/worlds",
    "sago",
)


ORIGIN = ("date", "cpu", "python", "torch", "transformers", "sago", "source")


def record_of(
    name: str,
    grid: Grid,
    worlds: Sequence[dict[str, Any]],
    trials: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    noise: Sequence[dict[str, Any]],
    workers: int,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a grid on the world called `name`, with `workers` processes of one thread each.

    `noise` has what `first_steps` returns for each floor. `earlier` says where the trials come from, if they
    are those of an earlier record.
    """
    return {
        **origin("cpu", *SOURCES),
        "sago": sago.__version__,
        "transformers": transformers.__version__,
        "workers": workers,
        "trials_from": earlier,
        "world": name,
        "grid": asdict(grid),
        "noise": list(noise),
        "worlds": list(worlds),
        "trials": list(trials),
        "runs": list(runs),
    }


def write(record: Mapping[str, Any], path: Path) -> None:
    """JSON with one line for each world and each run."""
    parts = []
    for name, value in record.items():
        if name in ("noise", "worlds", "trials", "runs"):
            text = "[\n  " + ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f' "{name}": {text}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
