"""Compares and averages the gradients of a window over the ranks, before its synthesis."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import torch

from sago.backends.streams import is_capturing
from sago.capture.mean import RunningMean
from sago.capture.window import Action, Window
from sago.core.pairs import Call
from sago.ranks.ddp import DataParallel
from sago.ranks.dtensor import Shards
from sago.ranks.sum_over import SumOver


class Reduction:
    """Compares what the ranks captured and the arguments of their synthesis, and averages the gradients.

    The host waits for each comparison, which raises on all ranks. While a CUDA graph is captured, nothing is
    compared, because the host cannot wait.

    Args:
        window: The window, with the gradients of this rank.
        data_parallel: The ranks over which the gradients are averaged. None if a backward or the engine
            reduces them.
        shards: How the gradients are sharded over ranks. None if they are not sharded.
        by_engine: Whether an engine reduces the gradients. The ranks may then reach different parameters.
        devices: The devices of the gradients.

    Attributes:
        windows: The number of windows whose arguments were checked. They are compared in some of them only.
    """

    def __init__(
        self,
        window: Window,
        data_parallel: DataParallel | None,
        shards: Shards | None,
        by_engine: bool,
        devices: Collection[torch.device],
    ) -> None:
        self._window, self._data_parallel, self._shards = window, data_parallel, shards
        self._by_engine, self._devices = by_engine, devices
        self._device = window.retain.views[0].device
        self.windows = 0

    @cached_property
    def _over(self) -> SumOver:
        if self._shards is not None:
            return self._shards.over
        assert self._data_parallel is not None  # one of the two makes the ranks depend on each other
        return SumOver(self._data_parallel.group)

    def check_reached(self) -> None:
        """Raises if a backward reached a sharded parameter on some ranks only. It compares once a window."""
        window, shards = self._window, self._shards
        if shards is None or self._by_engine or window.agreed or is_capturing(self._devices):
            return
        shards.over.check_same(shards.layout, self._device)
        sides = window.forget, window.retain
        same = shards.over.agree([t for side in sides for t in side.touched], self._device)
        if not all(same):
            side, i = divmod(same.index(False), len(window.params))
            name, found = sides[side].name, window.names[i]
            window.fail(f"{name} backwards reached `{found}` on some ranks only")
            raise ValueError(
                f"Parameter `{found}` should be reached by {name} backwards on every rank or on none, as "
                "the ranks reduce their gradients together. Found that some ranks only reached it, so that "
                "gradients may be mixed. On the other ranks, add 0 times its output to the loss."
            )
        window.agree()

    def check(self, call: Call | None, retain_captures: int) -> None:
        """Raises if the ranks differ in their arguments, reached parameters or numbers of captures."""
        if call is not None:
            self._check_call(call)
        self.check_reached()
        self._check_captures(retain_captures)

    def reduce(self, call: Call | None) -> None:
        """Checks and averages the gradients before they are synthesized, or unscaled without a call."""
        retain = self._window.retain
        if retain.keeps and isinstance(retain, RunningMean):
            retain.check_same(self._over)
        self.check(call, retain.captures)
        self._average()

    def _check_call(self, call: Call) -> None:
        """Raises if the arguments of the ranks differ. Compares them in the windows 1, 2, 4, 8 and so on."""
        number = self.windows + 1
        if number & (number - 1) == 0 and not is_capturing(self._devices):
            advice = "Pass the same value on every rank. Average what a weight is computed from first."
            self._over.check_equal(call.described(), self._device, advice)
        self.windows = number

    def _check_captures(self, retain_captures: int) -> None:
        """Raises if the ranks would divide their gradients by different numbers of captures."""
        forget = self._window.forget
        if not (forget.mean and self._window.allows(Action.REDUCE)) or is_capturing(self._devices):
            return
        counts = {"forget": forget.captures, "retain": retain_captures}
        named = {f"The number of {side} captures with accumulation='mean'": n for side, n in counts.items()}
        advice = "Make equally many on every rank, or divide the losses yourself with accumulation='sum'."
        self._over.check_equal(named, self._device, advice)

    def _average(self) -> None:
        data_parallel, window = self._data_parallel, self._window
        if data_parallel is None or not window.allows(Action.REDUCE):
            return
        sides = window.forget, window.retain
        trained = [p.requires_grad for p in window.params]
        data_parallel.check_reached(sides, window.names, trained)
        with window.reducing():
            data_parallel.average(sides, trained)
