"""Two gradients of a DeepSpeed engine at ZeRO stage 3: partitions that take turns in its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sago.capture.flat import Flat
from sago.capture.window import Arrived, Capture, Side
from sago.integrations.deepspeed import PARTITIONS, Engine, Zero0
from sago.ranks.dtensor import Shards
from sago.ranks.sum_over import SumOver


class Partitions(Side):
    """One of the two gradients, laid out in one buffer as DeepSpeed lays out its own.

    The views have what there is of the parameter, which may be nothing: the partitions of the last ranks end
    in zeros.

    Attributes:
        partitions: Each counts its own versions, and its view with it.
    """

    def __init__(self, name: str, buffer: Tensor, like: Sequence[Tensor], numel: Sequence[int]) -> None:
        with torch.inference_mode(False):
            empty = [buffer.new_empty(0) for _ in like]
            self.partitions = [
                t.set_(buffer.untyped_storage(), p.storage_offset(), p.shape, p.stride())
                for t, p in zip(empty, like, strict=True)
            ]
            views = [p[:n] for p, n in zip(self.partitions, numel, strict=True)]
        super().__init__(name, Flat(views, [0] * len(views), [buffer]), views)
        self._clean = -1  # version of the buffer that had nothing in it

    @property
    def foreign(self) -> bool:
        """Whether the buffer was written to as such, and so by no capture."""
        return self.buffers[0]._version != self._clean

    def clear(self) -> None:
        self.written |= self.foreign
        super().clear()
        self._clean = self.buffers[0]._version


class Zero3(Zero0):
    """Swaps partitions in the table of the optimizer, and back.

    What a backward brings is reduced, scattered and added to the partition that is found there. The retain
    gradient is DeepSpeed's own buffer, where `engine.step` takes its gradients from.

    Attributes:
        shards: How the gradients lie on the ranks.
        padded: Whether there are elements in the buffers that are of no parameter.
    """

    forget: Partitions
    retain: Partitions

    def __init__(
        self, engine: Engine, names: Sequence[str], params: Sequence[Any], rows: Sequence[int]
    ) -> None:
        self._optimizer: Any = engine.core.optimizer
        self._ids = [p.ds_id for p in params]
        self._own = [self._table[key] for key in self._ids]
        group = self._optimizer.dp_process_group
        rank = dist.get_rank(group)
        numel = [
            min(max(p.ds_numel - rank * own.numel(), 0), own.numel())
            for p, own in zip(params, self._own, strict=True)
        ]
        buffer: Tensor = self._optimizer.grad_partitions_flat_buffer
        other = torch.empty_like(buffer, pin_memory=buffer.is_pinned())
        sides = (Partitions(n, b, self._own, numel) for n, b in (("forget", other), ("retain", buffer)))
        super().__init__(engine, names, params, [], None, [], *sides)
        layout = [(row, tuple(p.ds_shape)) for row, p in zip(rows, params, strict=True)]
        everything = [True] * len(params)
        self.padded = sum(numel) < buffer.numel()
        self.shards = Shards(everything, [p.ds_numel for p in params], SumOver(group), layout)

    @property
    def _table(self) -> dict[int, Tensor]:
        table: dict[int, Tensor] = getattr(self._optimizer, PARTITIONS)
        return table

    def finish(self, updates: Sequence[Tensor | None]) -> None:
        """Leaves the updates where the step finds them; it is 0 for a parameter without one."""
        optimizer, table = self._optimizer, self._table
        if optimizer.offload_optimizer:
            for p, partition in zip(self.params, self.retain.partitions, strict=True):
                optimizer.set_local_grad_for_param(partition, p)
        else:
            for i, group in enumerate(optimizer.fp16_groups):
                optimizer.averaged_gradients[i] = [table[p.ds_id] for p in group]
        self.retain.written = True
        super().finish([None] * len(updates))

    def zero_(self) -> None:
        super().zero_()
        for p in self.params:
            p.grad = None
        for bucket in self._optimizer.ipg_buckets.values():  # a failed backward leaves parameters there
            bucket.params.clear()
            bucket.elements = 0
        self._optimizer.zero_grad()

    def _install(self, capture: Capture) -> None:
        self._engine.hold()
        side = self.forget if capture.side is self.forget else self.retain
        self._table.update(zip(self._ids, side.partitions, strict=True))
        # At 0 the optimizer copies in the place of adding, and it stays at 0 between two forwards.
        self._optimizer.micro_step_id = max(self._optimizer.micro_step_id, 1)
        capture.versions = side.versions()

    def _uninstall(self) -> None:
        self._engine.pause()
        self._table.update(zip(self._ids, self._own, strict=True))
        self._optimizer.micro_step_id = 0

    def _watch(self, capture: Capture, arrived: Arrived | None) -> None:
        if arrived is not None:
            raise ValueError(
                "synthesize_in_backward should not be used at ZeRO stage 3, where gradients are reduced "
                "behind the hook. Call synthesize_."
            )
        for i, (p, view) in enumerate(zip(self.params, self.retain.views, strict=True)):
            if view.numel() == 0:  # nothing is written, and no version tells
                hook = partial(self._note, capture, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))

    def _note(self, capture: Capture, i: int, p: Tensor) -> None:
        if self._open[-1] is capture:
            capture.side.touched[i] = capture.reached = True

    def _collect(self, capture: Capture) -> None:
        side = capture.side
        for i, (before, now) in enumerate(zip(capture.versions, side.versions(), strict=True)):
            if now != before:
                side.touched[i] = capture.reached = side.written = True
        capture.reached |= any(p.grad is not None for p in self.params)  # held back, or left by an error

    def _check_start(self) -> None:
        super()._check_start()
        if not any(side.captures or any(side.touched) for side in (self.forget, self.retain)):
            self.retain.clear()

    def _check_outside(self) -> None:
        optimizer, started = self._optimizer, any(s.captures for s in (self.forget, self.retain))
        unused = optimizer.micro_step_id > 0 or getattr(optimizer, "_epilogue_ran_this_backward", False)
        if self.retain.foreign if started else unused:
            raise ValueError(
                "Backwards should run within forget() or retain(). Found gradients of another in the "
                "optimizer, which engine.step() has not used. Call it, or zero_ to start anew."
            )

    def _check_reduced(self) -> None:
        for name, p in zip(self.names, self.params, strict=True):
            if p.grad is not None:
                raise ValueError(
                    "DeepSpeed should reduce gradients in every backward, because those that it holds back "
                    f"mix the two sides later. Found one in `{name}.grad`. Call engine.backward(loss), and "
                    "coalesce_grad_reduction within a capture."
                )

    def _check_parameters(self) -> None:
        table = self._table
        if any(table.get(key) is not own for key, own in zip(self._ids, self._own, strict=True)):
            raise ValueError(
                "The optimizer should have the buffers that it had when the buckets were made. Found others. "
                "Make new GradientBuckets after states were offloaded or reloaded."
            )
