"""A happens-before race detector over the threads of a launch, after FastTrack (Flanagan and Freund, 2009).

Every thread has a clock. A barrier makes the threads of a block know each other's clocks. A release stores
what the thread knows with the counter, and an acquire takes it from there. An access to a location must
know every earlier access that it conflicts with. Otherwise the two are a race, whatever order they ran in.
"""

from __future__ import annotations

import numpy as np

from .memory import Fault
from .program import THREADS


class Race(Fault):
    """Two accesses to one location that no barrier and no atomic operation orders."""


class Clocks:
    """Vector clocks: for each thread, the latest clock of every other thread that it knows.

    Index 0 stands for no thread, and every thread knows its clock, which is 0.

    All threads of a block know the same, `known[block]`, besides their own clock. A thread that has used an
    atomic operation since the last barrier knows more, `more[thread]`.
    """

    def __init__(self, blocks: int) -> None:
        self.count = blocks * THREADS + 1
        self.own = np.ones(self.count, np.int32)
        self.own[0] = 0
        self.known = np.zeros((blocks, self.count), np.int32)
        self.more: dict[int, np.ndarray] = {}
        self._released: dict[int, np.ndarray] = {}

    def threads(self, block: int) -> slice:
        return slice(1 + block * THREADS, 1 + (block + 1) * THREADS)

    def knows(self, block: int, threads: np.ndarray, others: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        """Whether each thread of the block knows the clock of the other; arrays of one shape."""
        found: np.ndarray = (self.known[block][others] >= clocks) | (threads == others)
        if self.more and not found.all():
            for thread, more in self.more.items():
                found |= (threads == thread) & (more[others] >= clocks)
        return found

    def of(self, block: int, thread: int) -> np.ndarray:
        """Everything that a thread knows."""
        found = np.maximum(self.known[block], self.more.get(thread, 0))
        found[thread] = self.own[thread]
        return found

    def barrier(self, block: int) -> None:
        threads, known = self.threads(block), self.known[block]
        for thread in [t for t in self.more if threads.start <= t < threads.stop]:
            np.maximum(known, self.more.pop(thread), out=known)
        known[threads] = self.own[threads]
        self.own[threads] += 1

    def atomic(self, block: int, thread: int, address: int, acquires: bool, releases: bool) -> None:
        found = self.of(block, thread)
        stored = self._released.get(address)
        if acquires and stored is not None:
            found = np.maximum(found, stored)
            self.more[thread] = found
        if releases:  # a later atomic operation continues what earlier ones released
            self._released[address] = found if stored is None else np.maximum(found, stored)
            self.own[thread] += 1


class Shadow:
    """The last accesses to each granule of a memory.

    One write, and one read. Where several threads read, or use atomic operations, a row of clocks holds all
    of them.

    Args:
        granules: The size of the memory.
        clocks: Those of the threads that use it.
        together: How many neighbouring threads may store the same value to one address with one instruction.
    """

    def __init__(self, granules: int, clocks: Clocks, together: int = 32) -> None:
        self._clocks = clocks
        self._together = together
        self._write, self._write_clock = np.zeros((2, granules), np.int32)
        self._read, self._read_clock = np.zeros((2, granules), np.int32)
        self._row = np.zeros((2, granules), np.int32)  # of readers, of atomic operations
        self._rows = np.zeros((1, clocks.count), np.int32)
        self._free: list[int] = []

    @property
    def written(self) -> np.ndarray:
        return self._write != 0

    def read(
        self, block: int, threads: np.ndarray, granules: np.ndarray, written: np.ndarray, text: str
    ) -> None:
        """`granules` is `[threads, granules of the access]`; `written` tells of values before the launch."""
        who = np.broadcast_to(threads[:, None], granules.shape)
        writer = self._write[granules]
        if not written.all() and (writer[~written] == 0).any():
            raise Fault(f"reads memory that was never written, in {text}")
        self._require(block, who, writer, self._write_clock[granules], "a write", text)
        self._require_rows(block, who, granules, self._row[1], "an atomic operation", text)
        reader = self._read[granules]
        alone = self._clocks.knows(block, who, reader, self._read_clock[granules])
        alone &= self._row[0][granules] == 0
        self._read[granules] = np.where(alone, who, reader)
        self._read_clock[granules] = np.where(alone, self._clocks.own[who], self._read_clock[granules])
        shared = ~alone | (self._read[granules] != who)
        if shared.any():
            self._add_row(0, who[shared], granules[shared])

    def write(
        self, block: int, threads: np.ndarray, granules: np.ndarray, values: np.ndarray, text: str
    ) -> None:
        """`values` is `[threads, values of the access]`."""
        who = np.broadcast_to(threads[:, None], granules.shape)
        self._require_free(block, who, granules, text)
        self._write[granules] = who
        self._write_clock[granules] = self._clocks.own[who]
        both = self._write[granules] != who
        if both.any():
            self._require_equal(threads, granules, values, text)
        self._read[granules] = self._read_clock[granules] = 0
        rows = self._row[0][granules]
        if rows.any():
            self._free += np.unique(rows[rows > 0]).tolist()
            self._row[0][granules] = 0

    def atomic(self, block: int, thread: int, granules: np.ndarray, text: str) -> None:
        """Atomic operations do not race with each other."""
        granules = granules[None]
        who = np.full(granules.shape, thread)
        self._require(block, who, self._write[granules], self._write_clock[granules], "a write", text)
        self._require(block, who, self._read[granules], self._read_clock[granules], "a read", text)
        self._require_rows(block, who, granules, self._row[0], "a read", text)
        self._add_row(1, who, granules)

    def _require_free(self, block: int, who: np.ndarray, granules: np.ndarray, text: str) -> None:
        self._require(block, who, self._write[granules], self._write_clock[granules], "a write", text)
        self._require(block, who, self._read[granules], self._read_clock[granules], "a read", text)
        self._require_rows(block, who, granules, self._row[0], "a read", text)
        self._require_rows(block, who, granules, self._row[1], "an atomic operation", text)

    def _require(
        self, block: int, who: np.ndarray, others: np.ndarray, clocks: np.ndarray, kind: str, text: str
    ) -> None:
        known = self._clocks.knows(block, who, others, clocks)
        if not known.all():
            self._report(int(who[~known][0]), int(others[~known][0]), kind, text)

    def _require_rows(
        self, block: int, who: np.ndarray, granules: np.ndarray, row: np.ndarray, kind: str, text: str
    ) -> None:
        rows = row[granules]
        if not rows.any() or (self._rows[np.unique(rows)] <= self._clocks.known[block]).all():
            return
        for thread, one in {(int(t), int(x)) for t, x in zip(who[rows > 0], rows[rows > 0], strict=True)}:
            late = self._rows[one] > self._clocks.of(block, thread)
            if late.any():
                self._report(thread, int(np.flatnonzero(late)[0]), kind, text)

    def _report(self, thread: int, other: int, kind: str, text: str) -> None:
        (block, t), (other_block, other_t) = divmod(thread - 1, THREADS), divmod(other - 1, THREADS)
        raise Race(
            f"thread {t} of block {block} and {kind} of thread {other_t} of block {other_block}, in {text}"
        )

    def _add_row(self, kind: int, who: np.ndarray, granules: np.ndarray) -> None:
        """Adds accesses to the rows of their granules, with the read that was alone there so far."""
        for granule in np.unique(granules[self._row[kind][granules] == 0]):
            if not self._free:
                self._free = list(range(len(self._rows), 2 * len(self._rows)))
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            row = self._free.pop()
            self._rows[row] = 0
            if kind == 0:
                self._rows[row, self._read[granule]] = self._read_clock[granule]
            self._row[kind][granule] = row
        self._rows[self._row[kind][granules], who] = self._clocks.own[who]

    def _require_equal(
        self, threads: np.ndarray, granules: np.ndarray, values: np.ndarray, text: str
    ) -> None:
        """Raises unless one instruction stores equal values to each address. Any two NaN count as equal."""
        first: dict[int, int] = {}
        groups = (threads - 1) // self._together
        for i, granule in enumerate(granules[:, 0].tolist()):
            other = first.setdefault(granule, i)
            both_nan = np.isnan(values[[i, other]].view(f"f{values.itemsize}")).all(0)
            equal = (values[i] == values[other]) | both_nan
            if groups[i] != groups[other] or not equal.all():
                self._report(int(threads[i]), int(threads[other]), "a write", text)
