"""Synthesis during the last backward: the update of a buffer is written when its gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from sago.backends.upload import upload
from sago.core.pairs import Call
from sago.core.pipeline import Pipeline
from sago.core.report import SynthesisReport
from sago.core.statistics import Statistics, report
from sago.ranks.ddp import world_size


class InBackward:
    """One synthesis that runs during a backward.

    Args:
        call: The checked arguments.
        keys: The groups of the report.
        names: The names of the parameters.
        unit: For each parameter, the unit that is synthesized as soon as it is complete, such as its buffer.
        expected: For each parameter, whether the backward may give it a gradient.
        sizes: The bytes of each unit that waits for its synthesis.
        limit: Complete units wait until they have so many bytes, so that fewer kernels are launched.
        pipeline_of: Returns the pipeline of some units, for the gradients that are present in them.
        begin: Is called before updates are written.
        written: Is called with the units whose updates have just been written.

    Attributes:
        report: The report, once the block of `synthesize_in_backward` has ended.
    """

    def __init__(
        self,
        call: Call,
        keys: Sequence[Hashable],
        names: Sequence[str],
        unit: Sequence[int],
        expected: Sequence[bool],
        sizes: Mapping[int, int],
        limit: int,
        pipeline_of: Callable[[Sequence[int]], Pipeline],
        begin: Callable[[], None],
        written: Callable[[Sequence[int]], None],
    ) -> None:
        self.report: SynthesisReport | None = None
        self._call, self._keys, self._names, self._unit = call, keys, names, unit
        self._sizes, self._limit, self._pipeline_of, self._begin = sizes, limit, pipeline_of, begin
        self._written = written
        self._waiting: dict[int, set[int]] = {u: set() for u in unit}
        for i, u in enumerate(unit):
            if expected[i]:
                self._waiting[u].add(i)
        self._complete: list[int] = []
        self._held = 0  # bytes of the complete units
        self._streams: set[torch.cuda.Stream] = set()
        # The groups of each run, their numbers of elements and their sums.
        self._taken: list[tuple[Sequence[Hashable], Sequence[int], Statistics | None]] = []

    def arrived(self, i: int, device: torch.device) -> None:
        """Records that gradient `i` is complete. The backward calls it on the stream of that gradient."""
        u = self._unit[i]
        if u not in self._waiting:
            raise ValueError(
                "Each gradient should arrive once in synthesize_in_backward. Found a second gradient of "
                f"`{self._names[i]}` after its update was written: use retain() and synthesize_, without "
                "`one_copy`, for several backwards and for reentrant checkpointing."
            )
        if device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(device))
        self._waiting[u].discard(i)
        if not self._waiting[u]:
            del self._waiting[u]
            self._complete.append(u)
            self._held += self._sizes[u]
            if self._held >= self._limit:
                for stream in self._streams:
                    torch.cuda.current_stream(device).wait_stream(stream)
                self._run(self._complete)

    def finish(self) -> None:
        """Synthesizes the units that still wait for a gradient, and reports on all units."""
        if self._complete:
            self._run(self._complete)
        for u in list(self._waiting):
            self._run([u])
        index = {key: row for row, key in enumerate(self._keys)}
        numel, total = [0] * len(index), None
        for keys, numels, taken in self._taken:
            rows = [index[key] for key in keys]
            for row, n in zip(rows, numels, strict=True):
                numel[row] += n
            if taken is not None:
                taken.wait()
                if total is None:
                    total = taken.table.new_zeros(len(index), taken.table.shape[1])
                # The rows of one table differ, so the order of the additions is fixed.
                total.index_add_(0, upload(rows, torch.int64, total.device), taken.table)
        found = None if total is None else Statistics(total, numel)
        self.report = report(self._call, self._keys, numel, found)

    def _run(self, units: Sequence[int]) -> None:
        pipeline = self._pipeline_of(units)
        self._complete, self._held = [], 0
        taken = pipeline.update(self._call, self._begin)
        self._taken.append((pipeline.keys, pipeline.numel, taken))
        self._written(units)


def check_exact(
    call: Call,
    rows: Sequence[int],
    keys: Sequence[Hashable],
    unit: Sequence[int],
    devices: Sequence[torch.device],
    sharded: bool,
) -> None:
    """Raises ValueError if an update that is written during the backward would not be exact."""
    instead = "Use retain() and synthesize_ in place of synthesize_in_backward, without `one_copy`."
    if call.rule.state:
        raise ValueError(
            f"Rule `{call.rule.name}` keeps numbers of all groups from step to step, which a backward cannot "
            f"update buffer by buffer. {instead}"
        )
    if call.rule.scope == "global":
        raise ValueError(
            f"Rule `{call.rule.name}` needs inner products over all gradients, which are complete only after "
            f"the backward. {instead}"
        )
    if world_size() > 1 and not sharded:
        raise ValueError(
            "synthesize_in_backward should be used on one rank, because gradients are reduced over ranks "
            f"after the hook. Found {world_size()} ranks. {instead}"
        )
    if len(devices) > 1:
        raise ValueError(
            "synthesize_in_backward should be used on one device, because each has a backward thread of its "
            f"own. Found {', '.join(map(str, devices))}. {instead}"
        )
    if call.by_row:
        buffer_of: dict[int, int] = {}
        for row, buffer in zip(rows, unit, strict=True):
            if buffer_of.setdefault(row, buffer) != buffer:
                raise ValueError(
                    f"Group {keys[row]!r} should lie in one buffer for synthesize_in_backward. Found it in "
                    f"several: raise `bucket_cap_mb`. {instead}"
                )
