"""Draws a record of the sweep: Pareto fronts, losses and cosines over steps. Readable without colour."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from examples.recovery import ABILITIES, LEVELS, runs_of

# Colour (the palette of Okabe and Ito, from dark to light), marker, line.
STYLES = {
    "sum": ("#000000", "o", ":"),
    "pcgrad": ("#0072B2", "s", "--"),
    "pcgrad_global": ("#D55E00", "^", "-."),
    "sago": ("#009E73", "D", "-"),
}
PROBABILITIES = (1, 0.1, 0.01, 0.001)
FLOOR = PROBABILITIES[-1]  # what is below is drawn there
LOSSES = (0.01, 0.1, 1, 10)
COSINES = {
    "cos_forget_retain": "cos(f, r)",
    "cos_update_retain": "cos(u, r)",
    "cos_update_forget": "cos(u, f)",
}

Record = Mapping[str, Any]
Run = Mapping[str, Any]
Point = tuple[float, float]


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes `pareto.png`, `losses.png` and `cosines.png` to `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"pareto": pareto(record), "losses": losses(record), "cosines": cosines(record)}
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=100)
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(128)
        small.save(path, optimize=True)
    return paths


def front(points: Sequence[Point]) -> list[Point]:
    """Of (forget probability, ability) those that no other point beats in both, by rising probability. The
    last is at probability 1: what has forgotten more counts there too."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return [*kept, (1.0, kept[-1][1])]


def pareto(record: Record) -> Figure:
    """An ability against the probability of the forget answers: means over seeds of every measurement with
    every learning rate, and the front of these for each rule."""
    setup = record["setup"]
    figure, panels = _panels(ABILITIES, setup["objectives"])
    for (ability, objective), axes in panels.items():
        for rule in setup["rules"]:
            color, marker, line = STYLES[rule]
            points: list[Point] = []
            for rate in setup["rates"]:
                runs = runs_of(record, objective, rule, rate)
                forget = _mean([run["known"]["forget"]["probability"] for run in runs])
                right = _mean([run["known"][ability]["answers"] for run in runs])
                points += [(max(x, FLOOR), 100 * y) for x, y in zip(forget, right, strict=True)]
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=3, alpha=0.25, mew=0)
            x, y = zip(*front(points), strict=True)
            axes.plot(x, y, line, marker=marker, color=color, markersize=4.5, label=rule)
        axes.axvline(LEVELS[0], color="0.6", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlim=(1.2, FLOOR / 1.2), ylim=(-3, 103))
        axes.set_xticks(PROBABILITIES, ["1", "0.1", "0.01", "≤ 0.001"])
    for objective in setup["objectives"]:
        panels[ABILITIES[-1], objective].set_xlabel("mean probability of a forget answer")
    for ability in ABILITIES:
        panels[ability, setup["objectives"][0]].set_ylabel(f"{ability} answers right (%)")
    rates = ", ".join(f"{rate:g}" for rate in setup["rates"])
    _finish(
        figure,
        panels,
        "Ability against forgetting, which grows to the right: all measurements, and the front of each rule\n"
        f"means over {len(setup['seeds'])} seeds; learning rates {rates}; "
        f"vertical line: probability {LEVELS[0]:g}",
    )
    return figure


def losses(record: Record) -> Figure:
    """The NLL of forget, retain and general answers over steps."""
    setup = record["setup"]
    rate = setup["rates"][0]
    figure, panels = _panels(("forget", "retain", "general"), setup["objectives"])
    steps = range(0, setup["steps"] + 1, setup["every"])
    for (name, objective), axes in panels.items():
        for rule in setup["rules"]:
            series = [run["known"][name]["loss"] for run in runs_of(record, objective, rule, rate)]
            _lines(axes, steps, series, rule, markevery=1)
        axes.set(yscale="log", ylim=(5e-3, 40))
        axes.set_yticks(LOSSES, [f"{value:g}" for value in LOSSES])
    for objective in setup["objectives"]:
        panels["general", objective].set_xlabel("step")
    for name in ("forget", "retain", "general"):
        panels[name, setup["objectives"][0]].set_ylabel(f"{name} loss (nats a token)")
    _finish(figure, panels, f"Losses while unlearning, learning rate {rate:g}\n{_seeds(setup)}")
    return figure


def cosines(record: Record) -> Figure:
    """The three cosines over steps."""
    setup = record["setup"]
    rate = setup["rates"][0]
    figure, panels = _panels(tuple(COSINES), setup["objectives"])
    for (name, objective), axes in panels.items():
        for i, rule in enumerate(setup["rules"]):
            series = [run["cosines"][name] for run in runs_of(record, objective, rule, rate)]
            steps = range(1, setup["steps"] + 1)
            _lines(axes, steps, series, rule, markevery=(i, len(setup["rules"])))
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_ylim(-1.05, 1.05)
    for objective in setup["objectives"]:
        panels["cos_update_forget", objective].set_xlabel("step")
    for name, label in COSINES.items():
        panels[name, setup["objectives"][0]].set_ylabel(label)
    _finish(
        figure,
        panels,
        "Cosines of the forget gradient f, the retain gradient r and the update u, "
        f"learning rate {rate:g}\n{_seeds(setup)}",
    )
    return figure


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def _lines(
    axes: Axes,
    steps: Sequence[int],
    series: Sequence[Sequence[float]],
    rule: str,
    markevery: int | tuple[int, int],
) -> None:
    """The mean over seeds, and what lies between the least and the most in a lighter tone."""
    color, marker, line = STYLES[rule]
    low, high = zip(*((min(values), max(values)) for values in zip(*series, strict=True)), strict=True)
    axes.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
    axes.plot(
        steps, _mean(series), line, marker=marker, markevery=markevery, color=color, markersize=4, label=rule
    )


def _seeds(setup: Mapping[str, Any]) -> str:
    return f"means over {len(setup['seeds'])} seeds, bands from the least to the most"


def _panels(rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    figure = Figure(figsize=(10, 0.9 + 2.4 * len(rows)), layout="constrained")
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
