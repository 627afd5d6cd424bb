"""The lists of gradients have as many tensors and elements as the models."""

import pytest

from benchmarks.workloads import SIZES, WORKLOADS, elements, shrink

COUNTS = {
    "one": (1, 1 << 30),
    "llama-3-8b": (291, 8_030_261_248),
    "zephyr-7b": (291, 7_241_732_096),
    "llama-3.2-1b": (146, 1_235_814_400),
    "phi-3-mini": (195, 3_821_079_552),
    "rmu": (3, 3 * 4096 * 14336),
    "lora": (448, 41_943_040),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_totals(name):
    assert (len(WORKLOADS[name]), elements(WORKLOADS[name])) == COUNTS[name]


def test_tiny_and_flat_tensors():
    sizes = [n for (n,) in WORKLOADS["tiny"]]
    assert (len(sizes), min(sizes)) == (2000, 64)
    assert 4000 < max(sizes) <= 4096
    assert sum(n % 8 != 0 for n in sizes) > 1000
    assert {name: elements(shapes) for name, shapes in SIZES.items()} == {
        f"2^{k}": 2**k for k in (14, 18, 22, 26, 30)
    }


def test_adapters_come_in_pairs_of_the_rank():
    for a, b in zip(WORKLOADS["lora"][::2], WORKLOADS["lora"][1::2], strict=True):
        assert (a[0], b[1]) == (16, 16)
    assert WORKLOADS["lora"][:2] == [(16, 4096), (4096, 16)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_shrunk_list_has_as_many_tensors(name):
    shapes = WORKLOADS[name]
    small = shrink(shapes, 200_000)
    assert [len(shape) for shape in small] == [len(shape) for shape in shapes]
    assert 40_000 < elements(small) <= 200_000
    assert shrink(shapes, elements(shapes)) == shapes


def test_no_dimension_is_shrunk_below_16():
    assert set(shrink(WORKLOADS["lora"], 1)) == {(16, 16)}
    assert shrink([(4, 100), (20,)], 90) == [(4, 16), (16,)]
