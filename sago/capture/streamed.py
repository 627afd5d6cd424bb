"""Synthesis during the last backward: the update of a buffer is written when its gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

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
        owner: For each parameter, the index of its buffer.
        expected: For each parameter, whether the backward may give it a gradient.
        pipeline_of: Returns the pipeline of a buffer, for the gradients that are present in it.
        begin: Is called before the updates of a buffer are written.

    Attributes:
        report: The report, once the block of `synthesize_in_backward` has ended.
    """

    def __init__(
        self,
        call: Call,
        keys: Sequence[Hashable],
        names: Sequence[str],
        owner: Sequence[int],
        expected: Sequence[bool],
        pipeline_of: Callable[[int], Pipeline],
        begin: Callable[[], None],
    ) -> None:
        self.report: SynthesisReport | None = None
        self._begin = begin
        self._call, self._keys, self._names, self._owner, self._pipeline_of = (
            call,
            keys,
            names,
            owner,
            pipeline_of,
        )
        self._waiting: dict[int, set[int]] = {bucket: set() for bucket in owner}
        for i, bucket in enumerate(owner):
            if expected[i]:
                self._waiting[bucket].add(i)
        self._streams: dict[int, set[torch.cuda.Stream]] = {bucket: set() for bucket in owner}
        self._taken: list[tuple[Statistics | None, Sequence[int]]] = []

    def arrived(self, i: int, device: torch.device) -> None:
        """Records that gradient `i` is complete. The backward calls it on the stream of that gradient."""
        bucket = self._owner[i]
        if bucket not in self._waiting:
            raise ValueError(
                "Each gradient should arrive once in synthesize_in_backward. Found a second gradient of "
                f"`{self._names[i]}` after its update was written: use retain() and synthesize_ for several "
                "backwards and for reentrant checkpointing."
            )
        if device.type == "cuda":
            self._streams[bucket].add(torch.cuda.current_stream(device))
        self._waiting[bucket].discard(i)
        if not self._waiting[bucket]:
            for stream in self._streams[bucket]:
                torch.cuda.current_stream(device).wait_stream(stream)
            self._run(bucket)

    def finish(self) -> None:
        """Synthesizes the buffers that still wait for a gradient, and reports on all buffers."""
        for bucket in list(self._waiting):
            self._run(bucket)
        numel = [sum(row) for row in zip(*(numel for _, numel in self._taken), strict=True)]
        tables = [taken.table for taken, _ in self._taken if taken is not None]
        total = Statistics(torch.stack(tables).sum(0), numel) if tables else None
        self.report = report(self._call, self._keys, numel, total)

    def _run(self, bucket: int) -> None:
        del self._waiting[bucket]
        pipeline = self._pipeline_of(bucket)
        self._taken.append((pipeline.update(self._call, self._begin), pipeline.numel))


def check_exact(
    call: Call,
    rows: Sequence[int],
    keys: Sequence[Hashable],
    owner: Sequence[int],
    devices: Sequence[torch.device],
) -> None:
    """Raises ValueError if an update that is written during the backward would not be exact."""
    instead = "Use retain() and synthesize_ in place of synthesize_in_backward."
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
    if world_size() > 1:
        raise ValueError(
            "synthesize_in_backward should be used on one rank, because gradients are reduced over ranks "
            f"after the hook. Found {world_size()} ranks. {instead}"
        )
    if len(devices) > 1:
        raise ValueError(
            "synthesize_in_backward should be used on one device, because each has a backward thread of its "
            f"own. Found {', '.join(map(str, devices))}. {instead}"
        )
    if call.rule.scope == "tensor":
        buffer_of: dict[int, int] = {}
        for row, buffer in zip(rows, owner, strict=True):
            if buffer_of.setdefault(row, buffer) != buffer:
                raise ValueError(
                    f"Group {keys[row]!r} should lie in one buffer for synthesize_in_backward. Found it in "
                    f"several: raise `bucket_cap_mb`. {instead}"
                )
