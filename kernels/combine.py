"""The stream: one pass that writes the update, and sums statistics on the way if they are wanted."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from sago.kernels.batch import BLOCK, CHUNK, TRITON_DTYPES, Batch, compute_dtype, on, options, vector
from sago.kernels.formula import on_device
from sago.kernels.stream import finish, locate, stream
from torch import Tensor

from sago.rules import Coefficients, Rule, evaluate


@triton.jit
def _weight(weight):
    """A weight as an fp64 scalar: the bits of a host float, or a scalar on the device."""
    if weight.dtype.is_ptr():
        value = tl.load(weight).to(tl.float64)
    else:
        value = weight.to(tl.int64).to(tl.float64, bitcast=True)  # the bits of 0.0 arrive as an int32
    return value


@triton.jit(do_not_specialize=["gamma", "alpha", "eps", "slots", "gram_stride"])
def _combine_kernel(
    addresses, shapes, owner, rows, partials, counters, table, coefficients, gram,
    gamma, alpha, eps, slots, gram_stride,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    FORMULA: tl.constexpr, GATED: tl.constexpr, PROPAGATE: tl.constexpr, GRAM: tl.constexpr,
    SUMS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out_i = a_c * f_i + b_c * r_i if GATED and f_i, r_i in conflict else a * f_i + b * r_i, with

        a_c, b_c, a, b = FORMULA(ff + eps, fr, rr + eps, gamma, alpha)

    on fp64 scalars, ff, fr, rr from the row of `gram` (0 unless GRAM). FORMULA None: the four are read
    from `coefficients`. PROPAGATE: out_i = NaN where f_i or r_i is NaN or inf. SUMS = 0: no sums are taken.
    """
    forget, retain, out, aligned, start, size, shape = locate(addresses, shapes, owner, CHUNK)
    row = tl.load(shape + 3)
    if FORMULA is None:
        a_c = tl.load(coefficients + row * 4)
        b_c = tl.load(coefficients + row * 4 + 1)
        a = tl.load(coefficients + row * 4 + 2)
        b = tl.load(coefficients + row * 4 + 3)
    else:
        # Added to what the formula gives, to make an fp64 scalar of a literal.
        zero = tl.full((), 0.0, tl.float64)
        ff, fr, rr = zero, zero, zero
        if GRAM:
            ff = tl.load(gram + row * gram_stride) + _weight(eps)
            fr = tl.load(gram + row * gram_stride + 1)
            rr = tl.load(gram + row * gram_stride + 2) + _weight(eps)
        if GATED:
            a_c, b_c, a, b = FORMULA(ff, fr, rr, _weight(gamma), _weight(alpha))
            a_c = zero + a_c
            b_c = zero + b_c
        else:
            a, b = FORMULA(ff, fr, rr, _weight(gamma), _weight(alpha))
        a = zero + a
        b = zero + b
        if not GATED:
            a_c = a
            b_c = b
    sums = stream(
        forget, retain, out, aligned, start, size,
        a_c.to(COMPUTE), b_c.to(COMPUTE), a.to(COMPUTE), b.to(COMPUTE),
        FORGET, RETAIN, OUT, COMPUTE, GATED, PROPAGATE, SUMS, BLOCK, V, ALIGNED,
    )  # fmt: skip
    if SUMS > 0:
        finish(sums, shape, partials, counters, table, rows, slots, SUMS, BLOCK)


def combine(
    batch: Batch,
    rule: Rule,
    gamma: float | Tensor,
    alpha: float | Tensor,
    eps: float,
    gram: Tensor | None,
    sums: int,
    coefficients: Coefficients | None = None,
    propagate: bool = False,
) -> Tensor | None:
    """Writes the update of every pair to `out`; returns the sums, as `sago.kernels.gram`, or None.

    Args:
        batch: The pairs. `out` may be forget or retain themselves.
        rule: Gives the coefficients of a row.
        gamma, alpha: Floats, or 0-d fp64 tensors on the batch's device.
        eps: Added to ff and rr.
        gram: fp64, its first three columns `ff, fr, rr`, with one row a batch row; a row stride of 0 gives
            all rows the same numbers. None for rules that use no inner products.
        sums: The number of sums to take of the inputs on the way, as in `gram`, or 0 for none.
        coefficients: Used instead of what the rule makes of `gram`, `gamma`, `alpha` and `eps`.
        propagate: Whether NaN and inf of either gradient make NaN of the update's element.
    """
    formula = None if coefficients else on_device(rule.coefficients)
    values = None
    if formula is None:
        coefficients = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
        values, gram = _table(batch, rule, coefficients.values), None
    partials, counters = batch.scratch(sums) if sums else (None, None)
    table = batch.table(sums) if sums else None
    with on(batch.device):
        for launch, addresses, aligned in batch.tables:
            forget, retain, out = launch.dtypes
            _combine_kernel[(len(launch.owner),)](
                addresses, launch.shapes, launch.owner, batch.layout.rows,
                partials, counters, table, values, gram,
                _argument(gamma), _argument(alpha), _argument(eps),
                batch.layout.slots, 0 if gram is None else gram.stride(0),
                FORGET=TRITON_DTYPES[forget], RETAIN=TRITON_DTYPES[retain], OUT=TRITON_DTYPES[out],
                COMPUTE=compute_dtype(launch.dtypes), FORMULA=formula, GATED=rule.gated, PROPAGATE=propagate,
                GRAM=gram is not None, SUMS=sums,
                CHUNK=CHUNK, BLOCK=BLOCK, V=vector(launch.dtypes), ALIGNED=aligned,
                **options(batch.device, aligned, launch.dtypes),
            )  # fmt: skip
    return table


def _table(batch: Batch, rule: Rule, values: Tensor) -> Tensor:
    """All four coefficients of every row."""
    both = values if rule.gated else values.repeat(1, 2)
    return both.expand(batch.row_count, 4).contiguous()


def _argument(weight: float | Tensor) -> int | Tensor:
    # Triton passes a float argument as fp32; the bits of the fp64 value arrive whole.
    if isinstance(weight, Tensor):
        return weight
    return int.from_bytes(struct.pack("<d", weight), "little", signed=True)
