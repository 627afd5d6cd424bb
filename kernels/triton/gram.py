"""`gram`: inner products and counts of gradient pairs, one row for each group."""

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sago.rules import Gate

from .batch import (
    BLOCK,
    CHUNK,
    SPAN,
    THREADS,
    TRITON_DTYPES,
    Batch,
    Launch,
    compute_dtype,
    options,
    vector,
)
from .formula import gate_on_device
from .launch import launch
from .stream import finish, locate, stream


@triton.jit(
    do_not_specialize=[
        *("addresses", "shapes", "owner", "rows", "partials", "counters", "table", "draws", "floors")
    ]
)
def _gram_kernel(
    addresses, shapes, owner, rows, partials, counters, table, draws, floors,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, COMPUTE: tl.constexpr, GATE: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, V: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """table[row] = the sums over the elements of the row that `accumulate` or `accumulate_classes` lists."""
    forget, retain, out, aligned, start, size, shape = locate(addresses, shapes, owner, CHUNK)
    sums = stream(
        forget, retain, out, aligned, start, size, draws, floors, shape, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        FORGET, RETAIN, None, COMPUTE, False, GATE, False, SUMS, BLOCK, THREADS, V, ALIGNED,
    )  # fmt: skip
    finish(sums, shape, partials, counters, table, rows, SUMS, SPAN)


def gram(
    batch: Batch,
    sums: int,
    gate: Gate | None = None,
    draw: Tensor | None = None,
    floors: Tensor | None = None,
) -> Tensor:
    """The sums of every row, fp64 `[rows, sums]`.

    With `sums` = 3, the columns are `ff, fr, rr`. 6 adds the numbers of conflicts and of non-finite elements
    of forget and retain. 9 has `ff, fr, rr` of the elements out of conflict, the three counts, and `ff, fr,
    rr` of the elements in conflict. 15 has `ff, fr, rr` of class 0 of the gate, the three counts, `ff, fr,
    rr` of class 1 and of class 2, and the numbers of elements of the classes. Each gradient is read once, in
    one launch for each combination of dtypes. `draw` is the seed and the step of a random gate, int64 `[2]`.
    `floors` has the number of each row below which the magnitude of a retain element counts as 0 in the gate
    and in the number of conflicts, fp64 `[rows]`.
    """
    device_gate = gate_on_device(gate if sums == 15 else None)
    partials, counters = batch.scratch(sums, batch.join())
    table = batch.table(sums)
    draws = None if draw is None or sums != 15 else batch.draws(draw)

    def constants(one: Launch) -> dict[str, Any]:
        forget, retain, _ = one.dtypes
        return {
            "FORGET": TRITON_DTYPES[forget],
            "RETAIN": TRITON_DTYPES[retain],
            "COMPUTE": compute_dtype(one.dtypes),
            "GATE": device_gate,
            "SUMS": sums,
            "CHUNK": CHUNK,
            "SPAN": SPAN,
            "BLOCK": BLOCK,
            "THREADS": THREADS,
            "V": vector(one.dtypes),
            "ALIGNED": one.aligned,
        }

    tensors = partials, counters, table, draws, floors
    key = "gram", sums, device_gate, draws is None, floors is None
    launch(
        _gram_kernel,
        batch,
        key,
        tensors,
        (),
        constants,
        partial(options, spills=sums == 15 or floors is not None),
    )
    return table
