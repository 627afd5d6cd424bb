"""The ways to add up gradients have the errors that follow from their arithmetic."""

import json

import pytest
import torch

from benchmarks import accumulation
from benchmarks.accumulation import WAYS, unit
from benchmarks.measure import ROOT, table

SYNTHESIZER = ROOT / "sago/integrations/trainer/synthesizer.py"


@pytest.mark.parametrize(
    ("way", "units"), [("bfloat16", 128), ("bfloat16 + 8 bits", 1.5), ("float32", 2**-8)]
)
def test_each_addition_rounds_once(way, units):
    """By half of the last place in bf16 and fp32. In 8 bits, a rest of half a place is off by one unit, and
    the rounding of the rest and of the fp32 sum by half a unit at most."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-3, 1, (16, 1), generator=generator)
    grads = (torch.randn(16, 4096, generator=generator) * scales).bfloat16()
    partial = grads.double().cumsum(0)
    # Of the largest partial sum, which an earlier error has moved by one place at most.
    allowed = len(grads) * units * unit((1.01 * partial.abs().amax(0)).bfloat16()).double()
    errors = (WAYS[way][0](grads) - partial[-1]).abs()
    assert (errors <= allowed).all()
    assert errors.any()


def test_fp32_keeps_the_gates_and_bf16_does_not():
    rows = accumulation.run([3])["rows"]
    assert [row["bytes"] for row in rows] == [4, 6, 6, 6, 10]
    narrow, *_, wide = rows
    assert wide["error"] < narrow["error"] / 1000
    assert wide["flips"] < narrow["flips"]


def test_the_docs_show_the_record():
    record = json.loads((ROOT / "benchmarks/results/accumulation.json").read_text())
    text = (ROOT / "docs/gradients.md").read_text()
    assert table(record["rows"], accumulation.COLUMNS) in text
    assert f"{record['elements']:,} random weights" in text
    of = {(row["micro_batches"], row["forget"], row["retain"]): row for row in record["rows"]}
    narrow, wide, parts = "bfloat16", "float32", "bfloat16 + 8 bits"

    def fewer(*ways):
        return [of[n, narrow, narrow]["flips"] / of[(n, *way)]["flips"] for n in (4, 16) for way in ways]

    one, both = fewer((wide, narrow), (narrow, wide)), fewer((parts, parts))
    joined = " ".join(text.split())
    assert f"only {min(one):.1f} to {max(one):.1f} times fewer flips" in joined
    assert f"{min(both):.0f} to {max(both):.0f} times fewer flips with 6 bytes" in joined
    most = of[4, narrow, narrow]["largest"]
    assert f"up to {most:.2f} of its largest element (4 micro-batches" in SYNTHESIZER.read_text()
