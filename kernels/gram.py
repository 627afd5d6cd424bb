"""The reduction: inner products and counts of gradient pairs, one row a group."""

import triton
import triton.language as tl
from sago.kernels.batch import BLOCK, CHUNK, TRITON_DTYPES, Batch, compute_dtype, on, options, vector
from sago.kernels.stream import finish, locate, stream
from torch import Tensor


@triton.jit(do_not_specialize=["slots"])
def _gram_kernel(
    addresses, shapes, owner, rows, partials, counters, table, slots,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, COMPUTE: tl.constexpr, SUMS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """table[row] = sums over the row's elements; `accumulate` says which."""
    forget, retain, out, aligned, start, size, shape = locate(addresses, shapes, owner, CHUNK)
    sums = stream(
        forget, retain, out, aligned, start, size, 0.0, 0.0, 0.0, 0.0,
        FORGET, RETAIN, None, COMPUTE, False, False, SUMS, BLOCK, V, ALIGNED,
    )  # fmt: skip
    finish(sums, shape, partials, counters, table, rows, slots, SUMS, BLOCK)


def gram(batch: Batch, sums: int) -> Tensor:
    """The sums of every row, fp64 `[rows, sums]`.

    `sums` is 3 for `ff, fr, rr`; 6 adds the numbers of conflicts and of non-finite elements of forget
    and retain; 9 has ff, fr, rr of the elements out of conflict, the counts, and ff, fr, rr of those in
    conflict. Reads each gradient once, in one launch for each combination of dtypes.
    """
    partials, counters = batch.scratch(sums)
    table = batch.table(sums)
    with on(batch.device):
        for launch, addresses, aligned in batch.tables:
            forget, retain, _ = launch.dtypes
            _gram_kernel[(len(launch.owner),)](
                addresses, launch.shapes, launch.owner, batch.layout.rows,
                partials, counters, table, batch.layout.slots,
                FORGET=TRITON_DTYPES[forget], RETAIN=TRITON_DTYPES[retain],
                COMPUTE=compute_dtype(launch.dtypes), SUMS=sums,
                CHUNK=CHUNK, BLOCK=BLOCK, V=vector(launch.dtypes), ALIGNED=aligned,
                **options(batch.device, aligned, launch.dtypes),
            )  # fmt: skip
    return table
