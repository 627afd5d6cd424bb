"""`ConflictMonitor`: keeps the reports of many steps, and writes or draws them when it is asked."""

from __future__ import annotations

import copy
import csv
from collections import deque
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sago.core.report import FIELDS, SynthesisReport

COLUMNS = ("step", "group", *FIELDS)  # of a file of reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConflictMonitor:
    """Keeps the reports of the last steps on their device, without waiting for it.

        monitor = sago.monitor.ConflictMonitor()
        for step in range(steps):
            ...
            monitor.add(buckets.synthesize_(rule="sago"), step)
        monitor.to_csv("conflicts.csv")
        monitor.plot("conflicts.png")

    A report of 291 groups takes 21 KB. `add` enqueues a few copies of that size and waits for nothing, except
    for the gradients of other ranks that the report contains. The other methods wait for the device.

    On several ranks, all ranks have the same values if the report is that of whole gradients. Let one rank
    write the files. Under a GradScaler, the norms contain its scale.

    Args:
        keep: The number of steps that are kept. The oldest ones are dropped.
    """

    def __init__(self, keep: int = 1000) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"Parameter `keep` should be a positive integer. Found {keep!r}.")
        self._kept: deque[tuple[int, SynthesisReport]] = deque(maxlen=keep)

    def add(self, report: SynthesisReport, step: int | None = None) -> None:
        """Keeps a copy of the report.

        Args:
            report: The report that a synthesis returned.
            step: The step number. It must be larger than that of the last report. The default is the last
                number plus 1, or 0 for the first report.

        Raises:
            TypeError, ValueError: If `report` is no report or has no statistics, or `step` does not increase.
        """
        if not isinstance(report, SynthesisReport):
            raise TypeError(f"Parameter `report` should be a SynthesisReport. Found {type(report).__name__}.")
        last = self._kept[-1][0] if self._kept else -1
        step = last + 1 if step is None else step
        if not isinstance(step, Integral):
            raise TypeError(f"Parameter `step` should be None or an integer. Found {type(step).__name__}.")
        if step <= last:
            raise ValueError(
                f"Parameter `step` should be larger than that of the last report, {last}. Found {step}. "
                f"Call clear(after={step - 1}) before steps are repeated."
            )
        if len(report.absent) == len(FIELDS):
            raise ValueError(
                "Parameter `report` should have statistics. Found a report without any. Call the "
                "synthesis with stats=True."
            )
        self._kept.append((step, copy.copy(report)))

    def clear(self, after: int = -1) -> None:
        """Drops the reports of the steps later than `after`. By default, all reports are dropped."""
        while self._kept and self._kept[-1][0] > after:
            self._kept.pop()

    @property
    def reports(self) -> dict[int, SynthesisReport]:
        """The kept reports by their step. Reading it waits for nothing."""
        return dict(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each step and group: `step`, `group`, and the fields that the report has."""
        return [row for step, report in self._kept for row in rows_of(step, report)]

    def totals(self) -> list[dict[str, float]]:
        """One dict for each step: `step`, and the fields over all groups together."""
        return [{"step": step, **report.summary()} for step, report in self._kept]

    def to_csv(self, path: str | Path) -> None:
        """Writes `rows` to a file, which is replaced. A field that was not computed is empty."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())

    def to_tensorboard(self, writer: Any, prefix: str = "sago") -> None:
        """Writes `totals` as scalars `prefix/field`.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`.
        """
        for step, name, value in self._scalars():
            writer.add_scalar(f"{prefix}/{name}", value, step)

    def to_wandb(self, run: Any, prefix: str = "sago") -> None:
        """Logs `totals` as metrics `prefix/field` over an axis `prefix/step` of their own.

        The axis is needed because W&B drops values that are logged for an earlier step than the current one.

        Args:
            run: The run that `wandb.init` returned.
        """
        run.define_metric(f"{prefix}/step")
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        for row in self.totals():
            run.log({f"{prefix}/{name}": value for name, value in row.items() if value == value})

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the cosines, the share of conflicts and the norms over the steps.

        If the groups are names of parameters with several layers, the cosine of the two gradients in each
        layer is drawn, too. Needs matplotlib (`pip install 'sago-kernels[plot]'`).

        Args:
            path: Where the picture is written; the suffix is its format. None writes nothing.
        """
        from sago.monitor.plots import save, trajectories

        return save(trajectories(self.reports), path)

    def _scalars(self) -> Iterator[tuple[int, str, float]]:
        for row in self.totals():
            step = int(row.pop("step"))
            # A cosine of a gradient that is 0 is NaN, which is not a point of a curve.
            yield from ((step, name, value) for name, value in row.items() if value == value)


def rows_of(step: int, report: SynthesisReport) -> list[dict[str, Any]]:
    """One dict for each group of a report. Waits for the device."""
    values = report.to_dict()
    return [
        {"step": step, "group": group, **{name: column[i] for name, column in values.items()}}
        for i, group in enumerate(report.groups)
    ]
