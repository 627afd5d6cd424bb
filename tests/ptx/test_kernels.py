"""The compiled kernels, executed: the checks of every backend, with every access watched."""

import sys
import zlib

import pytest
import torch

import sago
from tests.support import inputs, properties
from tests.support.backends import (
    DTYPES,
    ELEMENTWISE,
    INTERPRETED,
    RULES,
    Backend,
    import_with_triton,
    on_device,
)
from tests.support.checks import CHECKS, propagated, report, specials, sums_over_spans, tails, unaligned
from tests.support.processes import need_stub_driver
from tests.support.windows import bucketed, with_nan

if not INTERPRETED:
    pytest.skip("a GPU runs the kernels", allow_module_level=True)
import_with_triton("triton")
need_stub_driver()

RUN = Backend("triton", "cpu")
ARCHS = ("sm_80", "sm_90", "sm_100")
FEW = (specials, tails, unaligned, report, propagated, sums_over_spans)
BF16, FP16, FP32, FP64 = DTYPES
PAIRS = [(forget, retain) for forget in DTYPES for retain in DTYPES]
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}


@pytest.mark.parametrize(
    ("arch", "check"), [("sm_90", c) for c in CHECKS] + [(a, c) for a in ("sm_80", "sm_100") for c in FEW]
)
def test_the_checks_of_every_backend(emulated, arch, check):
    with emulated(arch):
        check(RUN)


def test_weights_in_memory_and_several_launches(emulated):
    """Rows over tensors of different dtypes, which are launches of their own, with tensors as weights."""
    forget, retain = zip(*(inputs.pair(n, seed=n) for n in (40000, 33, 70000, 7)), strict=True)
    forget = [f.to(d) for f, d in zip(forget, (FP32, BF16, BF16, FP32), strict=True)]
    retain = [r.to(d) for r, d in zip(retain, (FP32, BF16, FP32, FP32), strict=True)]
    weights = {name: torch.tensor(w, dtype=FP64) for name, w in WEIGHTS.items()}
    keys = ["a", "b", "a", "b"]
    for rule in ("sago", "pcgrad"):
        with emulated("sm_90") as counts:
            updates, report = RUN(forget, retain, rule, groups=keys, **weights)
        assert counts["launches"] == (3 if rule == "sago" else 6)
        properties.assert_updates(updates, forget, retain, rule, groups=keys, **WEIGHTS)
        properties.assert_report(report, forget, retain, rule, groups=keys, **WEIGHTS)


def test_no_chunks(emulated):
    with emulated("sm_90") as counts:
        RUN([torch.zeros(0)], [torch.zeros(0)], "sago")
    assert counts["launches"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_blocks_does_not_matter(emulated, seed):
    """The same bits, whichever block is the last of its row, and if stores become visible late."""
    forget, retain = ([t.float()] for t in inputs.pair(3 * inputs.CHUNK + 20))
    found = []
    for options in ({"seed": 0}, {"seed": seed}, {"seed": seed, "late": True}):
        with emulated("sm_90", options=options):
            updates, report = RUN(forget, retain, "pcgrad")
        found.append([*updates, report.ff, report.fr, report.rr])
    for other in found[1:]:
        properties.assert_equal_bits(other, found[0])


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_what_a_capture_records_can_be_replayed(emulated, monkeypatch, rule):
    """The tables of a first call in a capture serve every replay, beside eager calls on the same list."""
    forget, retain = ([t.float() for t in side] for side in zip(*map(inputs.pair, (40001, 13)), strict=True))
    out = [torch.full_like(t, torch.nan) for t in retain]
    with emulated("sm_90"):
        recorded = []
        with monkeypatch.context() as capturing:
            for module in ("sago.backends.streams", "sago.kernels.batch"):
                capturing.setattr(sys.modules[module], "is_capturing", lambda devices: True)
            for name in ("gram", "combine"):
                module = sys.modules[f"sago.kernels.{name}"]
                capturing.setattr(
                    module, f"_{name}_kernel", Recorded(module.__dict__[f"_{name}_kernel"], recorded)
                )
            captured = sago.synthesize_(forget, retain, rule, out=out, backend="triton")
        for seed in (1, 2):
            for i, t in enumerate(forget + retain):
                t.copy_(inputs.pair(t.numel(), seed=seed + i)[0])
            for replay in recorded:
                replay()
            properties.assert_updates(out, forget, retain, rule)
            updates, _ = RUN(forget, retain, rule)
            properties.assert_equal_bits(out, updates)
        properties.assert_report(captured, forget, retain, rule)  # its first read


class Recorded:
    """Keeps the launches of a kernel, as the capture of a CUDA graph does."""

    def __init__(self, kernel, recorded):
        self._kernel, self._recorded = kernel, recorded

    def __getitem__(self, grid):
        def record(*arguments, **constants):
            self._recorded.append(lambda: self._kernel[grid](*arguments, **constants))

        return record


@pytest.mark.grid
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("check", CHECKS)
def test_grid_of_checks(emulated, arch, check, late):
    with emulated(arch, options={"seed": CHECKS.index(check), "races": not late, "late": late}):
        check(RUN)


@pytest.mark.grid
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}/{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", inputs.FAMILIES)
def test_grid(emulated, arch, pair, rule, family):
    """Updates against the reference bit for bit, or against the oracle. Reports against the oracle."""
    forget, retain = inputs.FAMILIES[family](*pair)
    in_range = family not in inputs.OUT_OF_RANGE and all(
        t is None or t.isfinite().all() for t in (*forget, *retain)
    )
    seed = zlib.crc32(f"{pair} {rule} {family}".encode())
    for stats in (False, True):
        with emulated(arch, options={"seed": seed}):
            if rule in ELEMENTWISE:
                properties.assert_as_reference(RUN, forget, retain, rule, stats=stats, **WEIGHTS)
            elif in_range:
                properties.assert_as_oracle(RUN, forget, retain, rule, stats=stats, **WEIGHTS)
            else:
                RUN(forget, retain, rule, stats=stats, **WEIGHTS)
    if in_range:
        with emulated(arch):
            _, found = RUN(forget, retain, rule, **WEIGHTS)
        properties.assert_report(found, forget, retain, rule, **WEIGHTS)


@pytest.mark.grid
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, FP32), (FP32, FP16), (FP64, BF16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["tails", "unaligned", "missing", "mixed_strides"])
def test_grid_of_outputs(emulated, arch, pair, dtype, family):
    """Outputs of a third dtype, aligned or not, and `out="forget"`."""
    forget, retain = inputs.FAMILIES[family](*pair)
    dtypes = [dtype] * len(forget)
    with emulated(arch):
        for run in (RUN, RUN._replace(offset=1)):
            properties.assert_as_reference(run, forget, retain, "sago", dtypes=dtypes, **WEIGHTS)
            properties.assert_as_oracle(run, forget, retain, "pcgrad", dtypes=dtypes, **WEIGHTS)
        if family in ("tails", "unaligned"):
            over, expected = ([on_device(f, "cpu").to(dtype) for f in forget] for _ in range(2))
            sago.reference.synthesize_(expected, retain, out="forget", **WEIGHTS)
            sago.synthesize_(over, retain, out="forget", backend="triton", **WEIGHTS)
            properties.assert_equal_bits(over, expected)


@pytest.mark.grid
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pair", PAIRS[:: len(DTYPES) + 1], ids=str)
@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_grid_of_buckets(emulated, arch, pair, rule):
    """NaN and inf propagate, and the update is written over retain."""
    forget, retain = inputs.specials(*pair)
    expected, _ = sago.reference.synthesize(forget, retain, rule, **WEIGHTS)
    for stats in (False, True):
        with emulated(arch):
            found, _ = bucketed(RUN, forget, retain, rule, stats=stats, **WEIGHTS)
        properties.assert_equal_bits(found, with_nan(expected, forget, retain))
