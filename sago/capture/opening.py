"""Where the gradients of a model are captured: under `p.grad`, or in the optimizer of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sago.capture.flat import flatten
from sago.capture.parameters import Parameters
from sago.capture.window import Extraction, Side, ranks
from sago.core.checks import check_groups
from sago.integrations import deepspeed as engine
from sago.integrations.deepspeed import Engine, Zero0
from sago.integrations.zero3 import Zero3
from sago.ranks import ddp as data_parallel
from sago.ranks import dtensor as shards
from sago.ranks.ddp import DataParallel
from sago.ranks.dtensor import Shards
from sago.rules import resolve


class Opened(NamedTuple):
    """An extraction, and what the ranks have to do with it.

    Attributes:
        ranks: Those whose gradients have to be averaged; None where they are not, or an engine does.
        shards: What this rank holds of the gradients; None for all.
        sharded: The modules of FSDP2 that the parameters are in.
        dtypes: Of the updates.
        padded: Whether the buffers have elements that are no parameter's.
    """

    extraction: Extraction
    ranks: DataParallel | None
    shards: Shards | None
    sharded: Sequence[torch.nn.Module]
    dtypes: Sequence[torch.dtype]
    padded: bool


def open_extraction(
    held: Engine | None,
    source: Any,
    chosen: Parameters,
    accumulate_dtype: torch.dtype | None,
    capacity: float,
) -> Opened:
    """Allocates the accumulators.

    Args:
        held: The engine that the parameters belong to, if there is one.
        source: The module, or what else the parameters were given as.
        chosen: The parameters.
        accumulate_dtype: Of the accumulators, where it is wider.
        capacity: Bytes of a buffer.
    """
    params = chosen.tensors
    rows, _ = check_groups(chosen.keys, len(params), resolve("pcgrad"))  # which ranks should agree on, too
    if held is not None and held.stage == 3:
        if accumulate_dtype is not None:
            raise ValueError(
                "`accumulate_dtype` should be left out at ZeRO stage 3, where DeepSpeed accumulates: set "
                f"`data_types.grad_accum_dtype` in its configuration. Found {accumulate_dtype}."
            )
        zero3 = Zero3(held, chosen.names, params, rows)
        return Opened(zero3, None, zero3.shards, [], [v.dtype for v in zero3.retain.views], zero3.padded)

    if held is None:
        engine.refuse(source, params)
        sharded = data_parallel.sharded(source, params)
        plain = [n for n, p in zip(chosen.names, params, strict=True) if not shards.is_dtensor(p)]
        if sharded and plain:
            raise ValueError(
                f"Parameter `{plain[0]}` should be sharded by fully_shard as others are, or frozen. Found "
                "that it is not, so that nothing reduces its gradient over the ranks."
            )
        averaged = data_parallel.take_over(source, params, chosen.names)
    else:
        sharded, averaged = [], held.average()
    if accumulate_dtype is not None and ranks() > 1 and averaged is None and not sharded:
        raise ValueError(
            "`accumulate_dtype` should be used with DistributedDataParallel or FSDP2 where "
            "torch.distributed has several ranks: another engine may reduce a gradient behind the hook "
            f"that widens it. Found {ranks()} ranks."
        )
    spread = shards.read(params, rows)
    local = [shards.local(p.detach()) for p in params]
    narrow = [p.dtype for p in params]
    wide = [d if accumulate_dtype is None else torch.promote_types(d, accumulate_dtype) for d in narrow]
    parts = (
        chosen.names,
        params,
        chosen.frozen,
        chosen.module,
        sharded,
        Side("forget", flatten(local, wide, capacity), params),
        Side("retain", flatten(local, wide, capacity), params),
    )
    extraction = Extraction(*parts) if held is None else Zero0(held, *parts)
    return Opened(extraction, averaged, spread, sharded, narrow, padded=False)
