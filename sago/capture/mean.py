"""A running mean of the retain gradient over windows, in the retain accumulators."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sago.capture.flat import Flat, clear
from sago.capture.side import Side
from sago.core.checks import check_kind, non_negative
from sago.ranks import dtensor
from sago.ranks.sum_over import SumOver


class RunningMean(Side):
    """A gradient that is averaged over windows: a past window weighs `decay` for each window since then.

    The accumulators hold the weighted sum. `clear` multiplies them by `decay`, and turns NaN and inf into 0.
    A gradient of the mean is that sum, divided by the sum of the weights, as in the bias correction of Adam.

    Args:
        side: The side whose accumulators are used.
        params: The parameters.
        decay: Between 0 and 1.

    Attributes:
        kept: For each parameter, whether a backward of an earlier window reached it.
        past: The sum of the weights of earlier windows, or of their captures if captures are averaged.
    """

    keeps = True

    def __init__(self, side: Side, params: Sequence[Tensor], decay: float) -> None:
        if type(side) is not Side:
            raise ValueError(
                "Parameter `retain_decay` should be None for a DeepSpeed engine at ZeRO stage 3, whose step "
                f"reads the accumulator that would hold the mean. Found {decay}."
            )
        super().__init__(side.name, Flat(side.views, side.owner, side.buffers), params)
        self.kept = [False] * len(params)
        self.past = 0.0
        self._decay, self._params = decay, params
        self._interrupted = False  # whether `clear` has multiplied a part of the buffers only

    @property
    def reached(self) -> list[bool]:
        kept = (k and p.requires_grad for k, p in zip(self.kept, self._params, strict=True))
        return [t or k for t, k in zip(self.touched, kept, strict=True)]

    def weight(self, captures: int) -> float:
        return self.past + (captures if self.mean else min(captures, 1))

    def discard(self) -> None:
        self.past = self.weight(self.captures)
        self.kept = [t or k for t, k in zip(self.touched, self.kept, strict=True)]
        super().discard()

    @torch.no_grad()
    def clear(self) -> None:
        if self._interrupted:
            self.drop()
        elif self.written:
            self._interrupted = True
            for buffer in self.buffers:
                buffer.mul_(self._decay).nan_to_num_(0.0, 0.0, 0.0)
            self.past *= self._decay
            self.written = self._interrupted = False

    def drop(self) -> None:
        self._interrupted = True
        past, self.past, self.kept = self.past, 0.0, [False] * len(self.kept)
        clear(self.buffers)
        self.written = self._interrupted = False
        if past:
            warnings.warn(
                "The running mean of the retain gradient begins again, because a gradient of the last window "
                "was not complete.",
                RuntimeWarning,
                stacklevel=4,
            )

    def warn_unused(self) -> None:
        warnings.warn(
            "zero_ keeps a retain gradient in the running mean, because it cannot be taken out again. Found "
            "one of a window that was not synthesized.",
            RuntimeWarning,
            stacklevel=4,
        )

    @torch.no_grad()
    def restore(self, shards: Sequence[Tensor | None], past: float) -> None:
        """Replaces the accumulators by saved ones, which may be these accumulators themselves."""
        for view, shard in zip(self.views, shards, strict=True):
            if shard is None:
                clear([view])
            else:
                view.copy_(shard)
        self.kept, self.past = [shard is not None for shard in shards], past
        self.written = self._interrupted = False

    def saved(self, names: Sequence[str]) -> dict[str, Any]:
        """The mean in the form that the next window begins with, for `GradientBuckets.state_dict`."""
        if len(set(names)) < len(names):
            raise ValueError(
                "The names of the parameters should differ, because the mean is saved by name. Found a name "
                "twice. Make the buckets from one module."
            )
        self.clear()
        named = zip(names, self.grads, self.kept, strict=True)
        return {"retain_mean": {n: g for n, g, kept in named if kept}, "retain_weight": self.past}

    def check_same(self, over: SumOver) -> None:
        """Raises on every rank if the weights or the parameters of the mean differ between the ranks."""
        weight = struct.unpack("<q", struct.pack("<d", self.past))[0]
        flags = [*self.kept, *(bool(weight >> i & 1) for i in range(64))]
        if not all(over.agree(flags, self.views[0].device)):
            raise ValueError(
                "The running mean of retain should have the same weight and the same parameters on every "
                "rank. Found that they differ: a capture failed, or a state was loaded, on some ranks only. "
                "Load the same checkpoint on every rank, or make new buckets."
            )


def shards_of(mean: Any, weight: Any, names: Sequence[str], retain: Side) -> list[Tensor | None]:
    """The shards of a saved mean, one for each parameter. Raises if they do not fit."""
    if not isinstance(mean, Mapping):
        raise TypeError(f"Parameter `state['retain_mean']` should be a dict. Found {type(mean).__name__}.")
    if mean and not isinstance(retain, RunningMean):
        raise ValueError(
            "Parameter `state` should have no mean of retain for buckets without `retain_decay`. Found "
            f"{len(mean)} gradients. Make the buckets with `retain_decay`."
        )
    if (non_negative("state['retain_weight']", weight) > 0.0) != bool(mean):
        raise ValueError(
            "Parameter `state['retain_weight']` should be positive with a mean and 0 without one. Found "
            f"{weight} and {len(mean)} gradients."
        )
    unknown = sorted(set(mean) - set(names))
    if unknown:
        raise ValueError(
            f"Parameter `state` should have gradients of the {len(names)} parameters of these buckets. Found "
            f"one of `{unknown[0]}`, which they do not have."
        )
    for name, like in zip(names, retain.grads, strict=True):
        g = mean.get(name, like)
        if not isinstance(g, Tensor) or dtensor.is_dtensor(g) != dtensor.is_dtensor(like):
            raise TypeError(
                f"The gradient of `{name}` in `state` should be a {type(like).__name__}. "
                f"Found {type(g).__name__}."
            )
        check_kind(f"state['retain_mean'][{name!r}]", g)
        wanted, found = tuple(dtensor.local(like).shape), tuple(dtensor.local(g).shape)
        if found != wanted:
            raise ValueError(
                f"The gradient of `{name}` in `state` should have shape {wanted} on this rank. Found {found}."
            )
    return [dtensor.local(mean[name]) if name in mean else None for name in names]
