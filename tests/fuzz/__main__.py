"""Runs random programs in chunks: `python -m tests.fuzz --cases 100000 --seed 0 --jobs 2 --record FILE`.

Each chunk is appended to the record when it ends. A run that was interrupted leaves out the chunks that the
record has for the same sources. A program that fails is reduced to the smallest one and printed, and the run
ends with exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from tests.fuzz.programs import Result, run_chunk

ROOT = Path(__file__).resolve().parents[2]
SIZE = 250  # programs of a chunk
# The targets of 100 chunks in turn. Interpreted programs take ten to fifty times as long as compiled ones.
_MOST = ("compiled", "reference", "compiled", "large", "compiled", "compiled", "reference", "compiled") * 3
TURNS = (*_MOST, "triton", *_MOST, "compiled code", *_MOST, "triton", *_MOST, "triton windows")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="the number of programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="the number of processes")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "fuzz.jsonl")
    parser.add_argument("--chunk", type=int, help="run only this chunk")
    given = parser.parse_args(arguments)
    if given.chunk is not None:
        return _print(run_chunk(given.seed, given.chunk, TURNS[given.chunk % len(TURNS)], SIZE))
    start, sources = time.perf_counter(), hash_of_sources()
    print(f"seed {given.seed}, sources {sources}, record {given.record}", flush=True)
    found = {r.chunk: r for r in read(given.record, given.seed, sources)}
    chunks = [k for k in range(-(-given.cases // SIZE)) if k not in found]
    given.record.parent.mkdir(parents=True, exist_ok=True)
    with given.record.open("a") as record:
        for result in run_all(given.seed, chunks, given.jobs):
            if result.failure:
                return _print(result)
            found[result.chunk] = result
            print(json.dumps({**result._asdict(), "sources": sources}), file=record, flush=True)
            print(_line(found.values()), flush=True)
    print(f"{_line(found.values())} {time.perf_counter() - start:.0f} s in this run. {versions()}")
    return 0


def run_all(seed: int, chunks: Sequence[int], jobs: int) -> Iterator[Result]:
    """The results of the chunks in the order in which they end."""
    if jobs == 1:
        for k in chunks:
            yield run_chunk(seed, k, TURNS[k % len(TURNS)], SIZE)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            futures = [pool.submit(run_chunk, seed, k, TURNS[k % len(TURNS)], SIZE) for k in chunks]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read(record: Path, seed: int, sources: str) -> Iterator[Result]:
    """The chunks of this seed that the record has for these sources."""
    for line in record.read_text().splitlines() if record.exists() else ():
        fields: dict[str, Any] = json.loads(line)
        if fields.pop("sources") == sources and fields["seed"] == seed:
            yield Result(**fields)


def hash_of_sources() -> str:
    """A hash of the library and of the files that draw and check programs."""
    folders = ("sago", "kernels", "tests/fuzz", "tests/support")
    found = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if not path.name.startswith("test_"):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _line(results: Any) -> str:
    results = list(results)
    cases, steps, seconds = (
        sum(x) for x in zip(*((r.cases, r.steps, r.seconds) for r in results), strict=True)
    )
    counted = f"{cases} programs with {steps} steps in {len(results)} chunks"
    return f"{counted}, no mismatch: {seconds:.0f} s of one process."


def _print(result: Result) -> int:
    if result.failure:
        print(result.failure)
        print(f"Repeat it with: python -m tests.fuzz --seed {result.seed} --chunk {result.chunk}")
        return 1
    print(_line([result]))
    return 0


def versions() -> str:
    from sago.backends.choose import triton_version

    vectors = torch.backends.cpu.get_cpu_capability()
    found = torch.__version__, triton_version(), platform.python_version(), vectors
    return "torch {}, Triton {}, Python {}, {}.".format(*found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
