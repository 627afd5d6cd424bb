"""Changes one place of the library at a time and runs the nearest tests: `python -m tests.mutation`.

The changes are drawn from all of `FOLDERS`. A change that no test notices is printed. The results are
appended to the record in the order of the changes. A later run leaves out the changes that a test has
noticed. It tests the others again, because a test may have been added for them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TypeVar

from tests.mutation.operators import Change, apply, changes

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("rules", "core", "capture", "ranks")
LIMIT = 900  # seconds: a change may make a loop endless
T = TypeVar("T")

# The tests of each folder, the quickest ones first.
NEAREST = {
    "rules": [
        *(f"sago/test_{name}.py" for name in ("rules", "gallery", "reads", "draws", "reference", "testing")),
        *(f"sago/test_{name}.py" for name in ("synthesis", "running_mean")),
        "kernels/test_formula.py",
    ],
    "core": [
        *(f"sago/test_{name}.py" for name in ("synthesis", "arguments", "plan", "report", "seen", "cache")),
        *(f"sago/test_{name}.py" for name in ("sizes", "retain_floor", "draws", "capture_cost", "buckets")),
    ],
    "capture": [
        *(f"sago/test_{name}.py" for name in ("window", "buckets", "stale_state", "arguments", "hooks")),
        *(f"sago/test_{name}.py" for name in ("in_backward", "running_mean", "surroundings")),
        *(f"sago/test_{name}.py" for name in ("grad_scaler", "extraction")),
    ],
    "ranks": [f"distributed/test_{name}.py" for name in ("reduce_gram", "failures", "ddp", "fsdp", "rules")],
}
# Files that the tests of other folders run, too.
ELSEWHERE = {
    "sago/capture/reduction.py": ("ranks",),
    "sago/core/pipeline.py": ("core", "ranks"),
    **{
        f"sago/capture/{name}.py": ("capture", "ranks")
        for name in ("buckets", "host", "mean", "opening", "pipelines", "steps")
    },
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="the number of changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="the number of copies that are tested at a time")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "mutation.jsonl")
    given = parser.parse_args(arguments)
    every = every_change()
    random.Random(given.seed).shuffle(every)
    chosen = every[: given.count]
    print(f"seed {given.seed}, {given.count} of {len(every)} changes, record {given.record}", flush=True)
    given.record.parent.mkdir(parents=True, exist_ok=True)
    given.record.touch()
    known = [json.loads(line) for line in given.record.read_text().splitlines()]
    noticed = {Change(*change): by for change, by in known if by}
    with tempfile.TemporaryDirectory() as folder, given.record.open("a") as record:
        copies: Queue[Path] = Queue()
        for k in range(given.jobs):
            copies.put(copy_of_project(Path(folder, str(k))))

        def run(check: Callable[[T, Path], str | None], subject: T) -> str | None:
            copy = copies.get()
            try:
                return check(subject, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(given.jobs) as pool:
            left = [change for change in chosen if change not in noticed]
            folders = sorted({name for change in left for name in nearest(change.path)})
            unchanged = pool.map(partial(run, first_failure), [(name,) for name in folders])
            for name, failed in zip(folders, unchanged, strict=True):
                if failed:
                    print(f"Without a change, a test of {name} fails: {failed}")
                    return 1
            for change, by in zip(left, pool.map(partial(run, test), left), strict=True):
                noticed[change] = by
                print(json.dumps([change, by]), file=record, flush=True)
                print("noticed:" if by else "NOT noticed:", *change, by or "", flush=True)
    for folder in FOLDERS:
        found = Counter(noticed[c] is None for c in chosen if c.path.split("/")[1] == folder)
        print(f"{folder}: {found.total()} changes, {found[False]} noticed, {found[True]} not noticed")
    return 0


def every_change() -> list[Change]:
    paths = (path for folder in FOLDERS for path in sorted((ROOT / "sago" / folder).rglob("*.py")))
    return [c for path in paths for c in changes(str(path.relative_to(ROOT)), path.read_text())]


def copy_of_project(to: Path) -> Path:
    """The files of the project, in which `sago.kernels` is imported from this copy."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    if not (to / "sago" / "kernels").exists():
        (to / "sago" / "kernels").symlink_to("../kernels/triton")
    return to


def test(change: Change, copy: Path) -> str | None:
    """The first test that fails with this change. None if all tests pass."""
    path = copy / change.path
    source = path.read_text()
    path.write_text(apply(change, source))
    try:
        return first_failure(nearest(change.path), copy)
    finally:
        path.write_text(source)


def nearest(path: str) -> tuple[str, ...]:
    """The keys of the tests in `NEAREST` that run the code of a file."""
    return ELSEWHERE.get(path, (path.split("/")[1],))


def first_failure(names: Sequence[str], copy: Path) -> str | None:
    """The first of the nearest tests that fails in a copy of the project. None if all pass."""
    nearest_tests = [file for name in names for file in NEAREST[name]]
    files = [str(copy / "tests" / file) for file in (*nearest_tests, "test_private.py")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    # A test failed, a test file or `conftest.py` cannot be imported, or the process crashed.
    if done.returncode not in (1, 2, 4) and (done.returncode > 0 or done.returncode == -signal.SIGKILL):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else done.stdout[-200:] + done.stderr[-200:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
