"""`SumOver`: adds up tables of sums over ranks that each hold a shard of the gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sago.backends.streams import is_capturing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["SumOver"]


class SumOver:
    """`torch.distributed.all_reduce(table, group=group)`, in place, for `reduce_gram=`.

        sago.synthesize_(forget, retain, "pcgrad", reduce_gram=SumOver(group))
        sago.synthesize_(forget, retain, "pcgrad", reduce_gram=SumOver(mesh["shard", "tensor"]))

    The table of sums is fp64 `[groups, k]`. It is added up on the current stream. The host does not wait,
    except for the first table of each shape, which the ranks compare.

    Args:
        over: Process groups, or DeviceMeshes or parts of them, whose ranks hold different shards. Each
            argument is one collective, also if a mesh has several dimensions. None stands for the default
            group, which is also used without arguments.

    DTensors do not need it, because their placements tell which rank holds which shard. A tensor that several
    ranks hold whole is counted once for each of them.

    Raises:
        ValueError, TypeError: If torch.distributed is not initialised, or for arguments of another type. A
            call raises on every rank if the shapes of the tables differ.
    """

    def __init__(self, *over: ProcessGroup | DeviceMesh | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed should be initialised for SumOver. Found that it is not. Call "
                "torch.distributed.init_process_group first."
            )
        for x in over:
            _check_over(x)
        self._over = over or (None,)
        self._checked: Sequence[object] | None = None

    @cached_property
    def _groups(self) -> list[ProcessGroup]:
        # Made at the first use: all ranks of a mesh must create a group for it together.
        return [_group(x) for x in self._over]

    def __call__(self, table: Tensor) -> Tensor:
        if not is_capturing([table.device]):
            for group in self._groups:
                _check_same(group, [tuple(table.shape)] * len(table), table.device)
        self.start(table)()
        return table

    def start(self, table: Tensor) -> Callable[[], None]:
        """Begins the sum in place. The returned function waits for it."""
        first, last = self._groups[:-1], self._groups[-1]
        for group in first:
            _all_reduce(table, group)()
        wait = _all_reduce(table, last)
        if is_capturing([table.device]):
            wait()
            return _nothing
        return wait

    def check_same(self, layout: Sequence[object], device: torch.device) -> None:
        """Raises ValueError on every rank if the layouts of the ranks differ. The first call waits."""
        if layout is self._checked or is_capturing([device]):
            return
        for group in self._groups:
            _check_same(group, layout, device)
        self._checked = layout

    def agree(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, whether it is the same on all ranks. The host waits for the other ranks."""
        same = torch.ones(len(flags), dtype=torch.bool)
        for group in self._groups:
            if dist.get_world_size(group) == 1:
                continue
            found = torch.tensor([flags, [not flag for flag in flags]], dtype=torch.uint8)
            found = found.to(_reachable(device, group))
            all_reduce(found, group, dist.ReduceOp.MAX)()
            same &= found.sum(0).cpu() == 1
        return same.tolist()

    def check_equal(self, values: Mapping[str, object], device: torch.device, advice: str) -> None:
        """Raises ValueError on every rank if a value differs between the ranks. The host waits.

        The error begins with the name of the value, and ends with `advice`.
        """
        digests = [_digest(value) for value in values.values()]
        bits = [digest >> k & 1 == 1 for digest in digests for k in range(_BITS)]
        same = self.agree(bits, device)
        for k, (name, value) in enumerate(values.items()):
            if not all(same[k * _BITS : (k + 1) * _BITS]):
                raise ValueError(
                    f"{name} should be the same on every rank, because the ranks together make one update. "
                    f"Found {value!r} on rank {dist.get_rank()}, and another value on another rank. {advice}"
                )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dist.get_world_size(group)} ranks" for group in self._groups)
        return f"SumOver({sizes})"


def all_reduce(t: Tensor, group: ProcessGroup, op: Any) -> Callable[[], object]:
    """Begins `torch.distributed.all_reduce`. The returned function waits for it on the current stream."""
    work = dist.all_reduce(t, op=op, group=group, async_op=True)
    return _nothing if work is None else work.wait


def _all_reduce(table: Tensor, group: ProcessGroup) -> Callable[[], None]:
    there = _reachable(table.device, group)
    sent = table.to(there)
    work = all_reduce(sent, group, dist.ReduceOp.SUM)

    def wait() -> None:
        work()
        if sent is not table:
            table.copy_(sent)

    return wait


def _reachable(device: torch.device, group: ProcessGroup) -> torch.device:
    """A device whose tensors the group can send. NCCL cannot send gradients that are offloaded to the CPU."""
    backends = dist.get_backend_config(group)
    if ":" not in backends or f"{device.type}:" in backends:
        return device
    kind = backends.split(":")[0]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _check_over(over: Any) -> None:
    if over is not None and not isinstance(over, (dist.ProcessGroup, dist.DeviceMesh)):
        raise TypeError(
            f"Parameter `over` should be process groups, meshes or None. Found {type(over).__name__}."
        )


def _group(over: Any) -> ProcessGroup:
    if over is None:
        return _world()
    return over if isinstance(over, dist.ProcessGroup) else group_of(over)


def group_of(mesh: DeviceMesh) -> ProcessGroup:
    """The process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = _world()
    if len(ranks) == dist.get_world_size(world):
        return world
    known = _groups_of_ranks.setdefault(world, {})
    if ranks not in known:
        known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return known[ranks]


_groups_of_ranks: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # initialised
    return world


def _check_same(group: ProcessGroup, layout: Sequence[object], device: torch.device) -> None:
    digest = _digest(layout)
    same = _same.setdefault(group, set())
    if digest in same:
        return
    found = torch.tensor([len(layout), -len(layout), digest, -digest], dtype=torch.int64, device=device)
    found = found.to(_reachable(device, group))
    all_reduce(found, group, dist.ReduceOp.MAX)()
    most, least, high, low = found.tolist()
    if most != -least:
        raise ValueError(
            "The list of gradients should be the same on every rank. "
            f"Found from {-least} to {most} gradients or groups on {dist.get_world_size(group)} ranks."
        )
    if high != -low:
        raise ValueError(
            "The list of gradients should be the same on every rank. Found other shapes, placements, dtypes "
            "or groups on some ranks."
        )
    same.add(digest)


_same: WeakKeyDictionary[ProcessGroup, set[int]] = WeakKeyDictionary()


def _digest(value: object) -> int:
    """A hash of `repr(value)`. The function `hash` would differ between processes."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=_BITS // 8).digest(), "big")


_BITS = 56


def _nothing() -> None:
    pass
