"""Every kernel, every dtype and all four targets, compiled without a GPU.

The subset of `python -m benchmarks compile --quick`; the whole set takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import import_with_triton

import_with_triton("triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16/bf16", "fp16/fp16", "fp32/fp32", "fp64/fp64", "bf16/fp32", "fp32/bf16")


def python(*arguments: str | Path) -> subprocess.CompletedProcess:
    """In a process of its own: these tests run with Triton's interpreter, which compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The record of the command, and how it ended."""
    file = tmp_path_factory.mktemp("compile") / "record.json"
    done = python("-m", "benchmarks", "compile", "--quick", "--json", file)
    assert file.exists(), done.stderr
    return json.loads(file.read_text()), done


@pytest.fixture(scope="module")
def broken():
    found = {"sm_90": {}, "gfx942": {}}
    for mode in ("unhinted", "others"):
        done = python(ROOT / "tests/benchmarks/broken_launches.py", mode, *found)
        assert done.returncode == 0, done.stderr
        for arch, variants in json.loads(done.stdout).items():
            found[arch] |= variants
    return found


def rows(record: dict, **labels: object) -> list[dict]:
    return [row for row in record["rows"] if labels.items() <= row.items()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "dtypes", ["bf16/bf16", "fp16/fp16", "fp32/fp32", "fp64/fp64", "bf16/fp32", "fp32/bf16"]
)
def test_whole_vectors_without_spills_or_fusion(quick, arch, dtypes):
    found = rows(quick[0], arch=arch, dtypes=dtypes)
    assert found
    for row in found:
        assert row["failures"] == [], row
        assert row["load_bytes"] >= 16, row
        assert row["vector_loads"] >= row["vector_loads_expected"] >= 2, row
        assert row["vector_stores"] >= row["vector_stores_expected"] >= (row["kernel"] == "combine"), row
        assert row["spill_bytes"] == row["fma"] == 0, row
        assert 0 < row["registers"] <= (512 if arch == "gfx942" else 255), row


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_and_rule_is_there(quick, arch):
    found = rows(quick[0], arch=arch, dtypes="bf16/bf16")
    assert {(row["kernel"], row["rule"], row["sums"], row["alignment"]) for row in found} == {
        ("gram", None, 9, "aligned"),
        ("combine", "sum", 0, "aligned"),
        ("combine", "sago", 0, "aligned"),
        ("combine", "sago_prefer_retain", 0, "aligned"),
        ("combine", "pcgrad, pcgrad_global", 0, "aligned"),
        ("combine", "blur", 0, "aligned"),
        ("combine", "(torch)", 0, "aligned"),
        ("combine", "sum (propagate)", 0, "aligned"),
        ("combine", "sago (propagate)", 0, "aligned"),
        ("combine", "(torch) (propagate)", 0, "aligned"),
        ("combine", "sago (propagate)", 9, "mixed"),
    }


def test_the_command_says_how_it_went(quick):
    record, done = quick
    failed = sum(bool(row["failures"]) for row in record["rows"])
    assert done.returncode == (1 if failed else 0)
    assert record["triton"]
    assert f"{len(record['rows'])} configurations, {failed} with failures" in done.stdout
    header, *lines = done.stdout.splitlines()
    assert header.split()[:4] == ["kernel", "rule", "sums", "dtypes"]
    assert len(lines) == len(record["rows"]) + 2


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("variant", "failures"),
    [
        ("shipped", []),
        ("fused", ["fused multiply-add"]),
        ("narrow block", ["narrow loads", "narrow stores"]),
        ("hint ahead of the cast", ["narrow loads", "narrow stores"]),
        ("too many values a thread", ["spills"]),
    ],
)
def test_the_check_can_fail(broken, arch, variant, failures):
    assert broken[arch][variant]["failures"] == failures
