"""Opens the host of a list of parameters: plain torch, or an engine that keeps gradients itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch

from sago.capture.flat import flatten
from sago.capture.fresh import FreshGradients
from sago.capture.host import GradHost, Host
from sago.capture.parameters import Parameters
from sago.capture.side import Side
from sago.core.checks import check_groups
from sago.ranks import ddp, dtensor
from sago.ranks.ddp import DataParallel, world_size
from sago.ranks.dtensor import Shards
from sago.rules import resolve

# For each package whose engines keep gradients themselves: the attribute by which an engine is recognised,
# and our module with `Engine` and `refuse`, which is imported when the package is in use.
ENGINES = {"deepspeed": ("zero_optimization_stage", "sago.integrations.deepspeed")}


class Opened(NamedTuple):
    """A host with its accumulators.

    Attributes:
        host, forget, retain: See `sago.capture.host` and `sago.capture.side`.
        data_parallel: The ranks over which the gradients are averaged after the backwards. None if a backward
            or the engine reduces them, or if there is one process without DistributedDataParallel.
        shards: How the gradients are sharded over ranks. None if they are not sharded.
        sharded: The FSDP2 modules that hold the parameters.
        dtypes: The dtype of each update.
        padded: Whether the buffers have elements that belong to no parameter.
    """

    host: Host
    forget: Side
    retain: Side
    data_parallel: DataParallel | None
    shards: Shards | None
    sharded: Sequence[torch.nn.Module]
    dtypes: Sequence[torch.dtype]
    padded: bool


class Engine(Protocol):
    """An engine that keeps gradients itself.

    Attributes:
        module: The module whose parameters are trained.
        scaled: Whether losses are multiplied by a scale that the engine's step divides by.
    """

    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def scaled(self) -> bool: ...
    def wanted(self, p: Any) -> bool:
        """Whether the optimizer trains the parameter."""

    def open(
        self,
        chosen: Parameters,
        rows: Sequence[int],
        accumulate_dtype: torch.dtype | None,
        capacity: float,
    ) -> Opened:
        """Allocates the accumulators. The arguments are those of `open_grads`."""

    def release(self) -> None:
        """Ends the window for the engine, whose own methods are restored."""


def find_engine(source: Any) -> Engine | None:
    """The engine, if `source` is one."""
    for attribute, module in ENGINES.values():
        if hasattr(source, attribute):
            engine: Engine = import_module(module).Engine(source)
            return engine
    return None


def open_host(
    engine: Engine | None,
    source: Any,
    chosen: Parameters,
    accumulate_dtype: torch.dtype | None,
    capacity: float,
    one_copy: bool = False,
) -> Opened:
    """Allocates the accumulators.

    Args:
        engine: The engine that the parameters belong to, if there is one.
        source: The `params` of `GradientBuckets`: a module or an iterable.
        chosen: The parameters.
        accumulate_dtype: The dtype of the accumulators, if it is wider than that of the parameters.
        capacity: The size of a buffer in bytes.
        one_copy: Whether the retain side has no accumulators.
    """
    if one_copy and accumulate_dtype is not None:
        raise ValueError(
            "Parameter `accumulate_dtype` should be None with `one_copy`, because there are no retain "
            f"accumulators. Found {accumulate_dtype}."
        )
    rows, _ = check_groups(chosen.keys, len(chosen.tensors), resolve("pcgrad"))  # ranks compare them as well
    if engine is not None:
        if one_copy:
            raise ValueError(_reduced_late("DeepSpeed"))
        return engine.open(chosen, rows, accumulate_dtype, capacity)
    for package, (_, module) in ENGINES.items():
        if package in sys.modules:
            import_module(module).refuse(source, chosen.tensors)
    sharded = ddp.sharded(source, chosen.tensors)
    unsharded = ddp.unsharded(chosen.tensors)
    apart = [
        name
        for name, p in zip(chosen.names, chosen.tensors, strict=True)
        if id(p) in unsharded or (sharded and not dtensor.is_dtensor(p))
    ]
    if apart:
        raise ValueError(
            f"Parameter `{apart[0]}` should be sharded by fully_shard like the others, or frozen, because "
            "nothing else reduces its gradient over the ranks. Found that it is neither. A forward without a "
            "backward may have left it unsharded: call reshard() on the FSDP modules before you list the "
            "parameters."
        )
    averaged = ddp.take_over(source, chosen.tensors, chosen.names)
    if one_copy and (averaged is not None or (world_size() > 1 and not sharded)):
        raise ValueError(_reduced_late("DistributedDataParallel and several ranks without FSDP2"))
    return open_grads(chosen, rows, accumulate_dtype, capacity, averaged, sharded, one_copy)


def open_grads(
    chosen: Parameters,
    rows: Sequence[int],
    accumulate_dtype: torch.dtype | None,
    capacity: float,
    averaged: DataParallel | None,
    sharded: Sequence[torch.nn.Module] = (),
    one_copy: bool = False,
) -> Opened:
    """Allocates accumulators that are mounted under `p.grad`.

    Args:
        chosen, accumulate_dtype, capacity: As in `open_host`.
        rows: For each parameter, its row in the table of sums.
        averaged: Averages the gradients over ranks; None if nothing is averaged.
        sharded: The FSDP2 modules that hold the parameters.
        one_copy: Whether the retain side has no accumulators.
    """
    params = chosen.tensors
    if accumulate_dtype is not None and world_size() > 1 and averaged is None and not sharded:
        raise ValueError(
            "`accumulate_dtype` should be used with DistributedDataParallel or FSDP2 where "
            "torch.distributed has several ranks, because another engine may reduce a gradient after the "
            f"hook that widens it. Found {world_size()} ranks. Leave `accumulate_dtype` out."
        )
    spread = dtensor.read(params, rows)
    local = [dtensor.local(p.detach()) for p in params]
    narrow = [p.dtype for p in params]
    wide = [d if accumulate_dtype is None else torch.promote_types(d, accumulate_dtype) for d in narrow]
    forget = Side("forget", flatten(local, wide, capacity), params)
    retain: Side
    if one_copy:
        retain = FreshGradients(forget, params)
    else:
        retain = Side("retain", flatten(local, wide, capacity), params)
    host = GradHost(chosen.names, params, chosen.frozen, chosen.module, sharded, retain)
    return Opened(host, forget, retain, averaged, spread, sharded, narrow, padded=False)


def _reduced_late(engine: str) -> str:
    return (
        f"Parameter `one_copy` should be False for {engine}, where gradients are reduced over ranks after "
        "the hook that would use them. Found True. Leave `one_copy` out, or shard the model with FSDP2."
    )
