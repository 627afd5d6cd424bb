"""Numbers of elements from 0 to 130 and around a chunk, at every alignment of both inputs and the output."""

import pytest
import torch

from tests.support import inputs, properties
from tests.support.backends import Backend

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = tuple(range(131))
AROUND_A_CHUNK = tuple(inputs.CHUNK + k for k in (-17, -1, 0, 1, 17))

pytestmark = pytest.mark.usefixtures("one_thread")


def at(values, alignment):
    """A copy that starts so many elements after an aligned address."""
    return torch.cat([values.new_zeros(alignment), values])[alignment:]


def check(run, dtype, sizes):
    """Bits, sums and counts of a list in which the alignments of the two inputs differ."""
    count = 16 // dtype.itemsize
    pairs = [inputs.pair(n, n % 89) for n in sizes]
    forget = [at(f.to(dtype), (i + 3 * run.offset) % count) for i, (f, _) in enumerate(pairs)]
    retain = [at(r.to(dtype), (i // count + run.offset) % count) for i, (_, r) in enumerate(pairs)]
    found = run(forget, retain, "sago", gamma=0.75, alpha=1.5)
    properties.assert_as_reference(lambda *_, **__: found, forget, retain, "sago", gamma=0.75, alpha=1.5)
    properties.assert_report(found[1], forget, retain, "sago", gamma=0.75, alpha=1.5)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_compiled(dtype, offset):
    check(Backend("compiled", "cpu", offset), dtype, SMALL + AROUND_A_CHUNK)


def test_kernels(device):
    """A tail has up to 15 elements. One variant of the kernels handles every unaligned address."""
    check(Backend("triton", device, 1), BF16, SMALL[:67] + AROUND_A_CHUNK[1:4])
