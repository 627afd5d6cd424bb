"""Averages the gradients of DistributedDataParallel over the ranks, once a window, in flat buffers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sago.private import require
from sago.ranks import fsdp
from sago.ranks.dtensor import is_dtensor
from sago.ranks.sum_over import all_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_TESTED = "torch 2.6 to 2.14"
_DDP = (
    *("require_backward_grad_sync", "_join_config", "_comm_hooks", "static_graph", "process_group"),
    *("find_unused_parameters", "parameters_to_ignore"),
)


class Accumulators(Protocol):
    """One side of a window, as `sago.capture.side.Side`: flat buffers, and which parameters were reached."""

    buffers: list[Tensor]
    touched: list[bool]


class DataParallel:
    """Averages gradients over ranks. Each rank has the gradient of its own batch.

    Args:
        group: The process group of the ranks.
        partial: Whether a backward may not reach all parameters, on some ranks or on all.
        modules: The DistributedDataParallel modules, which would otherwise reduce the gradients themselves.
    """

    def __init__(self, group: ProcessGroup, partial: bool, modules: Sequence[Any] = ()) -> None:
        self.group, self._partial, self.modules = group, partial, modules

    def start(self) -> None:
        """Switches the modules' own reduction off."""
        for ddp in self.modules:
            reduce_in_backward(ddp, False)

    def check(self) -> None:
        """Raises if a module has a communication hook, a static graph or an active `join()`."""
        for ddp in self.modules:
            _check_replaceable(ddp)
            if ddp._join_config.enable:
                raise ValueError(
                    "join() of DistributedDataParallel should not be active, because it relies on DDP's own "
                    "reduction, which the buckets switch off. Found it active: give every rank the same "
                    "number of batches, and call `join(enable=False)` to end it."
                )

    def check_reached(
        self, sides: Sequence[Accumulators], names: Sequence[str], trained: Sequence[bool]
    ) -> None:
        """Raises if a parameter has no gradient, unless a backward may leave parameters out."""
        reached = zip(*(side.touched for side in sides), strict=True)
        for name, t, there in zip(names, trained, reached, strict=True):
            if t and not any(there) and not self._partial:
                raise ValueError(
                    f"Parameter `{name}` should be reached by a backward of either side. Found that none "
                    "did on this rank: make DistributedDataParallel with find_unused_parameters=True."
                )

    def average(self, sides: Sequence[Accumulators], trained: Sequence[bool]) -> None:
        """Averages all accumulators over the ranks, and makes `touched` the same on every rank."""
        works = [self._begin(buffer) for side in sides for buffer in side.buffers]
        if self._partial:
            self._share(sides)
        else:
            for side in sides:
                side.touched = list(trained)
        for wait in works:
            wait()

    def _begin(self, buffer: Tensor) -> Any:
        size = dist.get_world_size(self.group)
        if dist.get_backend(self.group) == "nccl":
            return all_reduce(buffer, self.group, dist.ReduceOp.AVG)
        return all_reduce(buffer.div_(size), self.group, dist.ReduceOp.SUM)

    def _share(self, sides: Sequence[Accumulators]) -> None:
        buffer = sides[0].buffers[0]
        reached = torch.tensor([side.touched for side in sides], dtype=torch.uint8).to(buffer.device)
        all_reduce(reached, self.group, dist.ReduceOp.MAX)()
        for side, touched in zip(sides, reached.bool().tolist(), strict=True):
            side.touched = touched


def reduce_in_backward(ddp: Any, on: bool) -> None:
    """Switches the reduction of a DistributedDataParallel module in a backward on or off."""
    require(ddp, ["require_backward_grad_sync"], "DistributedDataParallel", _TESTED)
    ddp.require_backward_grad_sync = on


def reduces_in_backward(ddp: Any) -> bool:
    """Whether the module reduces gradients in a backward."""
    reduces: bool = ddp.require_backward_grad_sync
    return reduces


def take_over(source: Any, params: Sequence[Tensor], names: Sequence[str]) -> DataParallel | None:
    """Replaces the reduction of the DistributedDataParallel modules that have these parameters.

    DDP reduces only the first backward after a forward. After two forwards and two backwards the second
    gradient would not be reduced. Returns None if there is no such module.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    found = owners(source, params, torch.nn.parallel.DistributedDataParallel)
    if not found:
        return None
    reduced: set[int] = set()
    left: dict[int, str] = {}
    for ddp in found:
        require(ddp, _DDP, "DistributedDataParallel", _TESTED)
        _check_replaceable(ddp)
        reduced |= {id(p) for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore}
        inside = type(ddp.module).__name__
        left |= {id(p): f"`{n}` of {inside}" for n, p in ddp.module.named_parameters() if p.requires_grad}
    for name, p in zip(names, params, strict=True):
        left.pop(id(p), None)
        if id(p) not in reduced:
            raise ValueError(
                f"Parameter `{name}` should be reduced by DistributedDataParallel as the others are. "
                "Found that it is not: freeze it, or move it into a module that is wrapped."
            )
    if left:
        raise ValueError(
            "All trainable parameters of a DistributedDataParallel module should be given, because its "
            f"own reduction is switched off. Found that {next(iter(left.values()))} was left out: freeze it "
            "with requires_grad_(False), or give it, too."
        )
    if len({ddp.process_group for ddp in found}) > 1:
        raise ValueError(
            "All DistributedDataParallel modules of the parameters should have the same process group. Found "
            "several groups. Wrap the modules with the same `process_group`, and delete earlier wrappers."
        )
    partial = any(ddp.find_unused_parameters for ddp in found)
    return DataParallel(found[0].process_group, partial, found)


def _check_replaceable(ddp: Any) -> None:
    """Raises if the module's own reduction does more than average gradients."""
    if ddp.static_graph:
        raise ValueError(
            "DistributedDataParallel should be without static_graph, which needs DDP's own reduction. "
            "Found static_graph=True: leave it out, and make new GradientBuckets."
        )
    if ddp._comm_hooks:
        raise ValueError(
            "DistributedDataParallel should be without a communication hook, because gradients are "
            "reduced in flat buffers and the hook would not run. Found one: wrap the module without it, and "
            "make new GradientBuckets."
        )


def check_not_wrapped(params: Sequence[Tensor]) -> None:
    """Raises if the parameters were wrapped in DistributedDataParallel after the buckets were made."""
    there = dist.is_available() and dist.is_initialized()
    if there and owners(None, params, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "A module should be wrapped in DistributedDataParallel before its buckets are made, because the "
            "buckets replace the reduction. Found that it was wrapped later. Make new GradientBuckets."
        )


def sharded(source: Any, params: Sequence[Tensor]) -> Sequence[torch.nn.Module]:
    """The FSDP2 modules of the parameters. Raises ValueError for FSDP1."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if owners(source, params, FullyShardedDataParallel):
        raise ValueError(
            "Parameters should be sharded by fully_shard (FSDP2; fsdp_version: 2 in accelerate). Found "
            "FullyShardedDataParallel (FSDP1), whose flat parameters have no gradient for each tensor."
        )
    found = owners(source, params, FSDPModule) if any(map(is_dtensor, params)) else []
    fsdp.check_known(found)
    return found


def unsharded(params: Sequence[Tensor]) -> set[int]:
    """The ids of those that are unsharded parameters of FSDP2, which replace the sharded ones for a while."""
    if not (dist.is_available() and dist.is_initialized()):
        return set()
    from torch.distributed.fsdp import FSDPModule

    found = owners(None, params, FSDPModule)
    fsdp.check_known(found)
    return {id(p) for p in params} & fsdp.sharded_parameters(found).keys()


def owners(source: Any, params: Sequence[Tensor], kind: Any) -> list[Any]:
    """The modules of this kind inside `source`. If it has none, those that hold any of the parameters."""
    if isinstance(source, torch.nn.Module):
        found = [m for m in source.modules() if isinstance(m, kind)]
        if found:
            return found
    # A parameter does not know its wrappers, so all live objects are searched once.
    wanted = {id(p) for p in params}
    living = [o for o in gc.get_objects() if issubclass(type(o), kind)]
    return [m for m in living if any(id(p) in wanted for p in m.parameters())]


def world_size() -> int:
    """The number of ranks of torch.distributed; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
