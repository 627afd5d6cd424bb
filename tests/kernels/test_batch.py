"""The tables that tell the kernels where tensors lie."""

import pytest
import torch

from tests.support.backends import import_with_triton

batch = import_with_triton("sago.kernels.batch")

CPU = torch.device("cpu")
CHUNK = batch.CHUNK
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SAME, MIXED = (FP32,) * 3, (BF16, FP32, FP32)


def layout(numels, dtypes, rows, row_count):
    return batch.Layout(tuple(numels), tuple(dtypes), tuple(rows), row_count, CPU)


def slots_of(found):
    """For each tensor of the list its slots, as the kernels compute them from the tables."""
    slots = {}
    for group in found.sections:
        for chunk, member in enumerate(group.owner.tolist()):
            _, first_chunk, first_slot, _ = group.shapes[member].tolist()
            slots.setdefault(group.members[member], []).append(first_slot + chunk - first_chunk)
    return slots


def test_a_tensor_is_cut_into_chunks():
    found = layout([CHUNK - 1, CHUNK, CHUNK + 1, 1], [SAME] * 4, range(4), 4)
    (group,) = found.sections
    assert group.members == [0, 1, 2, 3]
    assert group.owner.tolist() == [0, 1, 2, 2, 3]
    assert group.shapes.tolist() == [
        [CHUNK - 1, 0, 0, 0],
        [CHUNK, 1, 1, 1],
        [CHUNK + 1, 2, 2, 2],
        [1, 4, 4, 3],
    ]
    assert found.rows.tolist() == [[0, 1, 0, 5], [1, 1, 2, 5], [2, 2, 4, 5], [4, 1, 6, 5]]
    assert (found.slots, found.entries, found.counters) == (5, 5, 8)


def test_a_row_is_cut_into_spans():
    """The counter of a row precedes those of its spans. The slots of spans follow those of the chunks."""
    span = batch.SPAN * CHUNK
    found = layout([span, span + 1, 0, 1], [SAME] * 4, [0, 1, 2, 1], 3)
    slots = batch.SPAN, batch.SPAN + 2
    assert found.rows.tolist() == [
        [0, slots[0], 0, sum(slots)],
        [slots[0], slots[1], 2, sum(slots)],
        [sum(slots), 0, 5, sum(slots) + 2],
    ]
    assert (found.slots, found.entries, found.counters) == (sum(slots), sum(slots) + 2, 6)


def test_slots_of_a_row_are_together_and_in_the_order_of_the_list():
    numels = [2 * CHUNK, 5, CHUNK + 1, 0, 7, 3 * CHUNK]
    dtypes = [SAME, MIXED, MIXED, SAME, SAME, MIXED]
    rows = [1, 0, 1, 0, 2, 0]
    found = layout(numels, dtypes, rows, 4)
    assert [group.dtypes for group in found.sections] == [SAME, MIXED]
    assert [group.members for group in found.sections] == [[0, 4], [1, 2, 5]]
    slots = slots_of(found)
    in_rows = [[s for i in range(6) if rows[i] == row for s in slots.get(i, [])] for row in range(4)]
    for row, (first, count, *_) in enumerate(found.rows.tolist()):
        assert in_rows[row] == list(range(first, first + count))
    assert sorted(slot for row in in_rows for slot in row) == list(range(found.slots))
    assert found.rows[3].tolist()[1] == 0


def test_launches_do_not_depend_on_the_length_of_the_list():
    for length in (1, 2, 300):
        assert len(layout([3] * length, [SAME] * length, range(length), length).sections) == 1


def test_offsets_are_64_bit():
    found = layout([1 << 36], [SAME], [0], 1)
    (group,) = found.sections
    assert group.shapes.dtype == found.rows.dtype == torch.int64
    assert group.shapes[0, 0] == 1 << 36
    assert len(group.owner) == (1 << 36) // CHUNK


def make(forget, retain, out):
    return batch.Batch(CPU, forget, retain, out, list(range(len(out))), len(out))


def test_addresses():
    f, r, o = (torch.zeros(33) for _ in range(3))
    made = make([f, None, f[1:], f[4:8]], [r, r, None, r[:4]], [o, o, o[1:], o[:4]])
    (part,) = made.launches
    table, aligned = part.tables[0], part.aligned
    assert table.dtype == torch.int64
    assert table.tolist() == [
        [f.data_ptr(), r.data_ptr(), o.data_ptr(), 1],
        [0, r.data_ptr(), o.data_ptr(), 1],
        [f.data_ptr() + 4, 0, o.data_ptr() + 4, 0],
        [f.data_ptr() + 16, r.data_ptr(), o.data_ptr(), 1],
    ]
    assert aligned is False
    assert make([f], [r], [o]).launches[0].aligned is True


@pytest.mark.parametrize("which", range(3))
def test_one_unaligned_tensor_is_enough(which):
    tensors = [torch.zeros(40, dtype=BF16)[8 + (i == which) :][:20] for i in range(3)]
    (part,) = make(*([t] for t in tensors)).launches
    assert part.tables[0][0, 3].item() == 0
    assert not part.aligned


def test_dtypes_of_a_missing_gradient_are_its_partners():
    b, d = torch.zeros(4, dtype=BF16), torch.zeros(4, dtype=FP64)
    made = make([b, None, b], [None, d, d], [b, b, d])
    assert [part.dtypes for part in made.launches] == [
        (BF16, BF16, BF16),
        (FP64, FP64, BF16),
        (BF16, FP64, FP64),
    ]


def test_tables_are_where_they_are_said_to_be():
    t = torch.zeros(50)
    (part,) = make([t], [t], [t]).launches
    assert part.addresses == tuple(table.data_ptr() for table in part.tables)
    assert part.chunks == 1


def test_a_layout_is_kept_and_its_addresses_renewed():
    f, r, o, other = (torch.zeros(50) for _ in range(4))
    first, moved = make([f], [r], [o]), make([other], [r], [o])
    assert first.layout is moved.layout
    assert moved.launches[0].tables[0][0, 0].item() == other.data_ptr()
    assert first.launches[0].tables[0][0, 0].item() == f.data_ptr()


def test_many_layouts():
    """More than is kept: each batch holds its own."""
    tensors = [torch.zeros(51 + i % 70) for i in range(300)]
    made = [make([t], [t], [t]) for t in tensors]
    for b, t in zip(made, tensors, strict=True):
        assert b.launches[0].tables[0].tolist() == [[t.data_ptr()] * 3 + [int(t.data_ptr() % 16 == 0)]]
        assert b.layout.sections[0].shapes[0, 0] == t.numel()


def test_counters_are_kept_until_they_are_discarded():
    made = make([torch.zeros(3)] * 5, [torch.zeros(3)] * 5, [torch.zeros(3)] * 5)
    for sums in (3, 6, 9):
        partials, counters = made.scratch(sums, None)
        assert partials.shape == (5, sums)
        assert counters.tolist() == [0] * 10  # of 5 rows and 5 spans
        assert made.scratch(sums, None)[1] is counters
        assert made.scratch(sums, None)[0] is not partials
    counters[2] = 1
    made.discard_counters()
    assert not made.scratch(3, None)[1].any()


def test_streams_have_counters_of_their_own():
    made = make([torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)])
    found = {}
    for stream in ("a", "b", "a"):
        counters = made.scratch(3, stream)[1]
        assert found.setdefault(stream, counters) is counters
    assert found["a"] is not found["b"]


@pytest.mark.parametrize("sums", [3, 6, 9])
def test_rows_that_no_kernel_writes_are_zero(sums):
    t = torch.zeros(3)
    for tensors, rows, row_count in (([t, t], [0, 2], 4), ([t, t[:0]], [0, 1], 2)):
        made = batch.Batch(CPU, tensors, tensors, tensors, rows, row_count)
        table = made.table(sums)
        assert table.shape == (row_count, sums)
        assert not table.any()


@pytest.mark.parametrize(
    ("dtypes", "elements"),
    [((BF16, BF16, FP32), 8), ((FP32, FP32, FP32), 4), ((FP64, FP64, FP64), 2), ((FP64, BF16, FP64), 8)],
)
def test_vectors_are_16_bytes_of_the_narrowest(dtypes, elements):
    assert batch.vector(dtypes) == elements
