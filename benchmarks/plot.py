"""Draws records: time against elements, fraction of the triad, ratio to each peer, memory. In greys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import CEILING
from benchmarks.workloads import SWEEP

GREYS = ("0.1", "0.6", "0.35", "0.8", "0.5", "0.95")
HATCHES = (
    "",
    "///",
    "...",
    "xxx",
    "\\\\\\",
    "ooo",
    "---",
)  # no multiple of the greys: no two series look alike
MARKERS = ("o", "s", "^", "D", "v", "x", "+", "*")
DASHES = ("-", "--", "-.", ":")

Row = Mapping[str, Any]
Bars = dict[str, dict[str, float]]  # by series, then by place on the axis


def draw(record: str | Path, memory: str | Path | None, folder: str | Path) -> list[Path]:
    """Writes PNG files to `folder` and returns their paths; none for what has no rows."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(Path(record).read_text())
    where = f"{found['device'] if found['device'] != 'cpu' else found['cpu']}, torch {found['torch']}"
    sizes = {name: of["elements"] for name, of in found["workloads"].items()}
    timed = [{**row, "elements": sizes[row["workload"]]} for row in found["rows"] if row["ms"] is not None]
    figures = {
        "time": _time,
        "triad": _triad,
        "peers": _peers,
    }
    paths = []
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        rows = [row for row in timed if row["dtype"] == dtype]
        for name, figure in figures.items():
            paths += _save(folder / f"{name}-{dtype}.png", f"{dtype}, {where}", figure, rows)
    if memory is not None:
        found = json.loads(Path(memory).read_text())
        rows = [row for row in found["rows"] if row["copies"] is not None]
        title = f"peak memory of a step, {found['elements'] / 1e6:.0f} M parameters, {found['device']}"
        paths += _save(folder / "memory.png", title, _memory, rows)
    return paths


def label(row: Row) -> str:
    """A contender with its rule and mode."""
    name = row["contender"] if row["contender"] == CEILING else f"{row['contender']}, {row['rule']}"
    return name + ", statistics" * bool(row["stats"]) + ", graph" * (row["mode"] == "graph")


def ratios(rows: Sequence[Row]) -> Bars:
    """A peer's time over that of `sago.synthesize_` with statistics; by peer, then by list and rule."""
    ours = {
        (row["workload"], row["rule"]): row["ms"]
        for row in rows
        if row["contender"] == "sago.synthesize_" and row["stats"] and row["mode"] == "eager"
    }
    bars: Bars = {}
    for row in rows:
        key = row["workload"], row["rule"]
        if row["stats"] is None and key in ours and row["workload"] not in SWEEP:
            bars.setdefault(row["contender"], {})["\n".join(key)] = row["ms"] / ours[key]
    return bars


def _time(axes: Axes, rows: Sequence[Row]) -> bool:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["workload"] in SWEEP:
            lines.setdefault(label(row), []).append((row["elements"], row["ms"]))
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(
            x,
            y,
            color=GREYS[i % 3],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)],
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="elements of one tensor", ylabel="time of a call (ms)")
    return bool(lines)


def _triad(axes: Axes, rows: Sequence[Row]) -> bool:
    bars: Bars = {}
    for row in rows:
        shown = row["contender"] in ("sago.synthesize_", "torch.compile, flat", "torch.add, foreach")
        shown &= row["mode"] == "eager" and row["rule"] in ("add", "sago", "pcgrad")
        if shown and row["workload"] not in SWEEP and row["of_triad"] is not None:
            bars.setdefault(label(row), {})[row["workload"]] = row["of_triad"]
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set(xlabel="list of gradients", ylabel="bandwidth, fraction of torch.add in place")
    return _bars(axes, bars)


def _peers(axes: Axes, rows: Sequence[Row]) -> bool:
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set(xlabel="list and rule", ylabel="time over that of sago with statistics")
    axes.set_yscale("log")
    return _bars(axes, ratios(rows))


def _memory(axes: Axes, rows: Sequence[Row]) -> bool:
    bars: Bars = {}
    for row in rows:
        bars.setdefault(f"{row['contender']}, {row['rule']}", {})[row["dtype"]] = row["copies"]
    axes.set(xlabel="dtype of the gradients", ylabel="peak above the weights (copies of the gradients)")
    return _bars(axes, bars)


def _bars(axes: Axes, bars: Bars) -> bool:
    places = list(dict.fromkeys(place for series in bars.values() for place in series))
    width = 0.8 / max(1, len(bars))
    for i, (name, series) in enumerate(bars.items()):
        x = [places.index(place) + (i - (len(bars) - 1) / 2) * width for place in series]
        axes.bar(
            x,
            list(series.values()),
            width,
            color=GREYS[i % len(GREYS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="0",
            label=name,
        )
    axes.set_xticks(range(len(places)), places)
    return bool(bars)


def _save(
    path: Path, title: str, figure: Callable[[Axes, Sequence[Row]], bool], rows: Sequence[Row]
) -> list[Path]:
    canvas = Figure(figsize=(10, 5), layout="constrained")
    axes = canvas.subplots()
    if not figure(axes, rows):
        return []
    axes.set_title(title, fontsize="medium")
    axes.grid(True, axis="y", color="0.9")
    axes.set_axisbelow(True)
    canvas.legend(loc="outside right upper", fontsize="small")
    canvas.savefig(path, dpi=120)
    return [path]
