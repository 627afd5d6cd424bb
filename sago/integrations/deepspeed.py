"""The hosts of a DeepSpeed engine, whose steps and reductions wait for the synthesis.

At ZeRO stage 0 the accumulators are mounted under `p.grad`, where the engine's step takes gradients from. At
stage 3 they are mounted as partitions in the table of its optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sago.capture.flat import Flat
from sago.capture.host import Arrived, GradHost
from sago.capture.opening import Opened, open_grads
from sago.capture.parameters import Parameters
from sago.capture.side import Capture, Side
from sago.integrations.copies import may_hold_copies
from sago.private import has_since, require
from sago.ranks.ddp import DataParallel, owners
from sago.ranks.dtensor import Shards
from sago.ranks.sum_over import SumOver

# The attribute with the optimizer's partitions of the gradients at stage 3, by the `ds_id` of a parameter.
PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"

_TESTED = "DeepSpeed 0.17.6 to 0.19"
_ENGINE = (
    *("is_gradient_accumulation_boundary", "_is_gradient_accumulation_boundary", "allreduce_gradients"),
    *("seq_data_parallel_group", "sequence_parallel_size", "mp_world_size", "pipeline_parallelism"),
    *("has_moe_layers", "is_deepcompile_enabled", "zenflow", "scale_wrt_gas"),
)
_STAGE3 = (
    *(PARTITIONS, "grad_partitions_flat_buffer", "averaged_gradients", "ipg_buckets", "fp16_groups"),
    *("micro_step_id", "dp_process_group", "offload_optimizer", "set_local_grad_for_param"),
    *("swap_optimizer", "loss_scale", "torch_autocast_gradscaler"),
)
_BUCKET = ("params", "elements")
# The classes at stage 0 whose steps take the gradients from `p.grad` and divide them by a scale.
_SCALING = ("FP16_Optimizer", "FP16_UnfusedOptimizer")
# The names that a later version added, with that version.
_ADDED = {
    "torch_autocast_z0_gradscaler": (0, 18, 3),
    "managed_gradient_accumulation": (0, 19, 8),
    "_epilogue_ran_this_backward": (0, 19, 8),
}


class Engine:
    """Replaces `engine.step` from the first capture of a window until its update is used.

    Inside a capture `engine.step` does nothing, because `accelerator.backward` calls it. Before the synthesis
    it raises if it would use gradients that were not synthesized. After the synthesis it steps, for any
    `gradient_accumulation_steps`.

    Attributes:
        core: The DeepSpeedEngine.
        stage: The stage of ZeRO, 0 or 3.
        waiting: Whether an update waits for a step.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self._trained = trained(core)
        self.stage = int(core.zero_optimization_stage())
        self.waiting = False
        self._held = False
        self._capturing = False

    @property
    def module(self) -> torch.nn.Module:
        """The module whose parameters are trained."""
        found: torch.nn.Module = self.core.module
        return found

    @property
    def scaled(self) -> bool:
        """Whether the losses are multiplied by a scale, which the step divides the gradients by."""
        scalers = (
            self.core.optimizer.torch_autocast_gradscaler if self.stage == 3 else None,
            _added(self.core, "torch_autocast_z0_gradscaler", None),
        )
        return any(s is not None for s in scalers) or scale_of(self.core) != 1.0

    def wanted(self, p: Any) -> bool:
        """Whether the optimizer trains the parameter."""
        return self._trained(p)

    def open(
        self,
        chosen: Parameters,
        rows: Sequence[int],
        accumulate_dtype: torch.dtype | None,
        capacity: float,
    ) -> Opened:
        """Allocates the accumulators; see `sago.capture.opening`."""
        if self.stage == 0:
            # DeepSpeed's own reduction is switched off within a window.
            averaged = DataParallel(self.core.seq_data_parallel_group, partial=True)
            opened = open_grads(chosen, rows, accumulate_dtype, capacity, averaged)
            return opened._replace(host=Zero0Host(self, opened.host))
        if accumulate_dtype is not None:
            raise ValueError(
                "`accumulate_dtype` should be left out at ZeRO stage 3, where DeepSpeed accumulates: set "
                f"`data_types.grad_accum_dtype` in its configuration. Found {accumulate_dtype}."
            )
        host = Zero3Host(self, chosen.names, chosen.tensors, rows)
        dtypes = [v.dtype for v in host.retain.views]
        return Opened(host, host.forget, host.retain, None, host.shards, [], dtypes, host.padded)

    def hold(self) -> None:
        """Begins a capture, in which the engine does not step."""
        if not self._held:
            self.core.step = self._step
            if self.stage == 0:
                self.core.allreduce_gradients = _nothing
        self._held = self._capturing = True

    def pause(self) -> None:
        """Ends the captures. A step raises until the update is published."""
        self._capturing = False

    def ready(self) -> None:
        """Lets the next step use the update, after it was published."""
        self.waiting = True

    def release(self) -> None:
        """Restores the engine's own `step`."""
        if vars(self.core).get("step") == self._step:
            del self.core.step
            if self.stage == 0:
                del self.core.allreduce_gradients
        self._held = self.waiting = False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        core, step = self.core, type(self.core).step
        if self._capturing:
            return None
        if not self.waiting:
            if self._is_boundary():
                raise ValueError(
                    "The two gradients should be synthesized before engine.step(). Found that they are not: "
                    "call synthesize_, or drop them with zero_."
                )
            return step(core, *args, **kwargs)  # counts a micro-batch
        before = core._is_gradient_accumulation_boundary
        core._is_gradient_accumulation_boundary = True
        try:
            result = step(core, *args, **kwargs)
        finally:
            core._is_gradient_accumulation_boundary = before
        self.release()
        return result

    def _is_boundary(self) -> bool:
        managed = _added(self.core, "managed_gradient_accumulation", None)
        if managed is not None and not managed():
            return True
        boundary: bool = self.core.is_gradient_accumulation_boundary()
        return boundary


class Zero0Host:
    """The host of an engine at stage 0: the host of plain torch, with the engine's step held back."""

    def __init__(self, engine: Engine, grads: Any) -> None:
        self._engine = engine
        self._grads: GradHost = grads
        # These methods are those of plain torch.
        self.watch, self.collect = grads.watch, grads.collect
        self.check_start, self.check_outside = grads.check_start, grads.check_outside
        self.check_reduced, self.check_parameters = grads.check_reduced, grads.check_parameters

    def mount(self, capture: Capture) -> None:
        self._engine.hold()
        self._grads.mount(capture)

    def unmount(self) -> None:
        self._engine.pause()
        self._grads.unmount()

    def publish(self, updates: Sequence[Tensor | None]) -> None:
        self._grads.publish(updates)
        self._engine.ready()

    def clear(self) -> None:
        self._engine.pause()
        self._grads.clear()
        self._engine.release()

    def check_used(self) -> None:
        _check_stepped(self._engine)
        self._grads.check_used()


def _check_stepped(engine: Engine) -> None:
    if engine.waiting:
        raise ValueError(
            "The last update should be used before the next capture: call engine.step(), or "
            "buckets.zero_() to drop it. Found that it was not used."
        )


class Partitions(Side):
    """One of the two gradients, in one buffer with the layout of DeepSpeed's own.

    A view holds the elements of the parameter on this rank. The partitions of the last ranks end in padding,
    which is zero, and their views may be empty.

    Attributes:
        partitions: The tensors with their padding. Each shares its version counter with its view.
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
        self._clean = -1  # the version of the buffer when it was last cleared

    @property
    def foreign(self) -> bool:
        """Whether other code than a capture wrote to the whole buffer."""
        return self.buffers[0]._version != self._clean

    def clear(self) -> None:
        self.written |= self.foreign
        super().clear()
        self._clean = self.buffers[0]._version


class Zero3Host:
    """The host of an engine at stage 3: partitions that take turns in the table of the optimizer.

    DeepSpeed reduces and scatters the gradients of a backward and adds them to the partition that it finds in
    the table. The retain gradient is DeepSpeed's own buffer, where `engine.step` takes its gradients from.

    Attributes:
        forget, retain: The accumulators.
        shards: How the gradients are sharded over the ranks.
        padded: Whether the buffers have elements that belong to no parameter.
    """

    def __init__(
        self, engine: Engine, names: Sequence[str], params: Sequence[Any], rows: Sequence[int]
    ) -> None:
        self._engine, self._names, self._params = engine, names, params
        self._optimizer: Any = engine.core.optimizer
        self._ids = [p.ds_id for p in params]
        self._own = [self._table[key] for key in self._ids]
        self._mounted: Capture | None = None
        group = self._optimizer.dp_process_group
        rank = dist.get_rank(group)
        numel = [
            min(max(p.ds_numel - rank * own.numel(), 0), own.numel())
            for p, own in zip(params, self._own, strict=True)
        ]
        buffer: Tensor = self._optimizer.grad_partitions_flat_buffer
        other = torch.empty_like(buffer, pin_memory=buffer.is_pinned())
        self.forget = Partitions("forget", other, self._own, numel)
        self.retain = Partitions("retain", buffer, self._own, numel)
        layout = [(row, tuple(p.ds_shape)) for row, p in zip(rows, params, strict=True)]
        everything = [True] * len(params)
        self.padded = sum(numel) < buffer.numel()
        offsets = [rank * own.numel() for own in self._own]
        self.shards = Shards(everything, [p.ds_numel for p in params], offsets, SumOver(group), layout)

    @property
    def _table(self) -> dict[int, Tensor]:
        table: dict[int, Tensor] = getattr(self._optimizer, PARTITIONS)
        return table

    def mount(self, capture: Capture) -> None:
        self._engine.hold()
        if self.forget.empty and self.retain.empty:
            self.retain.clear()
        side = self.forget if capture.side is self.forget else self.retain
        self._table.update(zip(self._ids, side.partitions, strict=True))
        # At micro_step_id 0 the optimizer copies gradients instead of adding them. DeepSpeed leaves the id
        # at 0 between two forwards.
        self._optimizer.micro_step_id = max(self._optimizer.micro_step_id, 1)
        capture.versions = side.versions()
        self._mounted = capture

    def unmount(self) -> None:
        self._engine.pause()
        self._table.update(zip(self._ids, self._own, strict=True))
        self._optimizer.micro_step_id = 0
        self._mounted = None

    def publish(self, updates: Sequence[Tensor | None]) -> None:
        """Puts the updates where the step reads gradients. A parameter without an update has 0 there."""
        optimizer, table = self._optimizer, self._table
        if optimizer.offload_optimizer:
            for p, partition in zip(self._params, self.retain.partitions, strict=True):
                optimizer.set_local_grad_for_param(partition, p)
        else:
            for i, group in enumerate(optimizer.fp16_groups):
                optimizer.averaged_gradients[i] = [table[p.ds_id] for p in group]
        self.retain.written = True
        for p in self._params:
            p.grad = None
        self._engine.ready()

    def clear(self) -> None:
        self.unmount()
        self._engine.release()
        for p in self._params:
            p.grad = None
        for bucket in self._optimizer.ipg_buckets.values():  # a failed backward leaves parameters there
            bucket.params.clear()
            bucket.elements = 0
        self._optimizer.zero_grad()

    def watch(self, capture: Capture, arrived: Arrived | None) -> None:
        if arrived is not None:
            raise ValueError(
                "synthesize_in_backward should not be used at ZeRO stage 3, where gradients are reduced "
                "after the hook. Call synthesize_."
            )
        for i, (p, view) in enumerate(zip(self._params, self.retain.views, strict=True)):
            if view.numel() == 0:  # a backward writes nothing there, so the version does not change
                hook = partial(self._note, capture, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))

    def _note(self, capture: Capture, i: int, p: Tensor) -> None:
        if self._mounted is capture:
            capture.side.touched[i] = capture.reached = True

    def collect(self, capture: Capture) -> None:
        side = capture.side
        for i, (before, now) in enumerate(zip(capture.versions, side.versions(), strict=True)):
            if now != before:
                side.touched[i] = capture.reached = side.written = True
        capture.reached |= any(p.grad is not None for p in self._params)  # not reduced, or left by an error

    def check_used(self) -> None:
        _check_stepped(self._engine)

    def check_start(self) -> None:
        pass

    def check_outside(self) -> None:
        optimizer, started = self._optimizer, any(s.captures for s in (self.forget, self.retain))
        unused = optimizer.micro_step_id > 0 or _added(optimizer, "_epilogue_ran_this_backward", False)
        if self.retain.foreign if started else unused:
            raise ValueError(
                "Backwards should run within forget() or retain(). Found gradients of another backward in "
                "the optimizer, which engine.step() has not used. Call engine.step(), or drop them with "
                "zero_."
            )

    def check_reduced(self) -> None:
        for name, p in zip(self._names, self._params, strict=True):
            if p.grad is not None:
                raise ValueError(
                    "DeepSpeed should reduce gradients in every backward, because unreduced gradients would "
                    f"mix the two sides later. Found one in `{name}.grad`. Call engine.backward(loss). Use "
                    "coalesce_grad_reduction only inside a capture."
                )

    def check_parameters(self) -> None:
        table = self._table
        if any(table.get(key) is not own for key, own in zip(self._ids, self._own, strict=True)):
            raise ValueError(
                "The optimizer should have the buffers that it had when the buckets were made. Found others. "
                "Make new GradientBuckets after states were offloaded or reloaded."
            )


def refuse(source: Any, params: Sequence[Tensor]) -> None:
    """Raises if the parameters belong to an engine, but the engine itself was not given."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and owners(source, params, deepspeed.DeepSpeedEngine):
        raise ValueError(
            "Parameter `params` should be the DeepSpeed engine, as deepspeed.initialize and "
            "accelerator.prepare return it. Found parameters of an engine."
        )


def is_engine(model: Any) -> bool:
    """Whether the model is a DeepSpeed engine. Does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def accumulates(model: Any) -> bool:
    """Whether the model is an engine that adds up micro-batches in accumulators of its own dtype."""
    return is_engine(model) and model.zero_optimization_stage() == 3


def trained(core: Any) -> Callable[[Any], bool]:
    """A function that says whether the engine's optimizer trains a parameter of its module.

    Raises ValueError or RuntimeError for an engine that is not supported.
    """
    stage = int(core.zero_optimization_stage())
    _check(core, stage)
    optimizer = core.optimizer
    if stage == 3:
        table = getattr(optimizer, PARTITIONS)
        return lambda p: getattr(p, "ds_id", None) in table
    if type(optimizer).__name__ in _SCALING:  # their groups have copies
        tensors = [p for group in optimizer.fp16_groups for p in group]
    else:
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
    if may_hold_copies(tensors, core.module.parameters()):
        return _every
    held = {id(p) for p in tensors}
    return lambda p: id(p) in held


def _every(p: Any) -> bool:
    return True


def scale_of(core: Any) -> Any:
    """The scale that the step of the engine's optimizer divides the gradients by."""
    optimizer = core.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return 1.0
    require(optimizer, ["loss_scale"], "DeepSpeed", _TESTED)
    return optimizer.loss_scale


def _check(core: Any, stage: int) -> None:
    if stage in (1, 2):
        raise ValueError(
            f"The DeepSpeed engine should be at ZeRO stage 3 or 0. Found stage {stage}, whose "
            "`averaged_gradients` add up over backwards until a step consumes them, so that the gradient of "
            "the second task would contain that of the first. Set `zero_optimization.stage` to 3 or 0."
        )
    require(core, _ENGINE, "DeepSpeed", _TESTED)
    optimizer = core.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        require(optimizer, _STAGE3, "DeepSpeed", _TESTED)
        for bucket in optimizer.ipg_buckets.values():
            require(bucket, _BUCKET, "DeepSpeed", _TESTED)
    elif kind in _SCALING:
        require(optimizer, ["loss_scale", "fp16_groups"], "DeepSpeed", _TESTED)
    found = None
    if optimizer is None or kind in ("DummyOptim", "DeepSpeedZeRoOffload"):
        found = "none"
    elif kind == "BF16_Optimizer":
        found = (
            "BF16_Optimizer, which adds the gradients of both tasks to buffers of its own: leave out "
            "`grad_accum_dtype` in the configuration and pass accumulate_dtype=torch.float32, or use stage 3"
        )
    elif core.zenflow:
        found = "ZenFlow, which updates parameters apart from the step"
    elif stage == 3 and kind != "DeepSpeedZeroOptimizer_Stage3":
        found = f"{kind}, which keeps gradients elsewhere"
    elif stage == 0 and not (isinstance(optimizer, torch.optim.Optimizer) or kind in _SCALING):
        found = (
            f"{kind}, which sago does not know: at stage 0, use a torch.optim.Optimizer, or an engine whose "
            f"optimizer is of class {' or '.join(_SCALING)}; or use stage 3"
        )
    elif stage == 3 and optimizer.swap_optimizer:
        found = "gradients offloaded to NVMe: offload them to the CPU"
    if found is not None:
        raise ValueError(
            "The DeepSpeed engine should have an optimizer whose gradients can be replaced before a step. "
            f"Found {found}."
        )
    if core.pipeline_parallelism:
        found = "pipeline parallelism"
    elif core.has_moe_layers:
        found = "expert parallelism"
    elif core.mp_world_size > 1:
        found = "tensor parallelism"
    elif stage == 0 and core.sequence_parallel_size > 1:
        found = "sequence parallelism at stage 0"
    elif core.is_deepcompile_enabled():
        found = "DeepCompile, which reduces gradients in compiled graphs"
    if found is not None:
        raise ValueError(f"The DeepSpeed engine should be data parallel and nothing else. Found {found}.")


def _added(owner: Any, name: str, before: Any) -> Any:
    """The attribute, or `before` if the installed version is older than the attribute."""
    there = has_since(owner, name, "deepspeed", _ADDED[name], "DeepSpeed", _TESTED)
    return getattr(owner, name) if there else before


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
