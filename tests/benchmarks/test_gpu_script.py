"""The order, the time limits and the summary of benchmarks/gpu.sh, with stubs for its programs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.sh"
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
echo "output of $*"
case "$*" in
    *"$HANGS"*) [[ -n $HANGS ]] && exec sleep 60 ;;&
    *"$FAILS"*) [[ -n $FAILS ]] && exit 3 ;;
esac
exit 0
"""
STEPS = [
    *("install", "nvidia-smi", "environment", "tests", "updates", "memcheck", "racecheck"),
    *("speed", "sweep", "training"),
]


@pytest.fixture
def run(tmp_path):
    """Runs the script, and returns its exit status, the summary by step and the calls of stubs."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()

    def run(*arguments, fails="", hangs="", programs=("python", "nvidia-smi", "compute-sanitizer")):
        for name in programs:
            (stubs / name).write_text(STUB)
            (stubs / name).chmod(0o755)
        calls = tmp_path / "calls"
        environment = {
            "PATH": f"{stubs}:{os.defpath}",
            "CALLS": str(calls),
            "FAILS": fails,
            "HANGS": hangs,
            "TMPDIR": str(tmp_path),
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        summary = (tmp_path / "out/summary.txt").read_text()
        assert done.stdout == summary
        assert done.stderr == ""
        lines = {line.split()[0]: line for line in summary.splitlines()}
        return done.returncode, lines, calls.read_text().splitlines()

    return run


def test_all_steps_in_order(run, tmp_path):
    status, lines, calls = run("out")
    assert status == 0
    assert list(lines) == [*STEPS, "in"]
    assert all(" exit   0 " in lines[step] and lines[step].endswith("ok") for step in STEPS)
    assert lines["in"].endswith("all well")
    out = tmp_path / "out"
    assert calls == [
        "python -m pip install -e . --no-deps --no-build-isolation",
        "nvidia-smi ",
        "python -m sago",
        "python -m pytest -m gpu -q -p no:cacheprovider --maxfail=20",
        "python -m benchmarks sanitize",
        *(
            f"compute-sanitizer --tool {tool} --error-exitcode 99 python -m benchmarks sanitize"
            for tool in ("memcheck", "racecheck")
        ),
        f"python -m benchmarks speed --device cuda --json {out}",
        f"python -m benchmarks sweep --json {out}",
        f"python -m benchmarks step --device cuda --repeats 5 --json {out}",
    ]
    assert (out / "tests.log").read_text() == f"output of {calls[3].removeprefix('python ')}\n"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"{step}.log" for step in STEPS), "summary.txt"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"stubs", "calls", "out"}, "left something behind"


def test_a_failure_does_not_stop_the_others(run):
    status, lines, calls = run("out", fails="-m gpu")
    assert status == 1
    assert len(calls) == len(STEPS)
    assert " exit   3 " in lines["tests"]
    assert lines["tests"].endswith("failed")
    assert lines["training"].endswith("ok")
    assert lines["in"].endswith("with failures")


def test_a_step_that_hangs_is_ended(run):
    status, lines, calls = run("out", "5", hangs="benchmarks step")
    assert status == 1
    assert len(calls) == len(STEPS)
    assert " exit 124 " in lines["training"]
    assert lines["training"].endswith("out of time after 0.400 s")
    assert lines["sweep"].endswith("ok")


def test_without_the_sanitizer(run):
    status, lines, calls = run("out", programs=("python", "nvidia-smi"))
    assert status == 0
    assert len(calls) == len(STEPS) - 2
    assert lines["memcheck"].endswith("not run: compute-sanitizer is not installed")


def test_without_a_gpu(run):
    status, lines, _ = run("out", programs=("python",))
    assert status == 1
    assert " exit 127 " in lines["nvidia-smi"]
    assert lines["speed"].endswith("ok")


def test_the_shares_add_up_to_at_most_100_percent():
    shares = re.findall(r"^(?:step|sanitizer) [\w-]+ (\d+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(shares) == len(STEPS)
    assert sum(map(int, shares)) <= 100


def test_arguments_are_required(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr
