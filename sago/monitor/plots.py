"""The pictures of reports. Only this file needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sago.core.report import SynthesisReport
from sago.monitor.places import places

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Pictures need matplotlib. Found none. Run `pip install 'sago-kernels[plot]'`.", name=error.name
    ) from error

# The fields that are drawn, with their titles. f is the forget gradient, r the retain gradient, u the update.
CONFLICTS = {"conflict_fraction": "share of conflicts"}
COSINES = {
    "cos_forget_retain": "cos(f, r)",
    "cos_update_retain": "cos(u, r)",
    "cos_update_forget": "cos(u, f)",
}
NORMS = {"norm_forget": "|f|", "norm_retain": "|r|", "norm_update": "|u|"}
WHOLE = "all kinds"  # the label of groups that are whole layers
LINES = (("#000000", ":"), ("#0072B2", "-"), ("#D55E00", "--"))  # readable without colours, too


def heat_maps(report: SynthesisReport) -> Figure:
    """The share of conflicts and the cosines, by kind of parameter (vertical) and layer (horizontal)."""
    shown = {**CONFLICTS, **COSINES}
    shown = {name: title for name, title in shown.items() if name not in report.absent}
    if not shown:
        raise ValueError(
            "Parameter `report` should have the share of conflicts or a cosine. Found neither. Call the "
            "synthesis with stats=True."
        )
    found, values = _by_place(report, places(report.groups))
    kinds = list(dict.fromkeys(place.kind for place in found))
    layers = sorted({place.layer for place in found}, key=lambda layer: -1 if layer is None else layer)
    wide, high = min(1.5 + 0.16 * len(layers), 8.0), min(0.9 + 0.2 * len(kinds), 12.0)
    lines = -(-len(shown) // 2)
    figure = Figure(figsize=(2.5 + 2 * wide, lines * high), layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False, sharey=True).flat)
    for axes, (name, title) in zip(panels, shown.items(), strict=False):
        cells = [[math.nan] * len(layers) for _ in kinds]
        for place, value in zip(found, values[name], strict=True):
            cells[kinds.index(place.kind)][layers.index(place.layer)] = value
        rows, columns = [kind or WHOLE for kind in kinds], [_label(layer) for layer in layers]
        _image(axes, cells, rows, columns, name, title)
        if layers != [None]:
            axes.set_xlabel("layer")
    for axes in panels[len(shown) :]:
        axes.remove()
    return figure


def trajectories(reports: Mapping[int, SynthesisReport]) -> Figure:
    """The cosines, the share of conflicts and the norms over the steps, and the cosines of each layer."""
    if not reports:
        raise ValueError("A picture needs a report. Found none. Call add() after a synthesis.")
    steps = list(reports)
    totals = [report.summary() for report in reports.values()]
    panels = [
        panel for panel in (COSINES, CONFLICTS, NORMS) if any(n in row for row in totals for n in panel)
    ]
    by_layer = [_cosines_by_layer(report) for report in reports.values()]
    layers = sorted({layer for row in by_layer for layer in row})
    figure = Figure(figsize=(8.0, 2.2 * (len(panels) + bool(layers))), layout="constrained")
    every = figure.subplots(len(panels) + bool(layers), 1, squeeze=False)[:, 0]
    for axes, panel in zip(every, panels, strict=False):
        for (name, title), (color, dashes) in zip(panel.items(), LINES, strict=False):
            values = [row.get(name, math.nan) for row in totals]
            axes.plot(steps, values, color=color, linestyle=dashes, marker=".", label=title)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(panel), frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel is NORMS:
            sizes = [v for row in totals for name in panel if 0.0 < (v := row.get(name, 0.0)) < math.inf]
            if sizes and max(sizes) >= 10 * min(sizes):  # the labels of a shorter logarithmic axis overlap
                axes.set_yscale("log")
        else:
            axes.set_ylim(-1.05 if panel is COSINES else -0.05, 1.05)
    if layers:
        cells = [[row.get(layer, math.nan) for row in by_layer] for layer in layers]
        labels = [str(layer) for layer in layers], [str(step) for step in steps]
        _image(every[-1], cells, *labels, "cos_forget_retain", "cos(f, r) by layer", most=8)
        every[-1].set_ylabel("layer")
    every[-1].set_xlabel("step")
    return figure


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Writes the figure to `path`, unless it is None. Returns the figure."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _by_place(report: SynthesisReport, keys: Sequence[Any]) -> tuple[list[Any], dict[str, list[float]]]:
    merged = report.regroup(keys)
    return list(merged.groups), merged.to_dict()


def _cosines_by_layer(report: SynthesisReport) -> dict[int, float]:
    """The cosine of f and r in each layer of a model that has several layers; empty for other reports."""
    found, values = _by_place(report, [place.layer for place in places(report.groups)])
    cosines = dict(zip(found, values.get("cos_forget_retain", []), strict=False))
    cosines.pop(None, None)
    return cosines if len(cosines) > 1 else {}


def _image(
    axes: Axes,
    cells: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    name: str,
    title: str,
    most: int = 30,
) -> None:
    """A heat map whose colours have the same meaning in every picture. A cell that is NaN is grey.

    At most `most` rows have a label.
    """
    cosine = name in COSINES  # of unrelated gradients it is 0, and their share of conflicts is 1/2: white
    colors = matplotlib.colormaps["RdBu" if cosine else "RdBu_r"].with_extremes(bad="#c8c8c8")
    image = axes.imshow(cells, cmap=colors, vmin=-1.0 if cosine else 0.0, vmax=1.0, aspect="auto")
    axes.set_title(title, fontsize="medium", loc="left")
    for axis, labels, count in ((axes.xaxis, columns, 16), (axes.yaxis, rows, most)):
        shown = range(0, len(labels), -(-len(labels) // count))
        axis.set_ticks(list(shown), [labels[i] for i in shown], fontsize="small")
    axes.figure.colorbar(image, ax=axes)


def _label(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
