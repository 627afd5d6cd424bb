"""What a call costs the host, in calls of functions: without a GPU, on a stub of its driver."""

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
LIMITS = {"plan": 100, "list": 150, "buckets": 150}  # calls for an elementwise rule
GRAM = 40  # more for the second launch


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    record = tmp_path_factory.mktemp("host") / "record.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "host", "--pairs", "3", "291", "--repeats", "2"]
    command += ["--json", str(record)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(record.read_text())["rows"]


def test_the_number_of_calls_does_not_depend_on_the_number_of_tensors(rows):
    few, many = ([r for r in rows if r["pairs"] == n] for n in (3, 291))
    assert len(few) == len(many) == 12
    for a, b in zip(few, many, strict=True):
        assert a["calls"] == b["calls"], a


def test_calls_are_few(rows):
    for row in rows:
        assert 30 < row["calls"] <= LIMITS[row["entry"]] + GRAM * (row["rule"] == "pcgrad"), row


def test_launches(rows):
    for row in rows:
        assert row["launches"] == (2 if row["rule"] == "pcgrad" else 1), row
