"""How much of the second read of a Gram rule a cache can save: a model, in which orders of work are compared.

A Gram rule reads both gradients for their inner products (2s, with s bytes an element), and again to
combine them (2s and 1s written). What of the second read is still in the L2 depends on the order of work.
`simulate` plays an order: as many programs as a GPU holds take the chunks of a list in turn; each round
every program that need not wait moves a piece of its chunk, both gradients in one. The L2 drops what was
used least recently, or at random.

The L2 of these GPUs is in two halves and its replacement is not documented, so what comes out is what an
order can gain at the most, not what it will. The update is written in place.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sago.kernels.batch import BLOCK, CHUNK, THREADS
from tqdm import tqdm

COLUMNS = (
    "workload", "dtype", "device", "order", "replacement", "hit_share", "best_share",
    "traffic_in_s", "time_of_5s",
)  # fmt: skip
PIECE = 8192  # elements
LAG = 512  # chunks, 64 MiB of 16-bit gradients
_MICROSECONDS = 1.0  # that a program waits at least for the loads of a BLOCK
_L2_SPEED = 2.0  # of the L2, in units of the memory's


class Machine(NamedTuple):
    """A data sheet: bytes of L2, TB/s, streaming multiprocessors."""

    name: str
    l2: float
    tbps: float
    sms: int


MACHINES = (
    Machine("A100", 40e6, 2.04, 108),
    Machine("H100", 50e6, 3.35, 132),
    Machine("B200", 126e6, 8.0, 148),
)


class Order(NamedTuple):
    """In which order chunks are reduced and combined.

    Attributes:
        launches: 2 reduces the whole list first. 1 combines a tensor as soon as it is reduced.
        reverse: What is combined from the end: "" (nothing), "chunks", or also the "pieces" of a chunk.
        evict_first: Whether what has been combined makes room before anything else.
        lag: With one launch, how many chunks of other tensors are reduced before a tensor is combined.
        threads: That an SM holds, after what `python -m benchmarks.experiments compile` says of registers.
    """

    name: str
    launches: int = 2
    reverse: str = ""
    evict_first: bool = False
    lag: int = 0
    threads: int = 2048


ORDERS = (
    Order("two launches"),
    Order("reverse, chunks only", reverse="chunks"),
    Order("reverse", reverse="pieces"),
    Order("reverse, evict first", reverse="pieces", evict_first=True),
    Order("one launch", launches=1, threads=1536),
    Order("one launch, reverse, evict first", 1, "pieces", True, threads=1536),
    Order("one launch, lag", 1, "pieces", True, LAG, threads=1536),
)


class Cache:
    """`hit(piece, first)` says whether a piece is there, and puts it there: to stay, or to go first."""

    def __init__(self, pieces: int, replacement: str) -> None:
        self._size = pieces
        self._at: dict[int, int] = {}
        self._pieces: list[int] = []
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._random = random.Random(0) if replacement == "random" else None

    def hit(self, piece: int, first: bool) -> bool:
        return self._least_recent(piece, first) if self._random is None else self._any(piece)

    def _least_recent(self, piece: int, first: bool) -> bool:
        found = piece in self._recent
        self._recent[piece] = None
        self._recent.move_to_end(piece, last=not first)
        if len(self._recent) > self._size:
            self._recent.popitem(last=False)
        return found

    def _any(self, piece: int) -> bool:
        assert self._random is not None
        if piece in self._at:
            return True
        if len(self._pieces) < self._size:
            self._at[piece] = len(self._pieces)
            self._pieces.append(piece)
        else:
            at = self._random.randrange(self._size)
            del self._at[self._pieces[at]]
            self._pieces[at] = piece
            self._at[piece] = at
        return False


def tickets(sizes: Sequence[int], order: Order) -> Iterable[tuple[int, int, bool]]:
    """The work in its order: chunk, group, and whether it is combined, once the group is reduced."""
    groups: list[list[int]] = [[]]
    first = 0
    for size in sizes:
        count = -(-size // CHUNK)
        if order.launches == 1 and groups[-1]:
            groups.append([])
        groups[-1] += range(first, first + count)
        first += count
    reduced = 0
    waiting: deque[tuple[int, int]] = deque()  # when a group is to be combined, and which
    for g, chunks in enumerate(groups):
        for chunk in chunks:
            while waiting and waiting[0][0] <= reduced:
                yield from _combined(groups, waiting.popleft()[1], order)
            yield chunk, g, False
            reduced += 1
        waiting.append((reduced + order.lag, g))
    for _, g in waiting:
        yield from _combined(groups, g, order)


def _combined(groups: list[list[int]], g: int, order: Order) -> Iterable[tuple[int, int, bool]]:
    return ((chunk, g, True) for chunk in (reversed(groups[g]) if order.reverse else groups[g]))


def simulate(
    sizes: Sequence[int],
    itemsize: int,
    machine: Machine,
    order: Order,
    replacement: str = "lru",
    threads: int = THREADS,
) -> dict[str, float]:
    """The share of the second read that hits, bytes moved in s an element, and the time by that of 5s.

    Programs are of `threads` threads, each with as many elements at a time as in the kernels.
    """
    wait = _MICROSECONDS * PIECE / (BLOCK // THREADS * threads)
    elements = sum(sizes)
    chunks = [min(CHUNK, size - at) for size in sizes for at in range(0, size, CHUNK)]
    cache = Cache(int(machine.l2 // (2 * itemsize * PIECE)), replacement)
    per_chunk = CHUNK // PIECE
    queue = deque(tickets(sizes, order))
    missing: dict[int, int] = {}
    for _, group, combines in queue:
        missing[group] = missing.get(group, 0) + (not combines)
    running: list[list[int]] = []  # chunk, group, whether it is combined, pieces done
    hits = moved = microseconds = 0.0
    while queue or running:
        while queue and len(running) < machine.sms * (order.threads // threads):
            running.append([*queue.popleft(), 0])
        read = written = from_memory = 0
        arrived = []
        for program in running:
            chunk, group, combines, done = program
            if combines and missing[group]:
                continue
            count = -(-chunks[chunk] // PIECE)
            piece = count - 1 - done if combines and order.reverse == "pieces" else done
            size = min(PIECE, chunks[chunk] - piece * PIECE)
            hit = cache.hit(chunk * per_chunk + piece, combines and order.evict_first)
            hits += size * (hit and combines)
            read += 2 * size
            from_memory += 2 * size * (not hit)
            written += size * combines
            program[3] += 1
            if done + 1 == count and not combines:
                arrived.append(group)
        for group in arrived:
            missing[group] -= 1
        running = [p for p in running if p[3] < -(-chunks[p[0]] // PIECE)]
        moved += from_memory + written
        at_once = itemsize * max(from_memory + written, (read + written) / _L2_SPEED)
        microseconds += max(wait, at_once / (1e6 * machine.tbps))
    floor = 5 * elements * itemsize / (1e6 * machine.tbps)
    return {
        "hit_share": hits / elements,
        "traffic_in_s": moved / elements,
        "time_of_5s": microseconds / floor,
    }


def best_share(sizes: Sequence[int], itemsize: int, machine: Machine, launches: int) -> float:
    """No order hits more: of what must be reduced before it is combined, the L2 holds that much."""
    needed = [sum(sizes)] if launches == 2 else list(sizes)
    return sum(min(n, machine.l2 / (2 * itemsize)) for n in needed) / sum(sizes)


def run(
    workloads: dict[str, Sequence[int]],
    itemsizes: dict[str, int] | None = None,
    machines: Sequence[Machine] = MACHINES,
    orders: Sequence[Order] = ORDERS,
    replacements: Sequence[str] = ("lru",),
    threads: int = THREADS,
) -> dict[str, Any]:
    """Plays every order over the elements of every list of tensors."""
    cases = [
        (name, dtype, machine, order, replacement)
        for name in workloads
        for dtype in (itemsizes or {"bf16": 2})
        for machine in machines
        for order in orders
        for replacement in replacements
    ]
    rows = []
    for name, dtype, machine, order, replacement in tqdm(cases, desc="second read"):
        sizes, itemsize = workloads[name], (itemsizes or {"bf16": 2})[dtype]
        rows.append(
            {
                "workload": name,
                "dtype": dtype,
                "device": machine.name,
                "order": order.name,
                "replacement": replacement,
                "best_share": best_share(sizes, itemsize, machine, order.launches),
                **simulate(sizes, itemsize, machine, order, replacement, threads),
            }
        )
    return {"threads": threads, "rows": rows}
