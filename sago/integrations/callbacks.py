"""Callbacks of the transformers Trainer that keep the reports of a training or write them to a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sago.monitor.monitor import COLUMNS, ConflictMonitor, rows_of


class MonitorCallback(TrainerCallback):
    """Adds the report of every step to a monitor, without waiting for the device.

        monitor = sago.monitor.ConflictMonitor()
        trainer.add_callback(MonitorCallback(trainer, monitor))
        trainer.train()
        monitor.plot("conflicts.png")

    The step is that of the trainer, which counts from 1. A training that begins at an earlier step drops the
    reports of later steps.

    Args:
        trainer: A trainer with `GradientSynthesisMixin`.
        monitor: Where the reports are kept.
    """

    def __init__(self, trainer: Any, monitor: ConflictMonitor) -> None:
        _check_trainer(trainer)
        self._trainer, self._monitor = trainer, monitor
        self._last: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._monitor.clear(after=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._trainer.synthesis_report
        if report is not None and report is not self._last:
            self._last = report
            self._monitor.add(report, state.global_step)


class ReportWriter(TrainerCallback):
    """Appends the last report to a CSV file whenever the trainer logs: one line for each group.

        trainer.add_callback(ReportWriter(trainer, "reports.csv"))

    The columns are `step`, `group` and the fields of `sago.SynthesisReport`. The norms are those of the
    gradients as they were accumulated: under a GradScaler they contain its scale. Only the first process
    writes, and only logging waits for the device. A field that a report does not have is empty.

    Args:
        trainer: A trainer with `GradientSynthesisMixin`.
        path: The file. An existing file is continued. If a training resumes from a checkpoint, the lines of
            later steps than that of the checkpoint are removed, because these steps are repeated.
    """

    def __init__(self, trainer: Any, path: str | Path) -> None:
        _check_trainer(trainer)
        self._trainer, self._path = trainer, Path(path)
        self._last: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 or not state.is_world_process_zero or not self._path.exists():
            return
        with self._path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [list(COLUMNS)]
        kept = self._path.with_name(f"{self._path.name}.partial")
        with kept.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *(row for row in rows if int(row[0]) <= state.global_step)])
        kept.replace(self._path)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._trainer.synthesis_report
        if report is None or report is self._last:  # logs of an evaluation, for example
            return
        self._last = report
        rows = rows_of(state.global_step, report)
        if not state.is_world_process_zero:
            return
        new = not self._path.exists() or self._path.stat().st_size == 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


def _check_trainer(trainer: Any) -> None:
    if not hasattr(trainer, "synthesis_report"):
        raise TypeError(
            "Parameter `trainer` should have GradientSynthesisMixin among its bases. Found "
            f"{type(trainer).__name__}."
        )
