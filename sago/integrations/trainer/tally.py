"""The values that the mixin adds to the logs of a trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sago.core.report import SynthesisReport
from sago.integrations.once import warn_once
from sago.integrations.trainer.weights import SIDES

_NORMS = ("norm_forget", "norm_retain", "norm_update")
_COSINES = ("cos_forget_retain", "cos_update_forget", "cos_update_retain")
_LOGGED = (
    *_COSINES,
    "conflict_fraction",
    *_NORMS,
    "nonfinite_forget",
    "nonfinite_retain",
)


class Tally:
    """The losses since the last log, and the last synthesis.

    The accumulators are made again if the trained parameters change, which may be between two logs.

    Attributes:
        losses: The sums of the forget and the retain losses of all micro-batches since the last log.
    """

    def __init__(self) -> None:
        self.losses = torch.zeros(2)
        self._count = 0
        self._report: SynthesisReport | None = None
        self._weights = (1.0, 1.0)
        self._scale: Any = 1.0

    def add(self, losses: Tensor) -> None:
        """Adds the two losses of a micro-batch."""
        self.losses = losses if self._count == 0 else self.losses + losses
        self._count += 1

    def synthesized(self, report: SynthesisReport, weights: tuple[float, float], scale: Any) -> None:
        """Records a synthesis, its weights, and the scale of its losses."""
        self._report, self._weights, self._scale = report, weights, scale

    def summary(self, accelerator: Any) -> dict[str, float]:
        """The values to log. Waits for the device."""
        if self._report is None or self._count == 0:
            return {}
        forget, retain = accelerator.reduce(self.losses / self._count, reduction="mean").tolist()
        self._count = 0
        found = self._report.summary()
        for warning in self._report.warnings():
            warn_once("noise", warning)
        self._check_same_weights(accelerator)
        scale = float(self._scale)
        logged = {n: found[n] / scale if n in _NORMS else found[n] for n in _LOGGED if n in found}
        logged = {n: x for n, x in logged.items() if n not in _COSINES or not math.isnan(x)}
        return {"forget_loss": forget, "retain_loss": retain, **logged}

    def _check_same_weights(self, accelerator: Any) -> None:
        """Raises if the ranks used different weights. It is part of logging, which waits for the ranks."""
        weights = torch.tensor([self._weights], device=accelerator.device)
        for name, values in zip(SIDES, accelerator.gather(weights).unbind(1), strict=True):
            if len(set(values.tolist())) > 1:
                raise ValueError(
                    f"`self.{name}` should be the same on every rank, because it is a weight of the update "
                    f"and not of the local loss. Found {values.tolist()}. Average what it is computed from "
                    "over the ranks, for example with accelerator.reduce."
                )
