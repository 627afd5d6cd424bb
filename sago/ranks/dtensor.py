"""DTensors: which shard of a gradient this rank holds, read from the placements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from sago.ranks.sum_over import SumOver


class Shards(NamedTuple):
    """How the gradients of a list are distributed over the ranks of a mesh; see `sago.core.pairs.Spread`.

    Attributes:
        counted: For each gradient, whether the sums of this rank's shard are counted. Among the ranks that
            hold the same shard, the first one counts it.
        numel: The number of elements of each whole gradient.
        offsets: For each gradient, the number of elements in front of this rank's shard. None if the shard is
            not contiguous in the whole gradient.
        over: All ranks of the mesh.
        layout: A description of the list that is the same on every rank.
    """

    counted: list[bool]
    numel: list[int]
    offsets: Sequence[int | None]
    over: SumOver
    layout: Sequence[object]

    def of(self, positions: Sequence[int]) -> Shards:
        """The same for a part of the list."""
        return self._replace(
            counted=[self.counted[i] for i in positions],
            numel=[self.numel[i] for i in positions],
            offsets=[self.offsets[i] for i in positions],
        )


def is_dtensor(t: Any) -> bool:
    return type(t) is not Tensor and hasattr(t, "placements") and hasattr(t, "to_local")


def local(t: Any) -> Any:
    """The shard of a DTensor that this rank holds, without a copy; any other tensor itself."""
    return t.to_local() if is_dtensor(t) else t


def local_as(t: Any, like: Any) -> Any:
    """`local(t)`, after `t` was redistributed to the placements of `like`."""
    if is_dtensor(t) and is_dtensor(like) and t.placements != like.placements:
        t = t.redistribute(placements=like.placements)
    return local(t)


def wrap(shard: Tensor, like: Any) -> Any:
    """A DTensor with the placements of `like` and this shard; the shard itself if `like` is no DTensor."""
    if not is_dtensor(like):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def check_placed(i: int, tensors: Sequence[Any]) -> None:
    """Raises unless forget, retain and out of gradient `i` have the same placements and are reduced."""
    if not any(map(is_dtensor, tensors)):
        return
    found = [t for t in tensors if t is not None]
    if not all(map(is_dtensor, found)):
        raise TypeError(
            f"Forget, retain and out of gradient {i} should all be DTensors, or all be plain tensors. "
            "Found both."
        )
    first = found[0]
    for t in found:
        if t.device_mesh != first.device_mesh or t.placements != first.placements:
            raise ValueError(
                f"Forget, retain and out of gradient {i} should have the same mesh and placements. "
                f"Found {first.placements} and {t.placements}."
            )
    check_reduced(f"Gradient {i}", first)


def check_reduced(name: str, t: Any) -> None:
    if any(p.is_partial() for p in t.placements):
        raise ValueError(
            f"{name} should be reduced before it is synthesized, because no rule but a sum commutes with the "
            f"reduction. Found placements {t.placements}."
        )
    if t.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name} should be on a mesh that has this rank. Found {t.device_mesh}.")


def read(gradients: Sequence[Any], rows: Sequence[int]) -> Shards | None:
    """How a list is distributed, read from one tensor of each pair. None if no DTensor is sharded.

    All sums are added up over the largest mesh. A DTensor on a part of that mesh is assumed to be the same on
    every other part. A plain tensor is assumed to be the same on every rank.
    """
    meshes: dict[Any, int] = {}
    for i, t in enumerate(gradients):
        if is_dtensor(t):
            meshes.setdefault(t.device_mesh, i)
    distributed = [t for t in gradients if is_dtensor(t) and t.device_mesh.size() > 1]
    if all(_is_replicate(p) for t in distributed for p in t.placements):
        return None
    ranks = {mesh: mesh.mesh.flatten().tolist() for mesh in meshes}
    largest = max(meshes, key=lambda mesh: mesh.size())
    for mesh, i in meshes.items():
        if not set(ranks[mesh]) <= set(ranks[largest]):
            raise ValueError(
                "DTensors of one list should lie on one mesh or on parts of it, because their sums are added "
                f"up over its ranks. Found gradient {meshes[largest]} on {largest} and gradient {i} on "
                f"{mesh}. Synthesize them separately, or pass `reduce_gram=`."
            )
    origin = ranks[largest][0]
    there = {mesh: origin in ranks[mesh] for mesh in meshes}
    counted, numel, layout = [], [], []
    for t, row in zip(gradients, rows, strict=True):
        placements = str(t.placements) if is_dtensor(t) else ""
        if is_dtensor(t):
            counted.append(there[t.device_mesh] and _is_first(t))
        else:
            counted.append(origin == dist.get_rank())
        numel.append(0 if t is None else t.numel())
        layout.append((row, None if t is None else (tuple(t.shape), str(t.dtype), placements)))
    return Shards(counted, numel, [_offset(t) for t in gradients], SumOver(largest), layout)


def _offset(t: Any) -> int | None:
    """The number of elements in front of this rank's shard, if it is a part of the first dimension only."""
    if not is_dtensor(t):
        return 0
    dims = [i for i, p in enumerate(t.placements) if not _is_replicate(p)]
    if not dims:
        return 0
    if len(dims) > 1 or not t.placements[dims[0]].is_shard(0) or not t.is_contiguous():
        return None
    rows, ranks = t.shape[0], t.device_mesh.size(dims[0])
    # The ranks hold parts as `torch.chunk` makes them.
    first = min(-(-rows // ranks) * t.device_mesh.get_coordinate()[dims[0]], rows)
    return first * (t.numel() // rows) if rows else 0


def _is_first(t: Any) -> bool:
    coordinates = t.device_mesh.get_coordinate()
    return all(x == 0 for x, p in zip(coordinates, t.placements, strict=True) if _is_replicate(p))


def _is_replicate(placement: Any) -> bool:
    replicate: bool = placement.is_replicate()
    return replicate
