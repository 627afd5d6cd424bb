"""Draws the runs of a record: Pareto fronts, and cosines over steps. Readable without colour."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from examples.recovery import LEVELS, Record, abilities, ability, runs_of

# Colour (the palette of Okabe and Ito, from dark to light), marker, line.
STYLES = {
    "sum": ("#000000", "o", ":"),
    "pcgrad": ("#0072B2", "s", "--"),
    "pcgrad_global": ("#D55E00", "^", "-."),
    "sago": ("#009E73", "D", "-"),
}
PROBABILITIES = (1, 0.1, 0.01, 0.001)
FLOOR = PROBABILITIES[-1]  # what is below is drawn there
COSINES = {
    "cos_forget_retain": "cos(f, r)",
    "cos_update_retain": "cos(u, r)",
    "cos_update_forget": "cos(u, f)",
}

Point = tuple[float, float]


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes `pareto.png` and `cosines.png` to `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"pareto.png": pareto(record), "cosines.png": cosines(record)}
    return [save(figure, folder / name) for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure with 128 colours, which makes the file small."""
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)
    return path


def front(points: Sequence[Point]) -> list[Point]:
    """Of (forget probability, ability) those that no other point beats in both, by rising probability. The
    last is at probability 1: what has forgotten more counts there too."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return [*kept, (1.0, kept[-1][1])]


def pareto(record: Record) -> Figure:
    """An ability against the probability of the forget answers: every measurement of every run, and the front
    of each rule."""
    grid = record["grid"]
    names = abilities(record["runs"][0])
    figure, panels = _panels(names, grid["objectives"])
    for (name, objective), axes in panels.items():
        for rule in grid["rules"]:
            color, marker, line = STYLES[rule]
            points = [
                (max(x, FLOOR), 100 * y)
                for rate in grid["rates"]
                for run in runs_of(record, objective, rule, rate)
                for x, y in zip(run["known"]["forget"]["probability"], ability(run, name), strict=True)
            ]
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=4, alpha=0.35, mew=0)
            x, y = zip(*front(points), strict=True)
            axes.plot(x, y, line, marker=marker, color=color, markersize=4.5, label=rule)
        for level in LEVELS:
            axes.axvline(level, color="0.6", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlim=(1.2, FLOOR / 1.2), ylim=(-3, 108))
        axes.set_xticks(PROBABILITIES, ["1", "0.1", "0.01", "≤ 0.001"])
    for objective in grid["objectives"]:
        panels[names[-1], objective].set_xlabel("mean probability of a forget answer")
    for name in names:
        panels[name, grid["objectives"][0]].set_ylabel(f"{name} (% of before)")
    _finish(
        figure,
        panels,
        "Recovery of abilities against forgetting, which grows to the right: all measurements, and the front "
        f"of each rule\n{len(grid['seeds'])} seeds, every learning rate of the results; vertical lines: "
        "the levels " + ", ".join(f"{level:g}" for level in LEVELS),
    )
    return figure


def cosines(record: Record) -> Figure:
    """The three cosines over steps, with the smaller of the learning rates of each rule."""
    grid = record["grid"]
    figure, panels = _panels(tuple(COSINES), grid["objectives"])
    for (name, objective), axes in panels.items():
        for i, rule in enumerate(grid["rules"]):
            found = (runs_of(record, objective, rule, rate) for rate in grid["rates"])
            series = [run["steps"][name] for run in next(filter(None, found))]
            _lines(axes, series, rule, (i, len(grid["rules"])))
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_ylim(-1.05, 1.05)
    for objective in grid["objectives"]:
        panels["cos_update_forget", objective].set_xlabel("step")
    for name, label in COSINES.items():
        panels[name, grid["objectives"][0]].set_ylabel(label)
    _finish(
        figure,
        panels,
        "Cosines of the forget gradient f, the retain gradient r and the update u\n"
        f"means over {len(grid['seeds'])} seeds with the smaller learning rate of each rule, bands from the "
        "smallest to the largest; a run ends when it has forgotten",
    )
    return figure


def _lines(axes: Axes, series: Sequence[Sequence[float]], rule: str, markevery: tuple[int, int]) -> None:
    """The mean of the runs that have a step, and the range from the least to the most in a lighter tone."""
    color, marker, line = STYLES[rule]
    columns = [
        [values[i] for values in series if i < len(values)]
        for i in range(max(len(values) for values in series))
    ]
    steps = range(1, len(columns) + 1)
    axes.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.1, linewidth=0
    )
    means = [statistics.fmean(column) for column in columns]
    axes.plot(steps, means, line, marker=marker, markevery=markevery, color=color, markersize=4, label=rule)


def _panels(rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    figure = Figure(figsize=(10, 0.9 + 2.4 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    panels = {
        (row, column): axes
        for row, line in zip(rows, grid, strict=True)
        for column, axes in zip(columns, line, strict=True)
    }
    for column in columns:
        panels[rows[0], column].set_title(column, fontsize="medium")
    return figure, panels


def _finish(figure: Figure, panels: Mapping[tuple[str, str], Axes], title: str) -> None:
    for axes in panels.values():
        axes.grid(True, color="0.92")
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize="medium")
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=4
    )
