"""`combine`: one pass that writes the update and can also compute the sums."""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sago.rules import Coefficients, Rule, evaluate

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
from .formula import gate_on_device, on_device, overflow, read_bits
from .launch import bits, launch
from .stream import finish, locate, stream


@triton.jit
def _weight(weight, IN_MEMORY: tl.constexpr):
    """A weight as an fp64 scalar, from its bits or its address."""
    if IN_MEMORY:
        value = tl.load(weight.to(tl.int64).to(tl.pointer_type(tl.float64)))
    else:
        value = weight.to(tl.int64).to(tl.float64, bitcast=True)
    return value


# One compiled kernel serves all values. Its scalar loads gain nothing from aligned addresses.
@triton.jit(
    do_not_specialize=[
        *("addresses", "shapes", "owner", "rows", "partials", "counters", "table", "draws", "floors"),
        *("coefficients", "gram", "gamma", "alpha", "eps", "gram_stride"),
    ]
)
def _combine_kernel(
    addresses, shapes, owner, rows, partials, counters, table, draws, floors, coefficients, gram,
    gamma: tl.int64, alpha: tl.int64, eps: tl.int64, gram_stride: tl.int32,
    GAMMA_IN_MEMORY: tl.constexpr, ALPHA_IN_MEMORY: tl.constexpr,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    FORMULA: tl.constexpr, READS: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr,
    CLASSES: tl.constexpr, PROPAGATE: tl.constexpr, GRAM: tl.constexpr, SUMS: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, V: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """out_i = a_c * f_i + b_c * r_i if GATED and f_i, r_i in conflict else a * f_i + b * r_i, with

        a_c, b_c, a, b = FORMULA(ff + eps, fr, rr + eps, gamma, alpha)

    on fp64 scalars. `ff, fr, rr` come from the row of `gram`, and are 0 without GRAM. A coefficient is NaN if
    one of the sums in READS is not finite. If FORMULA is None, the four coefficients come from
    `coefficients`. With PROPAGATE, out_i is NaN where f_i or r_i is NaN or inf. With SUMS = 0, no sums are
    computed. With GATE, out_i = a_k * f_i + b_k * r_i for the class k = GATE(f_i, r_i), and there are two
    coefficients for each of CLASSES classes.
    """
    forget, retain, out, aligned, start, size, shape = locate(addresses, shapes, owner, CHUNK)
    row = tl.load(shape + 3)
    if FORMULA is None:
        entry = coefficients + row * (2 * CLASSES)
        a_c = tl.load(entry)
        b_c = tl.load(entry + 1)
        a = tl.load(entry + 2)
        b = tl.load(entry + 3)
        if CLASSES == 3:
            a_2 = tl.load(entry + 4)
            b_2 = tl.load(entry + 5)
        else:
            a_2, b_2 = a, b
    else:
        zero = tl.full((), 0.0, tl.float64)
        ff, fr, rr = zero, zero, zero
        if GRAM:
            ff = tl.load(gram + row * gram_stride) + _weight(eps, False)
            fr = tl.load(gram + row * gram_stride + 1)
            rr = tl.load(gram + row * gram_stride + 2) + _weight(eps, False)
        gamma = _weight(gamma, GAMMA_IN_MEMORY)
        alpha = _weight(alpha, ALPHA_IN_MEMORY)
        if CLASSES == 3:
            a_c, b_c, a, b, a_2, b_2 = FORMULA(ff, fr, rr, gamma, alpha)
            a_2 = overflow(ff, fr, rr, gamma, alpha, READS >> 48) + a_2
            b_2 = overflow(ff, fr, rr, gamma, alpha, READS >> 60) + b_2
        elif GATED or GATE is not None:
            a_c, b_c, a, b = FORMULA(ff, fr, rr, gamma, alpha)
        else:
            a, b = FORMULA(ff, fr, rr, gamma, alpha)
            a_c = a
            b_c = b
        # The addition also converts a literal to an fp64 scalar.
        a_c = overflow(ff, fr, rr, gamma, alpha, READS) + a_c
        b_c = overflow(ff, fr, rr, gamma, alpha, READS >> 12) + b_c
        a = overflow(ff, fr, rr, gamma, alpha, READS >> 24) + a
        b = overflow(ff, fr, rr, gamma, alpha, READS >> 36) + b
        if CLASSES == 2:
            a_2, b_2 = a, b
    sums = stream(
        forget, retain, out, aligned, start, size, draws, floors, shape,
        (a_c.to(COMPUTE), b_c.to(COMPUTE), a.to(COMPUTE), b.to(COMPUTE), a_2.to(COMPUTE), b_2.to(COMPUTE)),
        FORGET, RETAIN, OUT, COMPUTE, GATED, GATE, PROPAGATE, SUMS, BLOCK, THREADS, V, ALIGNED,
    )  # fmt: skip
    if SUMS > 0:
        finish(sums, shape, partials, counters, table, rows, SUMS, SPAN)


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
    draw: Tensor | None = None,
    floors: Tensor | None = None,
) -> Tensor | None:
    """Writes the update of every pair to `out`. Returns the table of sums as `gram` does, or None.

    Args:
        batch: The pairs.
        rule: The rule, which computes the coefficients of each row.
        gamma, alpha: Floats, or 0-d fp64 tensors on the batch's device.
        eps: Added to ff and rr.
        gram: An fp64 table with one row for each row of the batch. Its first three columns are `ff, fr, rr`.
            A row stride of 0 gives all rows the same numbers. None for rules that use no inner products.
        sums: The number of sums to compute in the same pass, as in `gram`, or 0 for none.
        coefficients: Used instead of the rule's function of `gram`, `gamma`, `alpha` and `eps`.
        propagate: Whether NaN or inf in either gradient makes the element of the update NaN.
        draw: The seed and the step of a random gate, int64 `[2]`.
        floors: As in `gram`.
    """
    gate = gate_on_device(rule.gate)
    formula = None if coefficients or rule.by_class else on_device(rule.coefficients)
    values = None
    if formula is None:
        coefficients = coefficients or evaluate(rule, gram, gamma, alpha, eps, batch.device)
        values, gram = _table(batch, rule, coefficients.values), None
    stream = batch.join()
    partials, counters = batch.scratch(sums, stream) if sums else (None, None)
    table = batch.table(sums) if sums else None
    draws = None if draw is None else batch.draws(draw)
    in_memory = [formula is not None and isinstance(w, Tensor) for w in (gamma, alpha)]

    def constants(one: Launch) -> dict[str, Any]:
        forget, retain, out = one.dtypes
        return {
            "GAMMA_IN_MEMORY": in_memory[0],
            "ALPHA_IN_MEMORY": in_memory[1],
            "FORGET": TRITON_DTYPES[forget],
            "RETAIN": TRITON_DTYPES[retain],
            "OUT": TRITON_DTYPES[out],
            "COMPUTE": compute_dtype(one.dtypes),
            "FORMULA": formula,
            "READS": read_bits(rule),
            "GATED": rule.gated,
            "GATE": gate,
            "CLASSES": max(rule.classes, 2),
            "PROPAGATE": propagate,
            "GRAM": gram is not None,
            "SUMS": sums,
            "CHUNK": CHUNK,
            "SPAN": SPAN,
            "BLOCK": BLOCK,
            "THREADS": THREADS,
            "V": vector(one.dtypes),
            "ALIGNED": one.aligned,
        }

    function = None if formula is None else rule.coefficients
    absent = draws is None, floors is None
    launch(
        _combine_kernel,
        batch,
        ("combine", function, rule.gated, gate, propagate, gram is not None, sums, *in_memory, *absent),
        (partials, counters, table, draws, floors, values, gram),
        (bits(gamma), bits(alpha), bits(eps), 0 if gram is None else gram.stride(0)),
        constants,
        partial(options, spills=formula is None or sums in (6, 15)),
    )
    return table


def _table(batch: Batch, rule: Rule, values: Tensor) -> Tensor:
    """The coefficients of two classes or three of every row."""
    found = values if rule.classes > 1 else values.repeat(1, 2)
    return found.expand(batch.row_count, -1).contiguous()
