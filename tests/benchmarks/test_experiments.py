"""Other orders of work give the bits of the two launches that ship."""

import pytest
import torch

import sago.reference
from sago.rules import RULES, Rule
from tests import inputs, properties
from tests.backends import DTYPES, on_device

kernels = pytest.importorskip("benchmarks.experiments.kernels", reason="needs Triton")

BF16, _, FP32, _ = DTYPES
CHUNK = inputs.CHUNK
SIZES = (1, 17, 2049, CHUNK, CHUNK + 5, 2 * CHUNK - 3)
SMALL = (1, 15, 16, 17, 2047, 2049, 5000, CHUNK)


def pairs(sizes, dtype, device):
    both = [inputs.pair(n, seed) for seed, n in enumerate(sizes)]
    return [[on_device(t.float().to(dtype), device) for t in side] for side in zip(*both, strict=True)]


def fenced(like):
    """NaN of one more vector than is to be written."""
    return [torch.full((t.numel() + 16,), torch.nan, dtype=t.dtype, device=t.device) for t in like]


def run(name, forget, retain, out, rows=None, rule=RULES["pcgrad"]):
    launches = kernels.prepare(kernels.EXPERIMENTS[name], forget, retain, rule, 0.75, 1.5, out, rows)
    return kernels.run(launches)


def shipped(forget, retain, rows):
    """The two launches of `sago`."""
    out = [torch.empty_like(r) for r in retain]
    batch = sago.kernels.Batch(retain[0].device, forget, retain, out, rows, max(rows) + 1)
    gram = sago.kernels.gram(batch, 3)
    sago.kernels.combine(batch, RULES["pcgrad"], 0.75, 1.5, 0.0, gram, 0)
    return out, gram


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", list(kernels.EXPERIMENTS))
def test_bits_of_two_launches(device, name, dtype):
    forget, retain = pairs(SMALL if name == "resident" else SIZES, dtype, device)
    rows = list(range(len(retain)))
    expected, gram = shipped(forget, retain, rows)
    out = fenced(retain)
    table = run(name, forget, retain, [o[: r.numel()] for o, r in zip(out, retain, strict=True)])
    properties.assert_equal_bits([table], [gram])
    properties.assert_equal_bits([o[:-16] for o in out], expected)
    assert all(o[-16:].isnan().all() for o in out)


@pytest.mark.parametrize("name", list(kernels.EXPERIMENTS))
def test_in_place_against_the_reference(device, name):
    forget, retain = pairs(SMALL[:5] if name == "resident" else SIZES[:4], FP32, device)
    expected, _ = sago.reference.synthesize(forget, retain, "pcgrad", 0.75, 1.5)
    run(name, forget, retain, retain)
    for found, u in zip(retain, expected, strict=True):
        torch.testing.assert_close(found, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reverse", "one launch", "one launch, two ahead"])
def test_rows_of_several_tensors(device, name):
    forget, retain = pairs(SIZES[:5], BF16, device)
    rows = [0, 1, 0, 2, 1]
    expected, gram = shipped(forget, retain, rows)
    out = [torch.empty_like(r) for r in retain]
    properties.assert_equal_bits([run(name, forget, retain, out, rows)], [gram])
    properties.assert_equal_bits(out, expected)


@pytest.mark.parametrize("name", [name for name, e in kernels.EXPERIMENTS.items() if "both" in e.phases])
def test_no_one_waits_for_work_behind_its_own(name):
    experiment = kernels.EXPERIMENTS[name]
    chunks = [[[0, 0, 0, 1, 0, row]] * n for row, n in enumerate((2, 1, 3, 1))]
    reduced = dict.fromkeys(range(4), 0)
    combined = dict.fromkeys(range(4), 0)
    for *_, row, combines, _ in kernels.lines(chunks, "both", experiment):
        if combines:
            assert reduced[row] == len(chunks[row])
            combined[row] += 1
        else:
            reduced[row] += 1
    assert reduced == combined == {0: 2, 1: 1, 2: 3, 3: 1}


def test_what_does_not_fit_is_refused(device):
    forget, retain = pairs((CHUNK + 1,), FP32, device)
    with pytest.raises(ValueError, match="of one chunk"):
        run("resident", forget, retain, retain)
    with pytest.raises(ValueError, match="multiples of 16"):
        run("reverse", [forget[0][1:]], [retain[0][1:]], [retain[0][1:]])
    with pytest.raises(ValueError, match="no gate"):
        run("reverse", forget, retain, retain, rule=RULES["sago"])
    with pytest.raises(ValueError, match="no gate"):
        run("reverse", forget, retain, retain, rule=Rule("torch", lambda *numbers: (1.0, 1.0), "tensor"))
