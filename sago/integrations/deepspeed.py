"""A DeepSpeed engine whose steps and reductions wait for the synthesis."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sago.capture.window import Capture, Extraction
from sago.ranks.ddp import DataParallel, owners

# At stage 3, the optimizer's partitions of the gradients, by the `ds_id` of the parameter.
PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Engine:
    """Stands between a DeepSpeed engine and those who call its `step`.

    From the first capture of a window until its update is used, `engine.step` is put off within captures,
    because the backward of accelerate steps, too; it is an error where it would use gradients that were not
    synthesized; and after the synthesis it is the step of the window, whatever `gradient_accumulation_steps`
    says.

    Attributes:
        core: The engine.
        stage: Of ZeRO, 0 or 3.
        waiting: Whether there is an update that no step has used.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.stage = int(core.zero_optimization_stage())
        _check(core, self.stage)
        self.waiting = False
        self._held = False
        self._captures = False

    @property
    def scaled(self) -> bool:
        """Whether losses, and so gradients, are multiplied by a scale that the step divides by."""
        optimizer = self.core.optimizer
        scalers = (
            getattr(optimizer, "torch_autocast_gradscaler", None),
            getattr(self.core, "torch_autocast_z0_gradscaler", None),
        )
        return any(s is not None for s in scalers) or getattr(optimizer, "loss_scale", 1.0) != 1.0

    def wanted(self, p: Any) -> bool:
        """Whether the optimizer has a gradient of the parameter."""
        return self.stage != 3 or getattr(p, "ds_id", None) in getattr(self.core.optimizer, PARTITIONS)

    def average(self) -> DataParallel | None:
        """What reduces gradients in the engine's place; at stage 3 it does so itself, in every backward."""
        return None if self.stage == 3 else DataParallel(self.core.seq_data_parallel_group, partial=True)

    def hold(self) -> None:
        """A capture is open."""
        if not self._held:
            self.core.step = self._step
            if self.stage == 0:
                self.core.allreduce_gradients = _nothing
        self._held = self._captures = True

    def pause(self) -> None:
        """No capture is open."""
        self._captures = False

    def ready(self) -> None:
        """The next step is that of the window."""
        self.waiting = True

    def release(self) -> None:
        """The engine is as it was."""
        if vars(self.core).get("step") == self._step:
            del self.core.step
            if self.stage == 0:
                del self.core.allreduce_gradients
        self._held = self.waiting = False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        core, step = self.core, type(self.core).step
        if self._captures:
            return None
        if not self.waiting:
            if self._is_boundary():
                raise ValueError(
                    "The two gradients should be synthesized before engine.step(). Found a step ahead of it: "
                    "call synthesize_, or zero_ to start anew."
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
        managed = getattr(self.core, "managed_gradient_accumulation", None)
        if managed is not None and not managed():
            return True
        boundary: bool = self.core.is_gradient_accumulation_boundary()
        return boundary


class Zero0(Extraction):
    """The accumulators of an engine at stage 0: under `p.grad`, where its step takes gradients from."""

    def __init__(self, engine: Engine, *args: Any) -> None:
        super().__init__(*args)
        self._engine = engine

    def finish(self, updates: Sequence[Tensor | None]) -> None:
        super().finish(updates)
        self._engine.ready()

    def zero_(self) -> None:
        super().zero_()
        self._engine.release()

    def _install(self, capture: Capture) -> None:
        self._engine.hold()
        super()._install(capture)

    def _uninstall(self) -> None:
        self._engine.pause()
        super()._uninstall()

    def _check_start(self) -> None:
        if self._engine.waiting:
            raise ValueError(
                "The last update should be used before the next capture: call engine.step(), or "
                "buckets.zero_() to drop it. Found that it was not used."
            )
        super()._check_start()


def find(source: Any) -> Engine | None:
    """The engine, if `source` is one."""
    return Engine(source) if hasattr(source, "zero_optimization_stage") else None


def refuse(source: Any, params: Sequence[Tensor]) -> None:
    """Raises for parameters of an engine that is not given itself."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and owners(source, params, deepspeed.DeepSpeedEngine):
        raise ValueError(
            "Parameter `params` should be the DeepSpeed engine, as deepspeed.initialize and "
            "accelerator.prepare return it. Found parameters of an engine."
        )


def _check(core: Any, stage: int) -> None:
    if stage in (1, 2):
        raise ValueError(
            f"The DeepSpeed engine should be at ZeRO stage 3 or 0. Found stage {stage}, whose "
            "`averaged_gradients` add up over backwards until a step consumes them, so that the gradient of "
            "the second task would contain that of the first. Set `zero_optimization.stage` to 3 or 0."
        )
    optimizer = core.optimizer
    kind = type(optimizer).__name__
    found = None
    if optimizer is None or kind in ("DummyOptim", "DeepSpeedZeRoOffload"):
        found = "none"
    elif kind == "BF16_Optimizer":
        found = (
            "BF16_Optimizer, which adds the gradients of both tasks to buffers of its own: leave out "
            "`grad_accum_dtype` in the configuration and pass accumulate_dtype=torch.float32, or use stage 3"
        )
    elif getattr(core, "zenflow", False):
        found = "ZenFlow, which updates parameters apart from the step"
    elif stage == 3 and kind != "DeepSpeedZeroOptimizer_Stage3":
        found = f"{kind}, which keeps gradients elsewhere"
    elif getattr(optimizer, "swap_optimizer", False):
        found = "gradients offloaded to NVMe: offload them to the CPU"
    if found is not None:
        raise ValueError(
            "The DeepSpeed engine should have an optimizer whose gradients can be replaced before a step. "
            f"Found {found}."
        )
    if getattr(core, "pipeline_parallelism", False):
        found = "pipeline parallelism"
    elif getattr(core, "has_moe_layers", False):
        found = "expert parallelism"
    elif getattr(core, "mp_world_size", 1) > 1:
        found = "tensor parallelism"
    elif stage == 0 and getattr(core, "sequence_parallel_size", 1) > 1:
        found = "sequence parallelism at stage 0"
    elif hasattr(core, "is_deepcompile_enabled") and core.is_deepcompile_enabled():
        found = "DeepCompile, which reduces gradients in compiled graphs"
    if found is not None:
        raise ValueError(f"The DeepSpeed engine should be data parallel and nothing else. Found {found}.")


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
