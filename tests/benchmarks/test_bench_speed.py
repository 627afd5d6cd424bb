"""`pytest benchmarks` times the contenders under pytest-benchmark."""

import json

import pytest

from tests.support.processes import python

pytest.importorskip("pytest_benchmark")


def test_rows_of_a_list(tmp_path):
    file = tmp_path / "times.json"
    options = ["--benchmark-only", "-q", "-k", "rmu and bfloat16", f"--benchmark-json={file}"]
    python("-m", "pytest", "benchmarks", *options, "-p", "no:cacheprovider", OMP_NUM_THREADS="1")
    found = {b["name"]: b for b in json.loads(file.read_text())["benchmarks"]}
    sago = found["test_speed[rmu-bfloat16-sago.synthesize_ sago, statistics]"]["extra_info"]
    pcgrad = found["test_speed[rmu-bfloat16-sago.synthesize_ pcgrad, statistics]"]["extra_info"]
    assert sago["bytes"] == 3 * 2 * sago["elements"] > 0
    assert pcgrad["bytes"] == 5 * 2 * sago["elements"]
    assert all(b["group"] == "rmu bfloat16" and b["stats"]["median"] > 0 for b in found.values())
