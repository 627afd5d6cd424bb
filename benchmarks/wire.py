"""What a training step puts on the wire: collectives, bytes and rounds, by engine. Counted, not timed.

The collectives are those of the engines (torch 2.13, DeepSpeed 0.19) with their padding, for the shapes of a
list of parameters. What one of `n` bytes over `p` ranks costs is the textbook's. In a ring, each rank sends a
message of n/p bytes to its neighbour in every round:

    reduce-scatter, all-gather    (p - 1)/p * n bytes a rank,  p - 1 rounds
    all-reduce                    both, one after the other

In a binomial tree an all-reduce is a reduction to one rank and a broadcast from it: as many bytes in all, and
2 * ceil(log2 p) rounds in the place of 2 * (p - 1), which is what a small table waits for. Reduce-scatter and
all-gather take ceil(log2 p) rounds where the distance doubles or halves from round to round.

The tables of sums are those of the library, caught on their way to ranks that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sago
from benchmarks.workloads import LLAMA_3_8B, WORKLOADS, Shapes, elements
from sago.capture.flat import flatten
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
) -> Cost:
    """`fully_shard(layer)` of each layer and `fully_shard(model)`, parameters in bf16.

    A forward gathers every group, and its backward once more, except for the first group, which stays whole
    from the forwards to the end of the next backward. Backwards reduce the gradients, `itemsize` bytes an
    element. With several replicas (HSDP) an all-reduce of each shard follows.
    """
    costs = []
    for i, group in enumerate(groups):
        n = fsdp_numel(group, shard)
        reduction = reduce_scatter(itemsize * n, shard)
        if replicas > 1:
            reduction = total(reduction, all_reduce(itemsize * n / shard, replicas))
        costs.append(times(backwards if i == 0 else 2 * forwards, all_gather(2 * n, shard)))
        costs.append(times(backwards, reduction))
    return total(*costs)


def zero3(shapes: Shapes, p: int, itemsize: int, forwards: int, backwards: int) -> Cost:
    """ZeRO-3, parameters and gradients of `itemsize` bytes, at most.

    A gather for each parameter in every forward and its backward: without prefetching, which gathers several
    at a time, and with `stage3_max_reuse_distance` 0. By default up to 1e9 elements stay whole where they are
    soon needed again. Small parameters are gathered once, after the optimizer's step.
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
                yield engine, once, n, reduced_in, fsdp2(*sharded, n)
                yield engine, twice, n, reduced_in, fsdp2(*sharded, 2 * n)
    for n in (1, WINDOW):
        yield "ZeRO-3", once, n, "bfloat16", zero3(shapes, p, 2, 2 * n, n)
        yield "ZeRO-3", twice, n, "bfloat16", zero3(shapes, p, 2, 2 * n, 2 * n)


class Collectives(TorchDispatchMode):
    """Notes what is communicated.

    Attributes:
        found: Of every collective the operation and the largest of its tensors, on which the costs depend.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.found.append((func.__name__.split(".")[0], max(tensors, key=lambda t: t.nbytes)))
        return func(*args, **(kwargs or {}))


@contextmanager
def without_ranks(count: int) -> Iterator[None]:
    """The first of `count` ranks, of which the others do not exist: collectives return and do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tables(tensors: int, ranks: Sequence[int] = RANKS) -> list[dict[str, Any]]:
    """The collectives of a synthesis of so many sharded tensors that sum over the ranks, and their cost.

    The elements of the tensors have no part in it, so they are few.
    """
    rows = []
    with without_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        part = torch.ones(1)
        params = [torch.nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)])) for _ in range(tensors)]
        buckets = sago.GradientBuckets(params)
        _synthesize(buckets, params, "sum", True, None)  # the first synthesis of a list compares the ranks
        for rule in RULES:
            for stats, max_norm in ((False, None), (False, 1.0), (True, None)):
                with Collectives() as seen:
                    _synthesize(buckets, params, rule, stats, max_norm)
                found = [table for name, table in seen.found if name == "allreduce_"]
                # First comes a comparison of the reached parameters, which is the same for every rule.
                flags = [(t.dtype, t.numel()) for t in found[:1]]
                expected = flags == [(torch.uint8, 4 * tensors)] and len(found) == len(seen.found)
                found = found[1:]
                if not expected or any(t.dtype != torch.float64 for t in found):
                    raise RuntimeError(f"{rule} should only sum tables over the ranks. Found {seen.found}.")
                row: dict[str, Any] = {
                    "rule": rule,
                    "statistics": stats,
                    "max_norm": max_norm is not None,
                    "collectives": len(found),
                    "rows": sum(table.shape[0] for table in found),
                    "columns": max((table.shape[1] for table in found), default=0),
                    "bytes": sum(table.nbytes for table in found),
                }
                for p in ranks:
                    costs = [all_reduce(table.nbytes, p) for table in found]
                    row[f"bytes_a_rank_of_{p}"] = total(Cost(), *costs).bytes
                rows.append(row)
    return rows


def _synthesize(
    buckets: sago.GradientBuckets, params: Sequence[Tensor], rule: str, stats: bool, max_norm: float | None
) -> None:
    buckets.zero_()
    for capture in (buckets.forget, buckets.retain):
        with capture():
            for p in params:
                p.grad.to_local().add_(1.0)
    buckets.synthesize_(rule, stats=stats, max_norm=max_norm)


def latencies(ranks: Sequence[int] = RANKS) -> list[dict[str, int]]:
    """Rounds of one all-reduce, which a small table waits for."""
    costs = {p: all_reduce(0, p) for p in ranks}
    return [{"ranks": p, "rounds": c.rounds, "tree_rounds": c.tree_rounds} for p, c in costs.items()]


def _like(shapes: Shapes, itemsize: int) -> list[Tensor]:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
