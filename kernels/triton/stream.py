"""Device functions of both kernels: locate a chunk, read it once, add its sums in two fixed stages.

Inside a chunk every lane adds in fp32 (fp64 for fp64 gradients). The lanes of the chunk are then added in
fp64 and stored in the chunk's slot. The chunk of a row that finishes last adds the slots of the row in slot
order. The sum does not depend on which chunk that is, so results are the same from run to run.
"""

import triton
import triton.language as tl


@triton.jit
def is_negative(x):
    """The sign bit, also of -0."""
    INTEGER: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    return x.to(INTEGER, bitcast=True) < 0


@triton.jit
def in_conflict(f, r):
    # f * r may underflow, but its sign bit is still that of the product. A NaN is not above 0.
    return is_negative(f * r) & (tl.abs(f) > 0) & (tl.abs(r) > 0)


# The interpreter truncates fp32 to bf16 and misreads bf16 subnormals, so it casts through the bits here.
INTERPRETED = tl.constexpr(not isinstance(in_conflict, triton.JITFunction))


@triton.jit
def upcast(x, COMPUTE: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def downcast(u, OUT: tl.constexpr):
    """One rounding, to nearest even; fp64 goes to 16 bits through fp32, as it does in torch."""
    if tl.bfloat16 == OUT or tl.float16 == OUT:
        u = u.to(tl.float32)
    if INTERPRETED and tl.bfloat16 == OUT:
        bits = u.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(u == u, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return u.to(OUT)


@triton.jit
def weighted(a, f, b, r):
    """a * f + b * r, where a gradient whose coefficient is 0 is left out, be it NaN or inf."""
    x = tl.where(a == 0, 0.0, a * f)
    y = b * r
    return tl.where(b == 0, x, tl.where(a == 0, y, x + y))


@triton.jit
def one_if(condition, DTYPE: tl.constexpr):
    return tl.where(condition, 1.0, 0.0).to(DTYPE)


@triton.jit
def is_finite(x):
    return x - x == 0  # NaN for NaN and inf; |x| < inf compiles to more instructions


@triton.jit
def fold(x, V: tl.constexpr):
    """Adds the V elements of one vector load inside a thread, so that an accumulator costs 1/V registers."""
    return tl.sum(tl.reshape(x, (x.shape[0] // V, V)), axis=1)


@triton.jit
def accumulate(f, r, s0, s1, s2, s3, s4, s5, s6, s7, s8, SUMS: tl.constexpr, V: tl.constexpr):
    """Adds a block to the sums.

    SUMS = 3: ff, fr, rr. SUMS = 6: then the number of conflicts and of non-finite elements of f and r.
    SUMS = 9: ff, fr, rr of the elements out of conflict, the three counts, ff, fr, rr of those in conflict.
    """
    ff = f * f
    fr = f * r
    rr = r * r
    if SUMS > 3:
        conflict = in_conflict(f, r)
        s3 += fold(one_if(conflict, f.dtype), V)
        s4 += fold(one_if(~is_finite(f), f.dtype), V)
        s5 += fold(one_if(~is_finite(r), r.dtype), V)
    if SUMS == 9:
        s6 += fold(tl.where(conflict, ff, 0.0), V)
        s7 += fold(tl.where(conflict, fr, 0.0), V)
        s8 += fold(tl.where(conflict, rr, 0.0), V)
        ff = tl.where(conflict, 0.0, ff)
        fr = tl.where(conflict, 0.0, fr)
        rr = tl.where(conflict, 0.0, rr)
    if SUMS > 0:
        s0 += fold(ff, V)
        s1 += fold(fr, V)
        s2 += fold(rr, V)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8


@triton.jit
def locate(addresses, shapes, owner, CHUNK: tl.constexpr):
    """The tensors of this program's chunk, its start in them, its elements, and its entry of `shapes`."""
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
    # The hint counts only behind the cast; on the integer it leaves the loads scalar.
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit
def stream(
    forget, retain, out, aligned, start, size, a_c, b_c, a, b,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    GATED: tl.constexpr, PROPAGATE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
    V: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Reads `size` elements of both gradients once, returns their sums and, unless OUT is None, writes

        out_i = a_c * f_i + b_c * r_i if GATED and f_i, r_i in conflict else a * f_i + b * r_i

    or, if PROPAGATE, NaN where f_i or r_i is NaN or inf. An address of 0 is a zero gradient. Loads are
    upcast to COMPUTE, one rounding at the store. ALIGNED says that every address of the launch is a
    multiple of 16; otherwise `aligned` says it of this one.
    """
    if ALIGNED:
        sums = _stream(
            forget, retain, out, start, size, a_c, b_c, a, b,
            FORGET, RETAIN, OUT, COMPUTE, GATED, PROPAGATE, SUMS, BLOCK, V, True,
        )  # fmt: skip
    else:
        if aligned != 0:
            sums = _stream(
                forget, retain, out, start, size, a_c, b_c, a, b,
                FORGET, RETAIN, OUT, COMPUTE, GATED, PROPAGATE, SUMS, BLOCK, V, True,
            )  # fmt: skip
        else:
            sums = _stream(
                forget, retain, out, start, size, a_c, b_c, a, b,
                FORGET, RETAIN, OUT, COMPUTE, GATED, PROPAGATE, SUMS, BLOCK // 2, V // 2, False,
            )  # fmt: skip
    return sums


@triton.jit
def _stream(
    forget, retain, out, start, size, a_c, b_c, a, b,
    FORGET: tl.constexpr, RETAIN: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    GATED: tl.constexpr, PROPAGATE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
    V: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    forget_size = tl.where(forget == 0, 0, size)
    retain_size = tl.where(retain == 0, 0, size)
    forget = pointer(forget, start, FORGET, VECTOR)
    retain = pointer(retain, start, RETAIN, VECTOR)
    if OUT is not None:
        out = pointer(out, start, OUT, VECTOR)
    s0 = tl.zeros((BLOCK // V,), COMPUTE)
    s1, s2, s3, s4, s5, s6, s7, s8 = s0, s0, s0, s0, s0, s0, s0, s0
    t0 = tl.zeros((16,), COMPUTE)
    t1, t2, t3, t4, t5, t6, t7, t8 = t0, t0, t0, t0, t0, t0, t0, t0

    # A mask keeps whole vectors only if its limit is a multiple of 16; the rest is the tail.
    UNIT: tl.constexpr = 16 if VECTOR else 1
    body = size // UNIT * UNIT
    forget_body = forget_size // UNIT * UNIT
    retain_body = retain_size // UNIT * UNIT
    for i in range(0, body, BLOCK):
        at = i + tl.arange(0, BLOCK)
        f = upcast(tl.load(forget + at, mask=at < forget_body, other=0.0), COMPUTE)
        r = upcast(tl.load(retain + at, mask=at < retain_body, other=0.0), COMPUTE)
        s0, s1, s2, s3, s4, s5, s6, s7, s8 = accumulate(f, r, s0, s1, s2, s3, s4, s5, s6, s7, s8, SUMS, V)
        if OUT is not None:
            store(out + at, at < body, f, r, a_c, b_c, a, b, OUT, GATED, PROPAGATE)
    if VECTOR:
        at = body + tl.arange(0, 16)
        f = upcast(tl.load(forget + at, mask=at < forget_size, other=0.0), COMPUTE)
        r = upcast(tl.load(retain + at, mask=at < retain_size, other=0.0), COMPUTE)
        t0, t1, t2, t3, t4, t5, t6, t7, t8 = accumulate(f, r, t0, t1, t2, t3, t4, t5, t6, t7, t8, SUMS, 1)
        if OUT is not None:
            store(out + at, at < size, f, r, a_c, b_c, a, b, OUT, GATED, PROPAGATE)
    return (
        across(s0, t0), across(s1, t1), across(s2, t2), across(s3, t3), across(s4, t4),
        across(s5, t5), across(s6, t6), across(s7, t7), across(s8, t8),
    )  # fmt: skip


@triton.jit
def store(
    at, mask, f, r, a_c, b_c, a, b, OUT: tl.constexpr, GATED: tl.constexpr, PROPAGATE: tl.constexpr
):  # fmt: skip
    if GATED:
        u = tl.where(in_conflict(f, r), weighted(a_c, f, b_c, r), weighted(a, f, b, r))
    else:
        u = weighted(a, f, b, r)
    if PROPAGATE:
        # x - x is 0 for finite x, else NaN: no mask. u - 0 is u; u + 0 would turn -0 into 0.
        u = (u - (f - f)) - (r - r)
    tl.store(at, downcast(u, OUT), mask=mask)


@triton.jit
def across(x, tail):
    return tl.sum(x.to(tl.float64)) + tl.sum(tail.to(tl.float64))


@triton.jit
def finish(sums, shape, partials, counters, table, rows, slots, SUMS: tl.constexpr, WIDTH: tl.constexpr):
    """Stores a chunk's sums in its slot; the last chunk of the row adds the row's slots into the table."""
    slot = tl.program_id(0) - tl.load(shape + 1) + tl.load(shape + 2)
    row = tl.load(shape + 3)
    for k in tl.static_range(SUMS):
        tl.store(partials + k * slots + slot, sums[k])
    # The barrier orders the stores of the whole block before the release.
    tl.debug_barrier()
    first = tl.load(rows + 2 * row)
    count = tl.load(rows + 2 * row + 1)
    done = tl.atomic_add(counters + row, 1, sem="acq_rel")
    if done == count - 1:
        for k in tl.static_range(SUMS):
            column = partials + k * slots + first
            total = tl.zeros((WIDTH,), tl.float64)
            for i in range(0, count, WIDTH):
                at = i + tl.arange(0, WIDTH)
                total += tl.load(column + at, mask=at < count, other=0.0, cache_modifier=".cg")
            tl.store(table + row * SUMS + k, tl.sum(total))
        tl.store(counters + row, 0)  # for the next launch
