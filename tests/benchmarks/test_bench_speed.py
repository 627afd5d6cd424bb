"""`pytest benchmarks` times the contenders under pytest-benchmark."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.measure import ROOT

pytest.importorskip("pytest_benchmark")


def test_rows_of_a_list(tmp_path):
    file = tmp_path / "times.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        "-k",
        "rmu and bfloat16",
    ]
    environment = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
    }
    environment["OMP_NUM_THREADS"] = "1"  # a second one is only waited for
    done = subprocess.run(
        [*command, f"--benchmark-json={file}", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {b["name"]: b for b in json.loads(file.read_text())["benchmarks"]}
    sago = found["test_speed[rmu-bfloat16-sago.synthesize_ sago, statistics]"]
    pcgrad = found["test_speed[rmu-bfloat16-sago.synthesize_ pcgrad, statistics]"]
    numel = sago["extra_info"]["elements"]
    assert numel > 0
    assert sago["extra_info"]["bytes"] == 3 * 2 * numel
    assert pcgrad["extra_info"]["bytes"] == 5 * 2 * numel
    assert all(b["group"] == "rmu bfloat16" and b["stats"]["median"] > 0 for b in found.values())
