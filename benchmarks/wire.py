"""What a training step puts on the wire: collectives, bytes and rounds, by engine. Counted, nothing is timed.

The collectives are those of the engines (torch 2.13, DeepSpeed 0.19) with their padding, for the shapes of a list
of parameters. What one of `n` bytes over `p` ranks costs is the textbook's. In a ring, each rank sends a message of
n/p bytes to its neighbour in every round:

    reduce-scatter, all-gather    (p - 1)/p * n bytes a rank,  p - 1 rounds
    all-reduce                    both, one after the other

In a binomial tree an all-reduce is a reduction to one rank and a broadcast from it: as many bytes in all, and
2 * ceil(log2 p) rounds in the place of 2 * (p - 1), which is what a small table waits for. Reduce-scatter and
all-gather take ceil(log2 p) rounds where the distance doubles or halves from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import sago
from benchmarks.workloads import LLAMA_3_8B, WORKLOADS, Shapes, elements
from sago.flat import flatten
from sago.rules import RULES

MIB = 2**20
RANKS = (8, 64, 1024)
NODE = 8  # ranks of an HSDP shard group
WINDOW = 4  # micro-batches a side, where a step has several
BUCKET_MIB = 256.0  # of `sago.GradientBuckets`
REDUCE_BUCKET = 500_000_000  # elements, DeepSpeed's `reduce_bucket_size`
PERSISTENT = 100_000  # elements, below which ZeRO-3 keeps a parameter whole: `param_persistence_threshold`

ENGINE_COLUMNS = (
    "engine", "step", "ranks", "micro_batches", "reduced_in", "gathers", "reductions",
    "gb_a_rank", "rounds", "tree_rounds",
)  # fmt: skip
TABLE_COLUMNS = ("rule", "statistics", "max_norm", "collectives", "rows", "columns", "bytes")
LATENCY_COLUMNS = ("ranks", "rounds", "tree_rounds")


class Cost(NamedTuple):
    """Of some collectives, one after another.

    Attributes:
        gathers, reductions: All-gathers; reduce-scatters and all-reduces.
        bytes: That a rank sends, and as many that it receives: the mean over the ranks.
        rounds: In rings; also the messages that a rank sends.
        tree_rounds: In trees.
    """

    gathers: int = 0
    reductions: int = 0
    bytes: float = 0.0
    rounds: int = 0
    tree_rounds: int = 0


def total(*costs: Cost) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def times(count: int, cost: Cost) -> Cost:
    return Cost(*(count * x for x in cost))


def all_gather(n: float, p: int) -> Cost:
    """`n` bytes in all, of which every rank has `n/p` at first."""
    return Cost(1, 0, (p - 1) / p * n, p - 1, math.ceil(math.log2(p)))


def reduce_scatter(n: float, p: int) -> Cost:
    """`n` bytes on every rank, of which it has the sum of `n/p` in the end."""
    return all_gather(n, p)._replace(gathers=0, reductions=1)


def all_reduce(n: float, p: int) -> Cost:
    """`n` bytes on every rank, all of which it has the sum of in the end."""
    return total(reduce_scatter(n, p), all_gather(n, p))._replace(gathers=0, reductions=1)


def ddp_buckets(shapes: Shapes, itemsize: int, first: int = MIB, cap: int = 25 * MIB) -> list[int]:
    """Bytes of DDP's buckets from its second iteration on: in the order of backward, a small one first."""
    like = _like(list(reversed(shapes)), itemsize)
    buckets, _ = dist._compute_bucket_assignment_by_size(like, [first, cap], [False] * len(like))
    return [sum(like[i].nbytes for i in bucket) for bucket in buckets]


def sago_buckets(shapes: Shapes, itemsize: int, mib: float = BUCKET_MIB) -> list[int]:
    """Bytes of one flat accumulator of `sago.GradientBuckets`, buffer by buffer."""
    like = _like(shapes, itemsize)
    return [buffer.nbytes for buffer in flatten(like, [t.dtype for t in like], mib * MIB).buffers]


def fsdp_groups(shapes: Shapes, layers: int) -> list[Shapes]:
    """What `fully_shard` communicates at a time: what is in no layer, then each layer.

    A list is that of a decoder: an embedding, layers of equal length, the last norm and perhaps a head.
    """
    each = (len(shapes) - 2) // layers
    split = [shapes[1 + i * each : 1 + (i + 1) * each] for i in range(layers)]
    return [[shapes[0], *shapes[1 + layers * each :]], *split]


def fsdp_numel(shapes: Shapes, p: int) -> int:
    """Elements with the padding of `fully_shard`: every rank has as many rows of every parameter."""
    return sum(-(-shape[0] // p) * p * math.prod(shape[1:]) for shape in shapes)


def zero3_numel(shapes: Shapes, p: int) -> int:
    """Elements with the padding of ZeRO-3: every rank has as many elements of every parameter."""
    return sum(-(-math.prod(shape) // p) * p for shape in shapes)


def ddp(shapes: Shapes, p: int, itemsize: int, backwards: int) -> Cost:
    """DDP's own reduction, in every backward."""
    return times(backwards, total(*(all_reduce(n, p) for n in ddp_buckets(shapes, itemsize))))


def take_over(shapes: Shapes, p: int, itemsize: int) -> Cost:
    """Both accumulators, averaged once before the synthesis."""
    return times(2, total(*(all_reduce(n, p) for n in sago_buckets(shapes, itemsize))))


def fsdp2(
    groups: Sequence[Shapes],
    shard: int,
    replicas: int,
    itemsize: int,
    forwards: int,
    backwards: int,
    reductions: int,
) -> Cost:
    """`fully_shard(layer)` of each layer and `fully_shard(model)`, parameters in bf16.

    A forward gathers every group, and its backward once more, except for the first group, which stays whole from
    the forwards to the end of the next backward. Backwards reduce the gradients, `itemsize` bytes an element, unless
    gradient sync is off. With several replicas (HSDP) an all-reduce of each shard follows.
    """
    costs = []
    for i, group in enumerate(groups):
        n = fsdp_numel(group, shard)
        reduction = reduce_scatter(itemsize * n, shard)
        if replicas > 1:
            reduction = total(reduction, all_reduce(itemsize * n / shard, replicas))
        costs.append(times(backwards if i == 0 else 2 * forwards, all_gather(2 * n, shard)))
        costs.append(times(reductions, reduction))
    return total(*costs)


def zero3(shapes: Shapes, p: int, itemsize: int, forwards: int, backwards: int) -> Cost:
    """ZeRO-3 with its defaults: parameters and gradients of `itemsize` bytes.

    A gather for each parameter, forward and backward: where several are prefetched at a time there are fewer, of
    the same bytes. Small parameters are gathered once, after the optimizer's step.
    """
    large = [shape for shape in shapes if math.prod(shape) >= PERSISTENT]
    small = [shape for shape in shapes if math.prod(shape) < PERSISTENT]
    costs = [times(2 * forwards, all_gather(itemsize * zero3_numel([shape], p), p)) for shape in large]
    costs.append(all_gather(itemsize * zero3_numel(small, p), p))
    bucket: list[tuple[int, ...]] = []
    for shape in [*reversed(shapes), None]:
        if bucket and (shape is None or elements([*bucket, shape]) > REDUCE_BUCKET):
            costs.append(times(backwards, reduce_scatter(itemsize * zero3_numel(bucket, p), p)))
            bucket = []
        if shape is not None:
            bucket.append(shape)
    return total(*costs)


def engines(ranks: Sequence[int] = RANKS) -> list[dict[str, Any]]:
    """Rows for Llama-3-8B. A step has two forwards a micro-batch, and one backward of the sum or two."""
    shapes = WORKLOADS["llama-3-8b"]
    groups = fsdp_groups(shapes, LLAMA_3_8B.layers)
    rows = []
    for p in ranks:
        for engine, step, micro_batches, reduced_in, cost in _steps(shapes, groups, p):
            row = {
                "engine": engine,
                "step": step,
                "ranks": p,
                "micro_batches": micro_batches,
                "reduced_in": reduced_in,
                **cost._asdict(),
            }
            rows.append({**row, "gb_a_rank": cost.bytes / 1e9})
    return rows


def _steps(shapes: Shapes, groups: Sequence[Shapes], p: int) -> Iterator[tuple[str, str, int, str, Cost]]:
    once, twice = "one backward of the sum", "two backwards"
    for reduced_in, size in (("bfloat16", 2), ("float32", 4)):
        for n in (1, WINDOW) if size == 2 else (1,):
            yield "DDP", f"{once}, no_sync" if n > 1 else once, n, reduced_in, ddp(shapes, p, size, 1)
            yield "DDP", f"{twice}, each reduced by DDP", n, reduced_in, ddp(shapes, p, size, 2 * n)
            yield "DDP", f"{twice}, reduced by sago", n, reduced_in, take_over(shapes, p, size)
            for shard in (p, NODE) if p > NODE else (p,):
                sharded = groups, shard, p // shard, size, 2 * n
                engine = "FSDP2" if shard == p else f"HSDP, {p // shard} x {shard}"
                step = f"{once}, sync off" if n > 1 else once
                yield engine, step, n, reduced_in, fsdp2(*sharded, n, 1)
                yield engine, twice, n, reduced_in, fsdp2(*sharded, 2 * n, 2 * n)
    yield "ZeRO-3", once, 1, "bfloat16", zero3(shapes, p, 2, 2, 1)
    for n in (1, WINDOW):
        yield "ZeRO-3", twice, n, "bfloat16", zero3(shapes, p, 2, 2 * n, 2 * n)


def tables(tensors: int, ranks: Sequence[int] = RANKS) -> list[dict[str, Any]]:
    """What the synthesis of so many tensors gives to `reduce_gram`, and what the all-reduce of it costs.

    The elements of the tensors have no part in it, so they are few.
    """
    params = [torch.ones(2, requires_grad=True) for _ in range(tensors)]
    buckets = sago.GradientBuckets(params)
    rows = []
    for rule in RULES:
        for stats, max_norm in ((False, None), (False, 1.0), (True, None)):
            for capture in (buckets.forget, buckets.retain):
                with capture():
                    torch.stack(params).sum().backward()
            given: list[Tensor] = []
            buckets.synthesize_(rule, stats=stats, max_norm=max_norm, reduce_gram=given.append)
            buckets.zero_()
            row: dict[str, Any] = {
                "rule": rule,
                "statistics": stats,
                "max_norm": max_norm is not None,
                "collectives": len(given),
                "rows": sum(table.shape[0] for table in given),
                "columns": max((table.shape[1] for table in given), default=0),
                "bytes": sum(table.nbytes for table in given),
            }
            for p in ranks:
                costs = [all_reduce(table.nbytes, p) for table in given]
                row[f"bytes_a_rank_of_{p}"] = total(Cost(), *costs).bytes
            rows.append(row)
    return rows


def latencies(ranks: Sequence[int] = RANKS) -> list[dict[str, int]]:
    """Rounds of one all-reduce, which a small table waits for."""
    costs = {p: all_reduce(0, p) for p in ranks}
    return [{"ranks": p, "rounds": c.rounds, "tree_rounds": c.tree_rounds} for p, c in costs.items()]


def _like(shapes: Shapes, itemsize: int) -> list[Tensor]:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
