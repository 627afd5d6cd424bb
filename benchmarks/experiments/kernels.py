"""Other orders of work for a rule with inner products, from the device functions of `sago.kernels`.

A table has one line for each piece of work: reduce a chunk, or combine it. Programs take its lines in
order. What an experiment changes is the table, the number of launches, the order within a chunk and hints
for the caches; the sums and the update have the bits of the two launches of `sago.kernels`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sago.kernels.batch import BLOCK, CHUNK, THREADS, TRITON_DTYPES, compute_dtype, vector
from sago.kernels.formula import on_device
from sago.kernels.stream import accumulate, across, downcast, pointer, upcast, weighted
from torch import Tensor

from sago.rules import Rule

REDUCE, COMBINE = 0, 1


@triton.jit
def _pass(
    forget, retain, out, start, size, a, b,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """`stream` for aligned tensors and rules without a gate: the sums or, unless OUT is None, the update.

    REVERSE: from the end, where the update's order is free. HINT: the eviction policy of loads and stores.
    """
    forget = pointer(forget, start, FORGET, True)
    retain = pointer(retain, start, RETAIN, True)
    if OUT is not None:
        out = pointer(out, start, OUT, True)
    s0 = tl.zeros((BLOCK // V,), COMPUTE)
    s1, s2, s3 = s0, s0, s0
    t0 = tl.zeros((16,), COMPUTE)
    t1, t2, t3 = t0, t0, t0
    body = size // 16 * 16
    blocks = tl.cdiv(body, BLOCK)
    for i in range(blocks):
        block = blocks - 1 - i if REVERSE else i
        at = block * BLOCK + tl.arange(0, BLOCK)
        f = upcast(tl.load(forget + at, mask=at < body, other=0.0, eviction_policy=HINT), COMPUTE)
        r = upcast(tl.load(retain + at, mask=at < body, other=0.0, eviction_policy=HINT), COMPUTE)
        if OUT is None:
            s0, s1, s2, _, _, _, _, _, _ = accumulate(f, r, s0, s1, s2, s3, s3, s3, s3, s3, s3, 3, V)
        else:
            u = downcast(weighted(a, f, b, r), OUT)
            tl.store(out + at, u, mask=at < body, eviction_policy=HINT)
    at = body + tl.arange(0, 16)
    f = upcast(tl.load(forget + at, mask=at < size, other=0.0), COMPUTE)
    r = upcast(tl.load(retain + at, mask=at < size, other=0.0), COMPUTE)
    if OUT is None:
        t0, t1, t2, _, _, _, _, _, _ = accumulate(f, r, t0, t1, t2, t3, t3, t3, t3, t3, t3, 3, 1)
    else:
        tl.store(out + at, downcast(weighted(a, f, b, r), OUT), mask=at < size)
    return across(s0, t0), across(s1, t1), across(s2, t2)


@triton.jit
def _finish(sums, slot, row, rows, partials, slots, counters, ready, table, WIDTH: tl.constexpr):
    """`sago.kernels.stream.finish`; then says that the row is ready."""
    for k in tl.static_range(3):
        tl.store(partials + k * slots + slot, sums[k])
    tl.debug_barrier()
    first = tl.load(rows + 2 * row)
    count = tl.load(rows + 2 * row + 1)
    done = tl.atomic_add(counters + row, 1, sem="acq_rel")
    if done == count - 1:
        for k in tl.static_range(3):
            column = partials + k * slots + first
            total = tl.zeros((WIDTH,), tl.float64)
            for i in range(0, count, WIDTH):
                at = i + tl.arange(0, WIDTH)
                total += tl.load(column + at, mask=at < count, other=0.0, cache_modifier=".cg")
            tl.store(table + row * 3 + k, tl.sum(total))
        tl.debug_barrier()
        tl.atomic_xchg(ready + row, 1, sem="release")


@triton.jit
def _coefficients(ff, fr, rr, weights, FORMULA: tl.constexpr, COMPUTE: tl.constexpr):
    a, b = FORMULA(ff, fr, rr, tl.load(weights), tl.load(weights + 1))
    zero = tl.full((), 0.0, tl.float64)
    return (zero + a).to(COMPUTE), (zero + b).to(COMPUTE)


@triton.jit(do_not_specialize=["slots"])
def _work_kernel(
    work, ticket, weights, rows, partials, counters, ready, table, slots,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    FORMULA: tl.constexpr, PHASE: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One line of `work`. PHASE "reduce" and "combine" do just that.

    "both" does what the line says. Lines go by tickets, and who combines waits only for lines before its own,
    whose programs run or are done: some program can always go on. "resident": a row of one chunk is reduced,
    and combined at once. FIRST, SECOND: eviction policies of the two reads.
    """
    line = tl.program_id(0)
    if PHASE == "both":
        line = tl.atomic_add(ticket, 1, sem="relaxed")
    entry = work + line.to(tl.int64) * 8
    forget = tl.load(entry)
    retain = tl.load(entry + 1)
    out = tl.load(entry + 2)
    start = tl.load(entry + 3)
    size = tl.load(entry + 4).to(tl.int32)
    slot = tl.load(entry + 5)
    row = tl.load(entry + 6)
    combines = PHASE == "combine"
    if PHASE == "both":
        combines = tl.load(entry + 7) != 0
    if PHASE == "resident":
        ff, fr, rr = _pass(
            forget, retain, out, start, size, 0.0, 0.0, FORGET, RETAIN, None, COMPUTE, BLOCK, V, False, FIRST
        )
        tl.store(table + row * 3, ff)
        tl.store(table + row * 3 + 1, fr)
        tl.store(table + row * 3 + 2, rr)
        a, b = _coefficients(ff, fr, rr, weights, FORMULA, COMPUTE)
        _pass(forget, retain, out, start, size, a, b, FORGET, RETAIN, OUT, COMPUTE, BLOCK, V, REVERSE, SECOND)
    elif combines:
        if PHASE == "both":
            while tl.atomic_add(ready + row, 0, sem="acquire") == 0:
                pass
            tl.debug_barrier()
        # Not through the L1, where a neighbour of these numbers may have brought them before they were ready.
        ff = tl.load(table + row * 3, cache_modifier=".cg")
        fr = tl.load(table + row * 3 + 1, cache_modifier=".cg")
        rr = tl.load(table + row * 3 + 2, cache_modifier=".cg")
        a, b = _coefficients(ff, fr, rr, weights, FORMULA, COMPUTE)
        _pass(forget, retain, out, start, size, a, b, FORGET, RETAIN, OUT, COMPUTE, BLOCK, V, REVERSE, SECOND)
    else:
        sums = _pass(
            forget, retain, out, start, size, 0.0, 0.0, FORGET, RETAIN, None, COMPUTE, BLOCK, V, False, FIRST
        )
        _finish(sums, slot, row, rows, partials, slots, counters, ready, table, BLOCK)


class Experiment(NamedTuple):
    """An order of work.

    Attributes:
        phases: Of the launches: "reduce" and "combine", "both" or "resident".
        reverse: Chunks are combined from the last, each from its end.
        first, second: Eviction policies of the read that reduces, and of what combines.
        lag: In "both", how many chunks of other rows are reduced before a row is combined.
    """

    phases: tuple[str, ...] = ("reduce", "combine")
    reverse: bool = False
    first: str = ""
    second: str = ""
    lag: int = 0


EXPERIMENTS = {
    "two launches": Experiment(),
    "reverse": Experiment(reverse=True),
    "reverse, evict first": Experiment(reverse=True, second="evict_first"),
    "reverse, keep, evict first": Experiment(reverse=True, first="evict_last", second="evict_first"),
    "one launch": Experiment(("both",)),
    "one launch, reverse, evict first": Experiment(("both",), True, "", "evict_first"),
    "one launch, lag": Experiment(("both",), True, "", "evict_first", 512),
    "resident": Experiment(("resident",)),
}


class Call(NamedTuple):
    """A launch: `kernel[grid](*args, **kwargs)`."""

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def prepare(
    experiment: Experiment,
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: Rule,
    gamma: float,
    alpha: float,
    out: Sequence[Tensor],
    rows: Sequence[int] | None = None,
) -> Callable[[], tuple[list[Call], Tensor]]:
    """Uploads the tables of an experiment; what it returns makes its launches and their Gram table anew.

    The tensors are contiguous, of one dtype combination and start at multiples of 16 bytes.
    """
    formula = on_device(rule.coefficients)
    if rule.gated or formula is None:
        raise ValueError(
            f"Parameter `rule` should have no gate and be compiled into kernels. Found {rule.name!r}."
        )
    if any(t.data_ptr() % 16 for side in (forget, retain, out) for t in side):
        raise ValueError("Parameters `forget`, `retain` and `out` should start at multiples of 16 bytes.")
    device, dtypes = out[0].device, (forget[0].dtype, retain[0].dtype, out[0].dtype)
    row_of = list(range(len(out))) if rows is None else list(rows)
    chunks: list[list[list[int]]] = [[] for _ in range(max(row_of) + 1)]
    for f, r, o, row in zip(forget, retain, out, row_of, strict=True):
        addresses = [t.data_ptr() for t in (f, r, o)]
        for start in range(0, o.numel(), CHUNK):
            chunks[row].append([*addresses, start, min(CHUNK, o.numel() - start), 0, row])
    row_table, slots = [], 0
    for members in chunks:
        row_table += [slots, len(members)]
        for chunk in members:
            chunk[5] = slots
            slots += 1
    if "resident" in experiment.phases and any(len(members) > 1 for members in chunks):
        raise ValueError(
            f"Rows that are resident should be of one chunk, {CHUNK} elements. Found longer ones."
        )
    tables = [_table(lines(chunks, phase, experiment), device) for phase in experiment.phases]
    row_table = torch.tensor(row_table, dtype=torch.int64).to(device)
    weights = torch.tensor([gamma, alpha], dtype=torch.float64).to(device)
    partials = torch.empty(3, slots, dtype=torch.float64, device=device)
    count = len(chunks)

    def launches() -> tuple[list[Call], Tensor]:
        zeros = torch.zeros(4 * count + 1, dtype=torch.float64, device=device)  # one memset for all of them
        table, flags = zeros[: 3 * count].view(count, 3), zeros[3 * count :].view(torch.int32)
        counters, ready, ticket = flags[:count], flags[count : 2 * count], flags[2 * count :]
        return [
            Call(
                _work_kernel,
                (len(work),),
                (work, ticket, weights, row_table, partials, counters, ready, table, slots),
                {
                    **dict(zip(("FORGET", "RETAIN", "OUT"), (TRITON_DTYPES[d] for d in dtypes), strict=True)),
                    "COMPUTE": compute_dtype(dtypes),
                    "FORMULA": formula,
                    "PHASE": phase,
                    "REVERSE": experiment.reverse,
                    "FIRST": experiment.first,
                    "SECOND": experiment.second,
                    "BLOCK": BLOCK,
                    "V": vector(dtypes),
                    "num_warps": THREADS // 32,
                    "enable_fp_fusion": False,
                },
            )
            for phase, work in zip(experiment.phases, tables, strict=True)
        ], table

    return launches


def lines(chunks: Sequence[Sequence[list[int]]], phase: str, experiment: Experiment) -> list[list[int]]:
    """The work of a launch in its order. In "both" a row's chunks are reduced before they are combined."""
    step = -1 if experiment.reverse else 1
    reduce = [[[*chunk, REDUCE] for chunk in row] for row in chunks]
    combine = [[[*chunk, COMBINE] for chunk in row][::step] for row in chunks]
    if phase in ("reduce", "resident"):
        return [line for row in reduce for line in row]
    if phase == "combine":
        return [line for row in combine[::step] for line in row]
    found: list[list[int]] = []
    waiting: deque[tuple[int, list[list[int]]]] = deque()
    reduced = 0
    for row in range(len(chunks)):
        for line in reduce[row]:
            while waiting and waiting[0][0] <= reduced:
                found += waiting.popleft()[1]
            found.append(line)
            reduced += 1
        waiting.append((reduced + experiment.lag, combine[row]))
    return found + [line for _, row in waiting for line in row]


def _table(work: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(work, dtype=torch.int64).to(device)


def run(launches: Callable[[], tuple[list[Call], Tensor]]) -> Tensor:
    """Makes the launches; returns the Gram table."""
    calls, table = launches()
    for call in calls:
        call.kernel[call.grid](*call.args, **call.kwargs)
    return table
