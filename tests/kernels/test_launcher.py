"""What reaches the driver: the first launch of a kind and the ones after it, without a GPU.

`tests.kernels.launched` says what is launched, and runs in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.backends import import_with_triton

import_with_triton("triton")
if find_spec("triton.backends.nvidia") is None:
    pytest.skip("needs Triton's CUDA backend", allow_module_level=True)
if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
    pytest.skip("needs gcc and Python's headers", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the driver of the GPU is loaded", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The launches of every case, each a `benchmarks.driver.Launch`, cold and warm."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("driver")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.launched", folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parameters(launch):
    return launch[5]


def program(launch):
    return [*launch[:5], *launch[6:]]


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_the_second_launch_is_the_first(launched, state):
    for name, case in launched[state].items():
        assert case["second"] == case["first"], name


def test_what_is_launched_does_not_depend_on_what_was_launched_before(launched):
    for name, case in launched["warm"].items():
        alone = launched["cold"][name]
        assert [program(x) for x in case["first"]] == [program(x) for x in alone["first"]], name


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_weights_and_tables_arrive_whole(launched, state):
    for name, case in launched[state].items():
        for attempt in ("first", "second"):
            assert set(case["expected"]) <= set(parameters(case[attempt][-1])), (name, attempt)


def test_a_rule_is_one_launch_for_each_dtype_and_one_program_for_each_chunk(launched):
    for name, case in launched["warm"].items():
        kernels = ["_combine_kernel"]
        if name in ("pcgrad", "pcgrad_global", "blur", "6 sums ahead", "bf16, sums ahead"):
            kernels = ["_gram_kernel", *kernels]
        grids = [[4, 1, 1]] * len(kernels)
        if name == "two dtypes":
            kernels, grids = kernels * 2, [[2, 1, 1]] * 2
        assert [(x[0], x[2]) for x in case["second"]] == list(zip(kernels, grids, strict=True)), name
