"""What kernels load and store, byte by byte, where Triton interprets them.

On every version of Triton all of an interpreted kernel's accesses go through four functions of its C++ part,
with the addresses, the mask and the dtype. `counted` stands in front of them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


class Accesses:
    """The loads, or the stores, of all launches."""

    def __init__(self) -> None:
        self._addresses: dict[int, list[np.ndarray]] = defaultdict(list)  # by the width of an access

    def add(self, addresses: np.ndarray, width: int) -> None:
        self._addresses[width].append(addresses)

    @property
    def bytes(self) -> int:
        return sum(width * a.size for width, found in self._addresses.items() for a in found)

    def of(self, t: Tensor) -> np.ndarray:
        """How often each byte between the first and the last element of `t` was accessed."""
        start, end = _extent(t)
        counts = np.zeros(end - start, dtype=np.int64)
        for width, found in self._addresses.items():
            first = np.concatenate(found).astype(np.int64) - start
            for at in (first + i for i in range(width)):
                counts += np.bincount(at[(at >= 0) & (at < len(counts))], minlength=len(counts))
        return counts

    def within(self, tensors: Iterable[Tensor | None]) -> int:
        """Bytes of tensors that share no memory."""
        return sum(int(self.of(t).sum()) for t in tensors if t is not None)


class Traffic:
    """Accesses while `counted`.

    Attributes:
        loads, stores: An atomic operation is in both.
        strays: Addresses outside of all memory that kernels were given. Nothing is accessed there.
        arguments: The tensors that launches had as arguments, by the parameter's name. They are kept, so that
            no memory is used again and an address means one tensor.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.loads, self.stores = Accesses(), Accesses()
        self.strays: list[int] = []
        self.arguments: dict[str, list[Tensor]] = defaultdict(list)
        self._given = [t for t in tensors if t is not None]
        self._bounds = np.empty((0, 2), dtype=np.uint64)

    def launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = {**dict(zip(inspect.signature(kernel).parameters, args, strict=False)), **options}
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        for name, t in tensors.items():
            self.arguments[name].append(t)
        self._bounds = _merged([_extent(t) for t in (*self._given, *tensors.values())])

    def access(self, pointers: Any, mask: Any, width: int, *kinds: Accesses) -> np.ndarray:
        """Notes what `mask` lets through; returns it without the strays."""
        pointers, mask = np.asarray(pointers), np.asarray(mask).astype(bool)
        at = np.searchsorted(self._bounds[:, 0], pointers, side="right").astype(np.int64) - 1
        known = (at >= 0) & (pointers + np.uint64(width) <= self._bounds[at, 1])
        self.strays += pointers[mask & ~known].tolist()
        for kind in kinds:
            kind.add(pointers[mask & known], width)
        return mask & known


class _Memory:
    """Triton's own access to memory, with `traffic` in front."""

    def __init__(self, original: Any, traffic: Traffic) -> None:
        self._original, self._traffic = original, traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        mask = self._traffic.access(pointers, mask, np.dtype(dtype).itemsize, self._traffic.loads)
        return self._original.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        mask = self._traffic.access(pointers, mask, values.itemsize, self._traffic.stores)
        return self._original.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, order: Any) -> Any:
        both = self._traffic.loads, self._traffic.stores
        mask = self._traffic.access(pointers, mask, values.itemsize, *both)
        return self._original.atomic_rmw(operation, pointers, values, mask, order)

    def atomic_cas(self, pointers: Any, expected: Any, values: Any, order: Any) -> Any:
        both = self._traffic.loads, self._traffic.stores
        known = self._traffic.access(pointers, np.ones(np.shape(pointers)), values.itemsize, *both)
        assert known.all(), "compared and swapped where no kernel was given memory"
        return self._original.atomic_cas(pointers, expected, values, order)


@contextmanager
def counted(*tensors: Tensor | None) -> Iterator[Traffic]:
    """Counts what kernels do to `tensors`, which they find by address, and to their own arguments.

    with counted(*forget, *retain) as traffic:
        sago.synthesize_(forget, retain, backend="triton")
    assert (traffic.loads.of(forget[0]) == 1).all()
    """
    from triton.runtime import interpreter

    traffic = Traffic(tensors)
    launch = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        traffic.launch(self.fn, args, options)
        return launch(self, *args, **options)

    memory = _Memory(interpreter._interpreter, traffic)
    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter.GridExecutor, "__call__", noted),
    ):
        yield traffic


def assert_floor(
    traffic: Traffic,
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    reads: int,
) -> None:
    """Each byte of the gradients is loaded `reads` times, each of `out` stored once, and none beside them.

    The tensors are dense; `out` may be the gradients themselves.
    """
    assert not traffic.strays, f"accessed outside of all tensors: {[hex(a) for a in traffic.strays[:8]]}"
    written = {o.data_ptr() for o in out if o is not None}
    read = {t.data_ptr() for t in (*forget, *retain) if t is not None}
    for t in (*forget, *retain, *out):
        if t is not None and t.numel():
            loads, stores = traffic.loads.of(t), traffic.stores.of(t)
            expected = reads * (t.data_ptr() in read), int(t.data_ptr() in written)
            assert (loads == expected[0]).all(), f"loaded {np.unique(loads)} times, not {expected[0]}"
            assert (stores == expected[1]).all(), f"stored {np.unique(stores)} times, not {expected[1]}"


def _extent(t: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (elements * t.element_size() if t.numel() else 0)


def _merged(extents: list[tuple[int, int]]) -> np.ndarray:
    """Disjoint spans in order. Spans are merged, because outputs may be inputs and arguments may overlap."""
    found: list[list[int]] = [[0, 0]]
    for start, end in sorted(extents):
        if start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found, dtype=np.uint64)
