"""Device functions of both kernels: they locate a chunk, read it once and add its sums in a fixed order.

Inside a chunk every lane adds in fp32 (fp64 for fp64 gradients). The lanes of the chunk are then added in
fp64 and stored in the chunk's slot. `SPAN` slots of a row in a sequence are a span. The chunk of a span that
finishes last adds the slots of the span, and the span of a row that finishes last adds the spans of the row.
No sum depends on which chunk that is, so results are the same from run to run.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)  # of a table of partial sums that are read at once


@triton.jit
def is_negative(x):
    """Whether the sign bit of x is set, also for -0."""
    INTEGER: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    return x.to(INTEGER, bitcast=True) < 0


@triton.jit
def in_conflict(f, r):
    # f * r may underflow to 0, but its sign bit stays correct. The minimum is NaN if one of them is NaN, and
    # then the comparison is false. One comparison of the minimum takes fewer instructions than two.
    smaller = tl.minimum(tl.abs(f), tl.abs(r), propagate_nan=tl.PropagateNan.ALL)
    return is_negative(f * r) & (smaller > 0)


# The interpreter truncates fp32 to bf16 and misreads bf16 subnormals, so it casts through the bits here.
INTERPRETED = tl.constexpr(not isinstance(in_conflict, triton.JITFunction))


@triton.jit
def upcast(x, COMPUTE: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def downcast(u, OUT: tl.constexpr):
    """Rounds once, to nearest even. fp64 is converted to 16 bits through fp32, as in torch."""
    if tl.bfloat16 == OUT or tl.float16 == OUT:
        u = u.to(tl.float32)
    if INTERPRETED and tl.bfloat16 == OUT:
        bits = u.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(u == u, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return u.to(OUT)


@triton.jit
def weighted(a, f, b, r):
    """a * f + b * r. A gradient whose coefficient is 0 is left out, even if it is NaN or inf."""
    x = tl.where(a == 0, 0.0, a * f)
    y = b * r
    return tl.where(b == 0, x, tl.where(a == 0, y, x + y))


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def halves(x, NEAR: tl.constexpr):
    """Half of the elements of each thread, and the other half, so that no element changes its thread.

    NEAR: a thread has neighbours, as vectors give it. Else its elements are THREADS apart.
    """
    if NEAR:
        both = tl.reshape(x, (x.shape[0] // 2, 2))
    else:
        both = tl.permute(tl.reshape(x, (2, x.shape[0] // 2)), (1, 0))
    return tl.split(both)


@triton.jit
def piece(x, INDEX: tl.constexpr, PIECES: tl.constexpr, NEAR: tl.constexpr):
    """One of at most 8 PIECES of x. A function that calls itself would not compile with Triton 3.4."""
    for level in tl.static_range(1, 4):
        if PIECES >> level > 0:
            first, second = halves(x, NEAR)
            x = second if INDEX & (PIECES >> level) else first
    return x


@triton.jit
def plus_product(total, x, y):
    """total + x * y, with one rounding in fp32."""
    return total + x * y if x.dtype == tl.float64 else tl.fma(x, y, total)


@triton.jit
def mix(x):
    """Computes `sago.rules.draws.mix` on 32-bit numbers."""
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x735A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def low(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def start_draws(draws, shape, DRAWN: tl.constexpr):
    """The hash of the seed and the step, and the position of the chunk's first element in the list."""
    key = tl.full((), 0, tl.uint32)
    first = tl.full((), 0, tl.int64)
    if DRAWN:
        for i in tl.static_range(2):
            x = tl.load(draws + i)
            key = mix(mix(key ^ low(x)) ^ low(x >> 32))
        slot = tl.program_id(0) - tl.load(shape + 1) + tl.load(shape + 2)
        first = tl.load(draws + 2 + slot)
    return key, first


@triton.jit
def uniform(key, positions, COMPUTE: tl.constexpr):
    """`sago.rules.draws.uniform`: a number in [0, 1) for each position."""
    first = mix(key ^ low(positions >> 32))
    second = mix(first ^ tl.full((), 0x9E3779B9, tl.uint32))
    hashed = mix(mix(first ^ low(positions)) + second)
    return ((hashed >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)).to(COMPUTE)


@triton.jit
def start_floor(floors, shape, COMPUTE: tl.constexpr, FLOORED: tl.constexpr):
    """The floor of the chunk's row."""
    floor = tl.full((), 0.0, COMPUTE)
    if FLOORED:
        floor = tl.load(floors + tl.load(shape + 3)).to(COMPUTE)
    return floor


@triton.jit
def above(r, floor, FLOORED: tl.constexpr):
    """r as a gate reads it: 0 where its magnitude is below the floor."""
    return tl.where(tl.abs(r) < floor, 0.0, r) if FLOORED else r


@triton.jit
def class_of(f, r, u, GATE: tl.constexpr, DRAWN: tl.constexpr):
    return GATE(f, r, u) if DRAWN else GATE(f, r)


@triton.jit
def accumulate(
    f, r, floor, s0, s1, s2, s3, s4, s5, s6, s7, s8,
    SUMS: tl.constexpr, FLOORED: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Adds the elements of a block to the sums, of which each has a lane for every V elements of the block.

    SUMS = 3: ff, fr, rr. SUMS = 6 adds the numbers of conflicts and of non-finite elements of f and of r.
    SUMS = 9: ff, fr, rr of the elements out of conflict, the three counts, ff, fr, rr of those in conflict.
    """
    PIECES: tl.constexpr = f.shape[0] // s0.shape[0]
    for i in tl.static_range(PIECES):
        x = piece(f, i, PIECES, NEAR)
        y = piece(r, i, PIECES, NEAR)
        # A selected sum compiles to one addition with a predicate.
        if SUMS > 3:
            conflict = in_conflict(x, above(y, floor, FLOORED))
            s3 = tl.where(conflict, s3 + 1.0, s3)
            s4 = tl.where(is_finite(x), s4, s4 + 1.0)
            s5 = tl.where(is_finite(y), s5, s5 + 1.0)
        if SUMS == 9:
            s0 = tl.where(conflict, s0, plus_product(s0, x, x))
            s1 = tl.where(conflict, s1, plus_product(s1, x, y))
            s2 = tl.where(conflict, s2, plus_product(s2, y, y))
            s6 = tl.where(conflict, plus_product(s6, x, x), s6)
            s7 = tl.where(conflict, plus_product(s7, x, y), s7)
            s8 = tl.where(conflict, plus_product(s8, y, y), s8)
        elif SUMS > 0:
            s0 = plus_product(s0, x, x)
            s1 = plus_product(s1, x, y)
            s2 = plus_product(s2, y, y)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8


@triton.jit
def accumulate_classes(
    f, r, floor, u, valid, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14,
    GATE: tl.constexpr, DRAWN: tl.constexpr, FLOORED: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Like `accumulate`, for the classes of GATE. `valid` is 1 for an element, and 0 beyond the last one.
    `u` has the numbers of a random gate.

    SUMS = 15: ff, fr, rr of class 0, the three counts, ff, fr, rr of class 1 and of class 2, and the numbers
    of elements of classes 0, 1 and 2.
    """
    PIECES: tl.constexpr = f.shape[0] // s0.shape[0]
    for i in tl.static_range(PIECES):
        x = piece(f, i, PIECES, NEAR)
        y = piece(r, i, PIECES, NEAR)
        one = piece(valid, i, PIECES, NEAR)
        z = above(y, floor, FLOORED)
        s3 = tl.where(in_conflict(x, z), s3 + 1.0, s3)
        s4 = tl.where(is_finite(x), s4, s4 + 1.0)
        s5 = tl.where(is_finite(y), s5, s5 + 1.0)
        k = class_of(x, z, piece(u, i, PIECES, NEAR), GATE, DRAWN)
        first = k == 0.0
        second = k == 1.0
        third = (k != 0.0) & (k != 1.0)
        s0 = tl.where(first, plus_product(s0, x, x), s0)
        s1 = tl.where(first, plus_product(s1, x, y), s1)
        s2 = tl.where(first, plus_product(s2, y, y), s2)
        s6 = tl.where(second, plus_product(s6, x, x), s6)
        s7 = tl.where(second, plus_product(s7, x, y), s7)
        s8 = tl.where(second, plus_product(s8, y, y), s8)
        s9 = tl.where(third, plus_product(s9, x, x), s9)
        s10 = tl.where(third, plus_product(s10, x, y), s10)
        s11 = tl.where(third, plus_product(s11, y, y), s11)
        s12 = tl.where(first, s12 + one, s12)
        s13 = tl.where(second, s13 + one, s13)
        s14 = tl.where(third, s14 + one, s14)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14


@triton.jit
def locate(addresses, shapes, owner, CHUNK: tl.constexpr):
    """The tensors of this program's chunk, its first element, its size, and its entry of `shapes`."""
    chunk = tl.program_id(0)
    member = tl.load(owner + chunk)
    entry = addresses + member * 4
    forget = tl.load(entry)
    retain = tl.load(entry + 1)
    out = tl.load(entry + 2)
    aligned = tl.load(entry + 3)
    shape = shapes + member * 4
    numel = tl.load(shape)
    index = chunk - tl.load(shape + 1)  # int64, and so is every offset into a tensor
    start = index * CHUNK
    size = tl.minimum(numel - start, CHUNK).to(tl.int32)
    return forget, retain, out, aligned, start, size, shape


@triton.jit
def pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = address.to(tl.pointer_type(DTYPE)) + start
    # The hint has an effect only after the cast. On the integer address, the loads would stay scalar.
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit
def stream(
    forget, retain, out, aligned, start, size, draws, floors, shape, coefficients,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    GATED: tl.constexpr, GATE: tl.constexpr, PROPAGATE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Reads `size` elements of both gradients once, returns their sums and, unless OUT is None, writes

        out_i = a_c * f_i + b_c * r_i if GATED and f_i, r_i in conflict else a * f_i + b * r_i

    or the update of the classes of GATE. `coefficients` are a_c, b_c, a, b and two unused numbers, or a and b
    of three classes. With PROPAGATE, out_i is NaN where f_i or r_i is NaN or inf. An address of 0 is a zero
    gradient. Loads are upcast to COMPUTE, and the store rounds once. ALIGNED means that every address of the
    launch is a multiple of 16. Without it, `aligned` tells whether the addresses of this tensor are. `draws`
    has the seed, the step and the first position of every chunk for a random gate, and is None for others.
    `floors` has a number for each row. A gate reads an element of retain as 0 if its magnitude is below the
    number. None is no floor.
    """
    DRAWN: tl.constexpr = draws is not None
    FLOORED: tl.constexpr = floors is not None
    key, position = start_draws(draws, shape, DRAWN)
    floor = start_floor(floors, shape, COMPUTE, FLOORED)
    if ALIGNED:
        sums = _stream(
            forget, retain, out, start, size, key, position, floor, coefficients, DRAWN, FLOORED,
            FORGET, RETAIN, OUT, COMPUTE, GATED, GATE, PROPAGATE, SUMS, BLOCK, 1, THREADS, V, True, True,
        )  # fmt: skip
    else:
        if aligned != 0:
            sums = _stream(
                forget, retain, out, start, size, key, position, floor, coefficients, DRAWN, FLOORED,
                FORGET, RETAIN, OUT, COMPUTE, GATED, GATE, PROPAGATE, SUMS, BLOCK, 1, THREADS, V, True, False,
            )  # fmt: skip
        else:
            sums = _stream(
                forget, retain, out, start, size, key, position, floor, coefficients, DRAWN, FLOORED,
                FORGET, RETAIN, OUT, COMPUTE, GATED, GATE, PROPAGATE, SUMS, BLOCK // 2, 2, THREADS, V // 2,
                False, False,
            )  # fmt: skip
    return sums


@triton.jit
def _stream(
    forget, retain, out, start, size, key, position, floor, coefficients,
    DRAWN: tl.constexpr, FLOORED: tl.constexpr,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    GATED: tl.constexpr, GATE: tl.constexpr, PROPAGATE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, THREADS: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    forget_size = tl.where(forget == 0, 0, size)
    retain_size = tl.where(retain == 0, 0, size)
    forget = pointer(forget, start, FORGET, VECTOR)
    retain = pointer(retain, start, RETAIN, VECTOR)
    if OUT is not None:
        out = pointer(out, start, OUT, VECTOR)
    # In the interpreter every operation is slow, so each element has a lane of its own there.
    zero = tl.zeros((BLOCK if INTERPRETED else BLOCK // V,), COMPUTE)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    s9, s10, s11, s12, s13, s14 = zero, zero, zero, zero, zero, zero
    t0 = tl.zeros((THREADS,), COMPUTE)
    t1, t2, t3, t4, t5, t6, t7, t8 = t0, t0, t0, t0, t0, t0, t0, t0
    t9, t10, t11, t12, t13, t14 = t0, t0, t0, t0, t0, t0

    # A mask keeps whole vectors only if its limit is known to be a multiple of 16. The rest is the tail.
    UNIT: tl.constexpr = 16 if VECTOR else 1
    body = tl.multiple_of(size & -UNIT, UNIT)
    forget_body = tl.multiple_of(forget_size & -UNIT, UNIT)
    retain_body = tl.multiple_of(retain_size & -UNIT, UNIT)
    BOTH_BF16: tl.constexpr = tl.bfloat16 == FORGET and tl.bfloat16 == RETAIN
    PAIRS: tl.constexpr = ALIGNED and BOTH_BF16 and not INTERPRETED
    # The products of BLOCKS blocks are added together: one long chain would sum up the roundings of equal
    # gradients.
    for first in range(0, body, BLOCKS * BLOCK):
        p0, p1, p2, p6, p7, p8, p9, p10, p11 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for block in tl.static_range(BLOCKS):
            i = first + block * BLOCK
            at = i + tl.arange(0, BLOCK)
            if PAIRS:
                f = pairs(forget, i, forget_body, BLOCK)
                r = pairs(retain, i, retain_body, BLOCK)
            else:
                f = upcast(tl.load(forget + at, mask=at < forget_body, other=0.0), COMPUTE)
                r = upcast(tl.load(retain + at, mask=at < retain_body, other=0.0), COMPUTE)
            u = uniform(key, position + at, COMPUTE) if DRAWN else f
            if SUMS == 15:
                valid = (at < body).to(COMPUTE)
                p0, p1, p2, s3, s4, s5, p6, p7, p8, p9, p10, p11, s12, s13, s14 = accumulate_classes(
                    f, r, floor, u, valid, p0, p1, p2, s3, s4, s5, p6, p7, p8, p9, p10, p11, s12, s13, s14,
                    GATE, DRAWN, FLOORED, VECTOR,
                )  # fmt: skip
            else:
                p0, p1, p2, s3, s4, s5, p6, p7, p8 = accumulate(
                    f, r, floor, p0, p1, p2, s3, s4, s5, p6, p7, p8, SUMS, FLOORED, VECTOR
                )  # fmt: skip
            if OUT is not None:
                store(
                    out + at, at < body, f, r, floor, u, coefficients,
                    OUT, GATED, GATE, DRAWN, FLOORED, PROPAGATE,
                )  # fmt: skip
        s0, s1, s2, s6, s7, s8 = s0 + p0, s1 + p1, s2 + p2, s6 + p6, s7 + p7, s8 + p8
        s9, s10, s11 = s9 + p9, s10 + p10, s11 + p11
    if VECTOR:
        # One element a thread: of several threads that load an element of retain, one could store it first.
        at = body + tl.arange(0, THREADS)
        f = upcast(tl.load(forget + at, mask=at < forget_size, other=0.0), COMPUTE)
        r = upcast(tl.load(retain + at, mask=at < retain_size, other=0.0), COMPUTE)
        u = uniform(key, position + at, COMPUTE) if DRAWN else f
        if SUMS == 15:
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14 = accumulate_classes(
                f, r, floor, u, (at < size).to(COMPUTE), t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11,
                t12, t13, t14, GATE, DRAWN, FLOORED, VECTOR,
            )  # fmt: skip
        else:
            t0, t1, t2, t3, t4, t5, t6, t7, t8 = accumulate(
                f, r, floor, t0, t1, t2, t3, t4, t5, t6, t7, t8, SUMS, FLOORED, VECTOR
            )  # fmt: skip
        if OUT is not None:
            store(
                out + at, at < size, f, r, floor, u, coefficients,
                OUT, GATED, GATE, DRAWN, FLOORED, PROPAGATE,
            )  # fmt: skip
    return (
        lanes(s0, t0), lanes(s1, t1), lanes(s2, t2), lanes(s3, t3), lanes(s4, t4),
        lanes(s5, t5), lanes(s6, t6), lanes(s7, t7), lanes(s8, t8), lanes(s9, t9),
        lanes(s10, t10), lanes(s11, t11), lanes(s12, t12), lanes(s13, t13), lanes(s14, t14),
    )  # fmt: skip


@triton.jit
def pairs(x, i, body, BLOCK: tl.constexpr):
    """The bf16 elements of a block in fp32. They are loaded in pairs: one operation upcasts an element."""
    at = (i >> 1) + tl.arange(0, BLOCK // 2)
    words = tl.multiple_of(x.to(tl.pointer_type(tl.int32)), 16)
    word = tl.load(words + at, mask=at < body // 2, other=0)
    low = (word << 16).to(tl.float32, bitcast=True)
    high = (word & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (BLOCK,))


@triton.jit
def store(
    at, mask, f, r, floor, u, coefficients, OUT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr,
    DRAWN: tl.constexpr, FLOORED: tl.constexpr, PROPAGATE: tl.constexpr,
):  # fmt: skip
    a_c, b_c, a, b, a_2, b_2 = coefficients
    if GATE is not None:
        k = class_of(f, above(r, floor, FLOORED), u, GATE, DRAWN)
        update = tl.where(k == 0.0, weighted(a_c, f, b_c, r), weighted(a_2, f, b_2, r))
        update = tl.where(k == 1.0, weighted(a, f, b, r), update)
    elif GATED:
        conflict = in_conflict(f, above(r, floor, FLOORED))
        update = tl.where(conflict, weighted(a_c, f, b_c, r), weighted(a, f, b, r))
    else:
        update = weighted(a, f, b, r)
    if PROPAGATE:
        # x - x is 0 for finite x, else NaN: no mask. y - 0 is y; y + 0 would turn -0 into 0.
        update = (update - (f - f)) - (r - r)
    tl.store(at, downcast(update, OUT), mask=mask)


@triton.jit
def lanes(x, tail):
    """The lanes of the body and of the tail in fp64, one for each thread."""
    x = tl.reshape(x.to(tl.float64), (x.shape[0] // tail.shape[0], tail.shape[0]))
    return tl.sum(x, axis=0) + tail.to(tl.float64)


@triton.jit
def interleaved(x, y):
    """[n, k] and [n, k] -> [n, 2 * k], whose columns are those of x and y in turns."""
    return tl.reshape(tl.join(x, y), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def four(x0, x1, x2, x3):
    """[n] four times -> [n, 4]"""
    return interleaved(interleaved(x0[:, None], x2[:, None]), interleaved(x1[:, None], x3[:, None]))


@triton.jit
def across(sums, SUMS: tl.constexpr):
    """Adds the lanes of all sums: fp64 [4] for 3 sums, [16] for 15, else [8], and the ninth sum."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14 = sums
    if SUMS == 3:
        columns = four(s0, s1, s2, s3)
    elif SUMS == 15:
        even = interleaved(four(s0, s4, s8, s12), four(s2, s6, s10, s14))
        columns = interleaved(even, interleaved(four(s1, s5, s9, s13), four(s3, s7, s11, s14)))
    else:
        columns = interleaved(four(s0, s2, s4, s6), four(s1, s3, s5, s7))
    return tl.sum(columns, axis=0), tl.sum(s8)


@triton.jit
def put(at, first, ninth, SUMS: tl.constexpr):
    """Stores what `across` returns at the address `at`."""
    column = tl.arange(0, first.shape[0])
    tl.store(at + column, first, mask=column < SUMS)
    if SUMS == 9:
        tl.store(at + 8, ninth)


@triton.jit
def total(at, count, SUMS: tl.constexpr, ROWS: tl.constexpr):
    """Adds `count` entries that `put` stored one after another, in their order in each of `ROWS` lanes."""
    COLUMNS: tl.constexpr = 4 if SUMS == 3 else 16 if SUMS == 15 else 8
    column = tl.arange(0, COLUMNS)[None, :]
    first = tl.zeros((ROWS, COLUMNS), tl.float64)
    ninth = tl.zeros((ROWS,), tl.float64)
    for i in range(0, count, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < SUMS)
        # Other blocks stored them, so they are read from the L2 cache.
        first += tl.load(at + row[:, None] * SUMS + column, mask=mask, other=0.0, cache_modifier=".cg")
        if SUMS == 9:
            ninth += tl.load(at + row * SUMS + 8, mask=row < count, other=0.0, cache_modifier=".cg")
    return tl.sum(first, axis=0), tl.sum(ninth)


@triton.jit
def is_last(counter, count):
    """Counts a block that has stored its part. Whether it is the last of `count`, which sees all parts."""
    # The barrier orders the stores of the whole block before the release.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    return last


@triton.jit
def finish(sums, shape, partials, counters, table, rows, SUMS: tl.constexpr, SPAN: tl.constexpr):
    """Stores the sums of a chunk. The last chunk of the row adds them up into the table."""
    first, ninth = across(sums, SUMS)
    row = tl.load(shape + 3)
    entry = rows + 4 * row
    first_slot = tl.load(entry)
    slots = tl.load(entry + 1)
    into = table + row * SUMS
    if slots == 1:
        put(into, first, ninth, SUMS)
    else:
        slot = tl.program_id(0) - tl.load(shape + 1) + tl.load(shape + 2) - first_slot
        put(partials + (first_slot + slot) * SUMS, first, ninth, SUMS)
        span = slot // SPAN
        spans = (slots + SPAN - 1) // SPAN
        size = tl.minimum(slots - span * SPAN, SPAN).to(tl.int32)
        counter = counters + tl.load(entry + 2)  # of the row, in front of those of its spans
        if is_last(counter + 1 + span, size):
            first, ninth = total(partials + (first_slot + span * SPAN) * SUMS, size, SUMS, ROWS)
            if spans == 1:
                put(into, first, ninth, SUMS)
            else:
                of_spans = partials + tl.load(entry + 3) * SUMS
                put(of_spans + span * SUMS, first, ninth, SUMS)
                if is_last(counter, spans):
                    first, ninth = total(of_spans, spans.to(tl.int32), SUMS, ROWS)
                    put(into, first, ninth, SUMS)
