"""The gram kernel against the oracle, in each of its widths.

Sums to 1e-6 (fp64: 2^-46) of the magnitudes added, counts exactly.
"""

import pytest
import torch

from tests.support import inputs, oracle
from tests.support.backends import DTYPES, import_with_triton, on_device

kernels = import_with_triton("sago.kernels")

BF16, FP16, FP32, FP64 = DTYPES
PRODUCTS, COUNTS = ("ff", "fr", "rr"), ("conflicts", "nonfinite_forget", "nonfinite_retain")


def gram(device, forget, retain, sums, rows=None):
    sides = [[None if t is None else on_device(t, device) for t in side] for side in (forget, retain)]
    out = [f if r is None else r for f, r in zip(*sides, strict=True)]
    rows = list(range(len(out))) if rows is None else rows
    before = [None if t is None else t.clone() for side in sides for t in side]
    table = kernels.gram(kernels.Batch(torch.device(device), *sides, out, rows, max(rows) + 1), sums)
    for t, kept in zip(sides[0] + sides[1], before, strict=True):
        assert t is None or torch.equal(t.view(torch.uint8), kept.view(torch.uint8)) or t.ndim == 0, (
            "gram wrote"
        )
    assert table.dtype == FP64
    return table.cpu().numpy()


def assert_table(table, sums, forget, retain, rows=None):
    expected = oracle.expect(forget, retain, "sum", groups=rows)
    wide = FP64 if all(t is None or t.dtype == FP64 for t in forget + retain) else FP32
    products = table[:, 0:3] + table[:, 6:9] if sums == 9 else table[:, 0:3]
    for k, name in enumerate(PRODUCTS):
        allowed = (oracle.SUM_ERROR[FP64] if wide == FP64 else oracle.PROMISED) * expected.magnitudes[name]
        assert (abs(products[:, k] - expected.sums[name]) <= allowed).all(), name
    if sums > 3:
        for k, name in enumerate(COUNTS):
            assert (table[:, 3 + k] == expected.sums[name]).all(), name


@pytest.mark.parametrize("sums", [3, 6, 9])
@pytest.mark.parametrize(
    "dtypes", [*[(d, d) for d in DTYPES], (BF16, FP32), (FP32, FP16), (FP64, BF16)], ids=str
)
def test_sums(device, sums, dtypes):
    for name in ("antiparallel", "tails", "unaligned"):
        forget, retain = inputs.IN_RANGE[name](*dtypes)
        assert_table(gram(device, forget, retain, sums), sums, forget, retain)


@pytest.mark.parametrize("name", ["around_a_block", "around_a_chunk", "three_chunks"])
def test_sums_over_blocks_and_chunks(device, name):
    forget, retain = inputs.FAMILIES[name](FP32, FP32)
    assert_table(gram(device, forget, retain, 3), 3, forget, retain)
    rows = [0] * len(forget)
    assert_table(gram(device, forget, retain, 9, rows), 9, forget, retain, rows)


def test_both_parts_of_nine_sums(device):
    f, r = (t.double() for t in inputs.pair(300))
    table = gram(device, [f], [r], 9)[0]
    inside = f * r < 0
    for part, columns in ((~inside, table[:3]), (inside, table[6:])):
        expected = [(x[part] * y[part]).sum().item() for x, y in ((f, f), (f, r), (r, r))]
        # All terms of a sum have one sign. Both sides add 300 of them at most.
        assert columns.tolist() == pytest.approx(expected, rel=2 * oracle.rounding_error(300, FP64))


def test_rows_add_tensors_of_different_dtypes(device):
    dtypes = [(BF16, BF16), (FP32, BF16), (FP64, FP64), (FP32, FP32), (BF16, BF16)]
    pairs = [inputs.pair(40 + i, i) for i in range(5)]
    forget = [f.to(d) for (f, _), (d, _) in zip(pairs, dtypes, strict=True)]
    retain = [r.to(d) for (_, r), (_, d) in zip(pairs, dtypes, strict=True)]
    rows = [1, 0, 1, 0, 0]
    for sums in (3, 9):
        table = gram(device, forget, retain, sums, rows)
        # The oracle numbers rows as they come up.
        assert_table(table[[1, 0]], sums, forget, retain, rows)


def test_missing_gradients_and_rows_without_elements(device):
    f, r = (t.float() for t in inputs.pair(40))
    table = gram(device, [f, None], [None, r], 6, [0, 2])
    assert table[0, 0] == pytest.approx((f.double() ** 2).sum().item(), rel=oracle.PROMISED)
    assert table[2, 2] == pytest.approx((r.double() ** 2).sum().item(), rel=oracle.PROMISED)
    assert not table[1].any()
    assert not table[0, 1:].any()
    assert not table[2, [0, 1, 3, 4, 5]].any()


def test_counts_of_what_is_not_finite(device):
    for dtype in DTYPES:
        forget, retain = inputs.specials(dtype, dtype)
        for sums in (6, 9):
            table = gram(device, forget, retain, sums)
            expected = oracle.expect(forget, retain, "sum").sums
            assert table[0, 3:6].tolist() == [expected[name][0] for name in COUNTS]


def test_products_are_not_rounded_before_the_sum(device):
    # In bf16 each product would round to 1.0156 and the sum to 1016. In fp32 all sums are exact: 24 bits.
    f = torch.full((1000,), 1 + 2.0**-7, dtype=BF16)
    table = gram(device, [f], [f], 3)
    assert table[0].tolist() == [1000 * (1 + 2.0**-7) ** 2] * 3


def test_bits_do_not_depend_on_company(device):
    forget, retain = inputs.around_a_block(BF16, BF16)
    together = gram(device, forget, retain, 9)
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        assert (gram(device, [f], [r], 9)[0] == together[i]).all()
    assert (gram(device, forget[::-1], retain[::-1], 9)[::-1] == together).all()
