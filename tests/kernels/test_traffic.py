"""What a synthesis loads and stores, counted: each gradient is read once, or twice, and written once."""

import numpy as np
import pytest
import torch

import sago
from tests.support import inputs
from tests.support.backends import DTYPES, ELEMENTWISE, GRAM, INTERPRETED, Backend, import_with_triton
from tests.support.traffic import assert_floor, counted
from tests.support.windows import backward, fresh, window

triton = import_with_triton("triton")

if not INTERPRETED:
    pytest.skip("accesses are counted where kernels are interpreted", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")
tl = triton.language

BF16, FP16, FP32, FP64 = DTYPES
TRITON = Backend("triton", "cpu")
READS = {**dict.fromkeys(ELEMENTWISE, 1), **dict.fromkeys(GRAM, 2)}
WIDTHS = [*((d, d) for d in DTYPES), (BF16, FP32), (FP64, FP16)]


def gradients(forget=FP32, retain=FP32):
    """Tails, blocks, none; starts off by one element, another order of elements, None on either side."""
    f, r = (t.float().to(d) for t, d in zip(inputs.pair(4500), (forget, retain), strict=True))
    both = [(f[:n].clone(), r[:n].clone()) for n in (1, 16, 17, 4500, 0)]
    both += [(f[:40].clone()[1:], r[:40].clone()[1:]), (f[:39].clone(), r[:40].clone()[1:])]
    both += [(f[:60].view(6, 10).t().clone(), r[:60].view(6, 10).t().clone())]
    both += [(None, r[:33].clone()), (f[:2065].clone(), None), (None, None)]
    return [x for x, _ in both], [y for _, y in both]


def outputs(forget, retain):
    return [t if t is None else torch.empty_like(t) for t in filled(retain, forget)]


def filled(side, other):
    return [y if x is None else x for x, y in zip(side, other, strict=True)]


def synthesized(forget, retain, out, rule, **options):
    with counted(*forget, *retain, *out) as traffic:
        sago.synthesize_(forget, retain, rule, out=out, backend=TRITON.name, **options)
    return traffic


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", READS)
def test_every_gradient_is_read_no_more_than_it_has_to_be(rule, stats):
    forget, retain = gradients()
    out = outputs(forget, retain)
    assert_floor(synthesized(forget, retain, out, rule, stats=stats), forget, retain, out, READS[rule])


@pytest.mark.parametrize("dtypes", WIDTHS, ids=lambda both: f"{both[0]}-{both[1]}")
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_in_every_dtype(rule, dtypes):
    """In place."""
    forget, retain = gradients(*dtypes)
    out = filled(retain, forget)
    assert_floor(synthesized(forget, retain, out, rule), forget, retain, out, READS[rule])


@pytest.mark.parametrize("rule", ["sago", "blur"])
def test_lists_of_several_dtypes(rule):
    both = [gradients(*dtypes) for dtypes in WIDTHS[::2]]
    forget, retain = ([t for side in sides for t in side[2:4]] for sides in zip(*both, strict=True))
    out = [torch.empty_like(t, dtype=FP32) for t in retain]
    assert_floor(synthesized(forget, retain, out, rule), forget, retain, out, READS[rule])


def test_into_forget():
    forget, retain = gradients()
    out = filled(forget, retain)
    assert_floor(synthesized(forget, retain, out, "sago"), forget, retain, out, 1)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_several_chunks(rule):
    forget, retain = ([t.bfloat16()] for t in inputs.pair(inputs.CHUNK + 17))
    assert_floor(synthesized(forget, retain, retain, rule), forget, retain, retain, READS[rule])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "widths"), [("sum", 3), ("sago", 3), ("pcgrad", 5), ("blur", 5)])
def test_bytes_an_element(rule, widths, dtype):
    """3s for a rule without inner products, its statistics included; 5s for one with them."""
    forget, retain = ([t.to(dtype)] for t in inputs.pair(5000))
    traffic = synthesized(forget, retain, retain, rule)
    moved = traffic.loads.within([*forget, *retain]) + traffic.stores.within([*forget, *retain])
    assert moved / 5000 == widths * dtype.itemsize


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_beside_the_gradients_next_to_nothing_is_moved(rule):
    """In bf16, where they are smallest: below 0.2 % of what is moved, in memory below 0.1 % of theirs."""
    forget, retain = ([t.bfloat16()] for t in inputs.pair(4 * inputs.CHUNK))
    traffic = synthesized(forget, retain, retain, rule)
    sides = [*forget, *retain]
    moved = traffic.loads.bytes + traffic.stores.bytes
    beside = moved - traffic.loads.within(sides) - traffic.stores.within(sides)
    assert 0 < beside < moved / 500
    given = {t.data_ptr(): t.nbytes for found in traffic.arguments.values() for t in found}
    assert 0 < sum(given.values()) < sum(t.nbytes for t in sides) / 1000


def stored(traffic):
    """The arguments that were written; gram is the table of the launch before."""
    return {name for name, found in traffic.arguments.items() if traffic.stores.within(found)} - {"gram"}


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_tables_are_read_and_sums_written(rule):
    """A chunk that is alone in its row stores its sums in the table. Others write and read a slot each."""
    forget, retain = gradients()
    out = outputs(forget, retain)
    traffic = synthesized(forget, retain, out, rule)
    assert stored(traffic) == {"table"}
    long = [[t.float()] for t in inputs.pair(2 * inputs.CHUNK)]
    traffic = synthesized(*long, outputs(*long), rule)
    assert stored(traffic) == {"partials", "table", "counters"}
    for partials in traffic.arguments["partials"]:
        assert (traffic.stores.of(partials) == 1).all()
        assert (traffic.loads.of(partials) == 1).all()
    elementwise = synthesized(forget, retain, out, "sago", stats=False)
    assert elementwise.stores.bytes == elementwise.stores.within(out)


@pytest.mark.parametrize(
    ("rule", "options", "reads"),
    [
        ("sago", {}, 1),
        ("sago", {"stats": False}, 1),
        ("sago", {"max_norm": 1.0}, 2),
        ("sago", {"nonfinite": "zero_update"}, 2),
        ("pcgrad", {}, 2),
        ("pcgrad_global", {"max_norm": 1.0}, 2),
        ("blur", {"nonfinite": "zero_update", "stats": False}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("accumulate_dtype", "missing"),
    [(None, False), (None, True), (FP32, True)],
    ids=["whole", "missing", "in fp32"],
)
def test_buckets(rule, options, reads, accumulate_dtype, missing):
    """Clipping, and an update that may be zero as a whole, cost an elementwise rule its second read."""
    forget, retain = (side[:5] for side in gradients(BF16, BF16))
    if missing:
        forget[0] = retain[1] = None
    params, buckets = fresh(TRITON, forget, retain, accumulate_dtype=accumulate_dtype)
    window(buckets, params, forget, retain)
    buckets.synthesize_("sum", stats=False)
    out = [p.grad for p in params]  # in the next window too
    buckets.zero_()
    window(buckets, params, forget, retain)
    accumulators = buckets.forget_grads, buckets.retain_grads
    with counted(*(buffer(t) for side in (*accumulators, out) for t in side if t is not None)) as traffic:
        buckets.synthesize_(rule, **options)
    assert_floor(traffic, *accumulators, out, reads)
    assert [p.grad.data_ptr() for p in params] == [t.data_ptr() for t in out]


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_buckets_in_backward(rule):
    forget, retain = (side[:4] for side in gradients())
    params, buckets = fresh(TRITON, forget, retain, bucket_cap_mb=0.01)
    window(buckets, params, forget, retain)
    both = buckets.forget_grads, buckets.retain_grads
    buckets.synthesize_("sum")
    buckets.zero_()
    with buckets.forget():
        backward(params, forget)
    with counted(*map(buffer, (*both[0], *both[1]))) as traffic, buckets.synthesize_in_backward(rule):
        backward(params, retain)
    assert_floor(traffic, *both, both[1], READS[rule])


def buffer(view):
    """All of the memory that a view is in: a whole buffer may be synthesized, the gaps in it included."""
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())


@triton.jit
def _known(x, y, count, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    value += tl.load(x)  # of one address, once a program
    tl.store(y + at, value.to(tl.float64), mask=at < n)
    tl.atomic_add(count, 1)


def test_the_counts_of_a_kernel_that_is_known():
    x, y, count = torch.arange(10.0), torch.empty(12, dtype=FP64), torch.zeros(1, dtype=torch.int32)
    with counted() as traffic:
        _known[(2,)](x, y, count, 10, BLOCK=8)
    assert y[:10].tolist() == x.tolist()
    assert count.item() == 2
    assert traffic.loads.of(x).tolist() == [3] * 4 + [1] * 36
    assert traffic.stores.of(x).tolist() == [0] * 40
    assert traffic.stores.of(y).tolist() == [1] * 80 + [0] * 16
    assert traffic.loads.of(count).tolist() == traffic.stores.of(count).tolist() == [2] * 4
    assert (traffic.loads.bytes, traffic.stores.bytes) == (12 * 4 + 8, 10 * 8 + 8)
    assert traffic.arguments == {"x": [x], "y": [y], "count": [count]}
    assert not traffic.strays


def test_nothing_is_accessed_where_no_memory_was_given():
    """Not even address 0."""
    memory = torch.arange(10.0)
    x, y, count = memory[:8], torch.zeros(16, dtype=FP64)[:9], torch.zeros(1, dtype=torch.int32)
    with counted() as traffic:
        _known[(2,)](x, y, count, 10, BLOCK=8)
    assert sorted(traffic.strays) == sorted([*range(*ends(memory[8:], 4)), *range(*ends(y._base[9:10], 8))])
    assert y._base[9:].tolist() == [0.0] * 7
    with counted(memory) as traffic:
        _known[(2,)](x, y._base, count, 10, BLOCK=8)
    assert not traffic.strays


def ends(t, step):
    return t.data_ptr(), t.data_ptr() + t.nbytes, step


def test_what_ends_with_the_block():
    x, y, count = torch.arange(10.0), torch.empty(10, dtype=FP64), torch.zeros(1, dtype=torch.int32)
    with counted() as traffic:
        pass
    _known[(2,)](x, y, count, 10, BLOCK=8)
    assert (traffic.loads.bytes, traffic.stores.bytes, dict(traffic.arguments)) == (0, 0, {})
    assert not np.any(traffic.loads.of(x))
