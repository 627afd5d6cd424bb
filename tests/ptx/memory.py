"""Memory that a kernel may touch: registered allocations of this process, each access checked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

GRANULE = 2  # bytes, of the smallest access
_WIDTHS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """The hardware would stop the kernel, or leave its result open."""


class Allocation(NamedTuple):
    """Bytes that a kernel may touch.

    Attributes:
        written: Whether they had a value before the launch: all of them, or each granule.
    """

    name: str
    start: int
    end: int
    written: bool | np.ndarray


class Memory:
    """The bytes between the first and the last allocation, of which only the allocations are touched.

    Attributes:
        granules: How many granules all allocations have.
    """

    def __init__(self, allocations: Iterable[Allocation]) -> None:
        self.allocations = _merged(allocations)
        self._starts = np.array([a.start for a in self.allocations], np.int64)
        self._ends = np.array([a.end for a in self.allocations], np.int64)
        sizes = (self._ends - self._starts + GRANULE - 1) // GRANULE
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self.granules = int(self._first[-1])
        self._written = np.array([a.written is True for a in self.allocations])
        self._base = int(self._starts[0]) // 16 * 16
        length = -(-(int(self._ends.max()) - self._base) // 8) * 8
        # All of the address space in between: an array of bytes that nobody reads as a whole.
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self._base))
        self._views = {width: raw.view(kind) for width, kind in _WIDTHS.items()}

    def locate(self, address: np.ndarray, size: int, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The first granule of each access of `size` bytes, and whether it had a value before the launch."""
        if (address % size).any():
            bad = int(address[address % size != 0][0])
            raise Fault(f"misaligned: {size} bytes at {bad:#x}, in {text}")
        which = np.searchsorted(self._starts, address, "right") - 1
        outside = (which < 0) | (address + size > self._ends[which])
        if outside.any():
            bad = int(address[outside][0])
            near = self.allocations[max(int(which[outside][0]), 0)]
            raise Fault(
                f"out of bounds: {size} bytes at {bad:#x}, {bad - near.start} bytes after the start of "
                f"{near.name} with {near.end - near.start} bytes, in {text}"
            )
        written = self._written[which]
        inside = (address - self._starts[which]) // GRANULE
        for i in np.unique(which[~written]):
            if isinstance(flags := self.allocations[i].written, np.ndarray):
                written[which == i] = flags[inside[which == i]]
        return self._first[which] + inside, written

    def granules_of(self, start: int) -> slice:
        """The granules of the allocation that begins at `start`."""
        i = int(np.searchsorted(self._starts, start))
        return slice(int(self._first[i]), int(self._first[i + 1]))

    def read(self, address: np.ndarray, width: int) -> np.ndarray:
        found: np.ndarray = self._views[width][(address - self._base) // width]
        return found

    def write(self, address: np.ndarray, width: int, values: np.ndarray) -> None:
        self._views[width][(address - self._base) // width] = values


class Shared:
    """The shared memory of one block, with the checks of `Memory`."""

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(max(size, 8), np.uint8)
        self.granules = len(self._bytes) // GRANULE
        self._size = size

    def locate(self, address: np.ndarray, size: int, text: str) -> tuple[np.ndarray, np.ndarray]:
        if (address % size).any() or (address < 0).any() or (address + size > self._size).any():
            raise Fault(f"misaligned or outside the {self._size} bytes of shared memory, in {text}")
        return address // GRANULE, np.zeros(len(address), bool)

    def read(self, address: np.ndarray, width: int) -> np.ndarray:
        found: np.ndarray = self._bytes.view(_WIDTHS[width])[address // width]
        return found

    def write(self, address: np.ndarray, width: int, values: np.ndarray) -> None:
        self._bytes.view(_WIDTHS[width])[address // width] = values


def _merged(allocations: Iterable[Allocation]) -> list[Allocation]:
    """Sorted, and one where several overlap, as an update that is written over a gradient."""
    found: list[Allocation] = []
    for one in sorted(allocations, key=lambda a: (a.start, a.end)):
        if one.start == one.end:
            continue
        if found and one.start < found[-1].end:
            last = found.pop()
            one = Allocation(
                last.name if last.name == one.name else f"{last.name}, {one.name}",
                last.start,
                max(last.end, one.end),
                last.written is True or one.written,
            )
        found.append(one)
    return found
