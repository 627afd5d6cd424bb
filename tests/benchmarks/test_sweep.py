"""Other configurations of the kernels are really launched, and have the updates of the reference."""

import importlib
from unittest import mock

import pytest

from tests.support.backends import INTERPRETED, import_with_triton

sweep = import_with_triton("benchmarks.sweep")
main = importlib.import_module("benchmarks.__main__").main

BOTH = ("sago.core.checks.choose_backend", lambda backend, device: "triton")
SMALL = ["sweep", "--workload", "rmu", "--elements=11000", "--repeats=1", "--chunk", "1024", "32768"]
SMALL += ["--block", "1024", "2048", "--threads", "128"]


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the GPU, not interpreted")
@pytest.mark.usefixtures("one_thread")
def test_every_configuration_has_a_checked_row(capsys):
    batch = importlib.import_module("sago.kernels.batch")
    combine = importlib.import_module("sago.kernels.combine")
    launched = set()
    kernel = combine._combine_kernel

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.add((grid[0], options["CHUNK"], options["BLOCK"], options["num_warps"]))
                return kernel[grid](*args, **options)

            return launch

    with mock.patch(*BOTH), mock.patch.object(combine, "_combine_kernel", Watched()):
        assert main([*SMALL, "--device=cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rmu")]
    assert len(lines) == 1 + 2 * 2 * 4  # the ceiling; rules, statistics, configurations
    assert {(chunk, block) for _, chunk, block, _ in launched} == {
        (chunk, block) for chunk in (1024, 32768) for block in (1024, 2048)
    }
    assert {warps for *_, warps in launched} == {4}
    grids = [{grid for grid, chunk, *_ in launched if chunk == c} for c in (1024, 32768)]
    assert grids == [{3 * 4}, {3}]  # three tensors of 3,584 elements
    assert (batch.CHUNK, combine.BLOCK, batch.THREADS) == sweep.SHIPPED == (32768, 1024, 128)


def test_configurations_with_few_elements_a_thread_are_left_out():
    configurations = [sweep.Configuration(32768, 1024, threads) for threads in (64, 128, 256)]
    (case,) = sweep.cases(["rmu"], ["sago"], ["bfloat16"], configurations)
    assert [c.name.split(", ")[-1] for c in case.contenders[1:]] == ["threads 64", "threads 128"] * 2
    assert {c.mode for c in case.contenders[1:]} == {"graph"}


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    assert main([*SMALL, "--elements=1000000", "--json", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-sweep.json")
