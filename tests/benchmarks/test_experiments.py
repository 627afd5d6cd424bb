"""Other orders of work give the bits of the two launches that ship."""

import importlib
from unittest import mock

import pytest
import torch

import sago.reference
from sago.rules import RULES, Rule
from tests import inputs, properties
from tests.backends import DTYPES, import_with_triton, on_device

kernels = import_with_triton("benchmarks.experiments.kernels")
timing = pytest.importorskip("benchmarks.experiments.timing", reason="needs Triton")
main = importlib.import_module("benchmarks.experiments.__main__").main

BF16, _, FP32, _ = DTYPES
CHUNK = inputs.CHUNK
SIZES = (17, CHUNK + 5, 1, 2049)
ONE_CHUNK = (1, 17, 2049, CHUNK)
NAMES = list(kernels.EXPERIMENTS)


def pairs(sizes, dtype, device):
    both = [inputs.pair(n, seed) for seed, n in enumerate(sizes)]
    return [[on_device(t.float().to(dtype), device) for t in side] for side in zip(*both, strict=True)]


def run(experiment, forget, retain, out, rows=None, rule=RULES["pcgrad"]):
    if isinstance(experiment, str):
        experiment = kernels.EXPERIMENTS[experiment]
    launches = kernels.prepare(experiment, forget, retain, rule, 0.75, 1.5, out, rows)
    return kernels.run(launches)


def shipped(forget, retain, rows):
    """The two launches of `sago`."""
    out = [torch.empty_like(r) for r in retain]
    batch = sago.kernels.Batch(retain[0].device, forget, retain, out, rows, max(rows) + 1)
    gram = sago.kernels.gram(batch, 3)
    sago.kernels.combine(batch, RULES["pcgrad"], 0.75, 1.5, 0.0, gram, 0)
    return out, gram


@pytest.mark.parametrize("name", NAMES)
def test_bits_of_two_launches(device, name):
    dtype = FP32 if NAMES.index(name) % 2 else BF16
    forget, retain = pairs(ONE_CHUNK if name == "resident" else SIZES, dtype, device)
    expected, gram = shipped(forget, retain, list(range(len(retain))))
    out = [torch.full((r.numel() + 16,), torch.nan, dtype=dtype, device=device) for r in retain]
    table = run(name, forget, retain, [o[: r.numel()] for o, r in zip(out, retain, strict=True)])
    properties.assert_equal_bits([table], [gram])
    properties.assert_equal_bits([o[:-16] for o in out], expected)
    assert all(o[-16:].isnan().all() for o in out)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_place_against_the_reference(device, name, dtype):
    forget, retain = pairs((1, 15, 16, 17, 2047, 5000), dtype, device)
    before = [r.clone() for r in retain]
    run(name, forget, retain, retain)
    properties.assert_updates(retain, forget, before, "pcgrad", gamma=0.75, alpha=1.5)


@pytest.mark.parametrize(
    "experiment",
    [
        kernels.EXPERIMENTS["reverse"],
        kernels.EXPERIMENTS["one launch"],
        kernels.EXPERIMENTS["one launch, lag"]._replace(lag=2),
    ],
)
def test_rows_of_several_tensors(device, experiment):
    forget, retain = pairs((33, CHUNK + 1, 2048, 7, 4097), BF16, device)
    rows = [0, 1, 0, 2, 1]
    expected, gram = shipped(forget, retain, rows)
    out = [torch.empty_like(r) for r in retain]
    properties.assert_equal_bits([run(experiment, forget, retain, out, rows)], [gram])
    properties.assert_equal_bits(out, expected)


@pytest.mark.parametrize("lag", [0, 1, 3, 512])
def test_no_one_waits_for_work_behind_its_own(lag):
    sizes = {0: 2, 1: 1, 2: 3, 3: 1}
    chunks = [[[0, 0, 0, 0, 1, 0, row]] * n for row, n in sizes.items()]
    reduced, combined = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for *_, row, combines in kernels.lines(chunks, "both", kernels.Experiment(("both",), lag=lag)):
        if combines:
            assert reduced[row] == sizes[row]
            assert sum(reduced.values()) >= min(7, lag + sum(sizes[r] for r in range(row + 1)))
            combined[row] += 1
        else:
            reduced[row] += 1
    assert reduced == combined == sizes


def test_reverse_is_the_last_chunk_first():
    chunks = [[[0, 0, 0, start, 1, 0, row] for start in (0, CHUNK)] for row in range(2)]
    found = kernels.lines(chunks, "combine", kernels.EXPERIMENTS["reverse"])
    assert [(line[6], line[3]) for line in found] == [(1, CHUNK), (1, 0), (0, CHUNK), (0, 0)]


def test_what_does_not_fit_is_refused(device):
    forget, retain = pairs((CHUNK + 1,), FP32, device)
    with pytest.raises(ValueError, match="of one chunk"):
        run("resident", forget, retain, retain)
    with pytest.raises(ValueError, match="multiples of 16"):
        run("reverse", [forget[0][1:]], [retain[0][1:]], [retain[0][1:]])
    for rule in (RULES["sago"], Rule("torch", lambda *numbers: (1.0, 1.0), "tensor")):
        with pytest.raises(ValueError, match="no gate"):
            run("reverse", forget, retain, retain, rule=rule)


def test_another_configuration_is_launched_and_not_remembered():
    forget, retain = pairs((5000,), BF16, "cpu")
    out = [torch.empty_like(r) for r in retain]
    batch = sago.kernels.Batch(out[0].device, forget, retain, out, [0], 1)
    gram = torch.tensor([[1.0, -0.3, 1.0]], dtype=torch.float64)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((grid, kwargs["BLOCK"], kwargs["num_warps"]))

    def call():
        sago.kernels.combine(batch, RULES["pcgrad"], 0.75, 1.5, 0.0, gram, 0)

    module = importlib.import_module("sago.kernels.combine")
    with mock.patch.object(module, "_combine_kernel", Kernel()):
        for block, threads in ((1024, 128), (8192, 512)):
            timing._configured(batch, call, block, threads)
        assert isinstance(module._combine_kernel, Kernel)
    assert launched == [((1,), 1024, 4), ((1,), 8192, 16)]


def test_nothing_is_timed_that_has_other_bits():
    retain = [torch.ones(5), torch.ones(3)]
    work = [r.clone() for r in retain]
    calls = {"ships": lambda: work[0].add_(1), "right": lambda: work[0].mul_(2)}
    timing.check(calls, work, retain)
    with pytest.raises(timing.WrongResult, match="wrong has not the bits of ships"):
        timing.check(calls | {"wrong": lambda: work[1].mul_(2)}, work, retain)


def test_the_command(capsys):
    assert main(["model", "--workload", "tiny"]) == 0
    assert "one launch" in capsys.readouterr().out
