"""Configurations: what the compiler makes of a kernel for each BLOCK and number of threads, and its time.

Without a GPU, for each: registers, spills, the blocks of threads that an SM holds, and from the machine code
of the loop over a chunk

- the bytes that its loads have in flight on an SM, which latency times bandwidth asks `NEEDED` of, and
- the time to issue its instructions as a share of the time that its bytes take at full bandwidth. Near 1 and
  above, the kernel is bound by instructions and not by memory.

Only combine without sums is free to change: BLOCK and threads of the sums decide on their last bits.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import triton
from tqdm import tqdm

from benchmarks import compile
from benchmarks.measure import source_hash


class Device(NamedTuple):
    """A data sheet: streaming multiprocessors, boost clock in GHz, TB/s; and an estimate of others.

    `needed` is in KiB of loads in flight an SM that fill the memory's latency.
    """

    name: str
    sms: int
    ghz: float
    tbps: float
    needed: int


DEVICES = {
    "sm_80": Device("A100", 108, 1.41, 2.04, 16),
    "sm_90": Device("H100", 132, 1.755, 3.35, 48),
    "sm_100": Device("B200", 148, 1.85, 8.0, 64),
}
BLOCKS = (1024, 2048, 4096, 8192)
THREADS = (128, 256, 512)
RULES = ("sum", "sago", "pcgrad")
DTYPES = ("bf16/bf16", "fp32/fp32")
COLUMNS = (
    "arch", "kernel", "rule", "sums", "dtypes", "block", "threads", "registers", "spill_bytes",
    "blocks_per_sm", "threads_per_sm", "kib_in_flight", "kib_needed", "instructions", "issue_share",
    "failures",
)  # fmt: skip

_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # of an SM; the same on all three
_ISSUED = 128  # instructions of a thread that an SM issues a cycle


def resident(registers: int, threads: int) -> int:
    """Blocks of `threads` threads that an SM holds at once, by registers, warps and blocks."""
    # A warp gets its registers in units of 256, from one of the four quarters of the SM.
    a_warp = -(-registers * 32 // 256) * 256
    warps = min(_REGISTERS // 4 // a_warp * 4, _WARPS)
    return min(warps // (threads // 32), _BLOCKS)


def loop(sass: str) -> tuple[int, int, int]:
    """Of the loop that loads most: its instructions, and the bytes a thread loads, in all and at once."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", sass)]
    found = [(0, 0, 0)]
    for end, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < end:
            body = [t for at, t in code if int(branch[1], 16) <= at <= end]
            found.append((len(body), *_loaded(body)))
    return max(found, key=lambda row: (row[1], -row[0]))


def _loaded(body: Sequence[str]) -> tuple[int, int]:
    """The bytes that these instructions load, and the most that are under way at once."""
    total = most = 0
    waiting: dict[int, int] = {}  # the load that a register waits for
    under_way: dict[int, int] = {}  # the bytes of a load
    for i, text in enumerate(body):
        registers = [int(n) for n in re.findall(r"\bR(\d+)", text)]
        for load in {waiting[n] for n in registers if n in waiting}:
            del under_way[load]
            waiting = {n: other for n, other in waiting.items() if other != load}
        if "LDG" in text and "STRONG" not in text:  # those read partial sums
            width = re.search(r"\bLDG\S*?\.(U8|U16|64|128)\b", text)
            size = {"U8": 1, "U16": 2, "64": 8, "128": 16}[width[1]] if width else 4
            under_way[i] = size
            waiting |= {registers[0] + k: i for k in range(-(-size // 4))}
            total += size
            most = max(most, sum(under_way.values()))
    return total, most


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [compile._CUOBJDUMP, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def chosen(arch: str, kernels: Sequence[str]) -> list[compile.Launch]:
    """Launches on aligned tensors of one dtype: combine without sums and with all, for three rules; gram."""
    found = []
    for launch in compile.launches(arch):
        labels = launch.labels
        if labels["kernel"] in kernels and labels["alignment"] == "aligned" and labels["dtypes"] in DTYPES:
            rule = labels["rule"] and labels["rule"].split(", ")[0]
            if rule is None or rule in RULES:
                found.append(launch._replace(labels={**labels, "rule": rule}))
    return found


def inspect(launch: compile.Launch, arch: str, block: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    launch = launch._replace(kwargs=launch.kwargs | {"BLOCK": block, "num_warps": threads // 32})
    row, device = compile.inspect(launch, arch), DEVICES[arch]
    compiled, arguments = compile.compile_launch(launch, arch)
    instructions, loaded, in_flight = loop(disassembled(compiled.asm["cubin"]))
    blocks = resident(row["registers"], threads)
    read, written = (
        sum(dtype.primitive_bitwidth // 8 for name in names if (dtype := arguments.get(name)))
        for names in (("FORGET", "RETAIN"), ("OUT",))
    )
    an_element = instructions * read / loaded
    issue = an_element / (_ISSUED * device.sms * device.ghz * 1e9)
    return {
        **row,
        "block": block,
        "threads": threads,
        "blocks_per_sm": blocks,
        "threads_per_sm": blocks * threads,
        "kib_in_flight": blocks * threads * in_flight / 1024,
        "kib_needed": device.needed,
        "instructions": an_element,
        "issue_share": issue / ((read + written) / (device.tbps * 1e12)),
    }


def _inspect(task: tuple[str, tuple[str, ...], int, int, int]) -> dict[str, Any]:
    arch, kernels, index, block, threads = task
    return inspect(chosen(arch, kernels)[index], arch, block, threads)


def run(
    archs: Sequence[str] = tuple(DEVICES),
    kernels: Sequence[str] = ("combine", "gram"),
    blocks: Sequence[int] = BLOCKS,
    threads: Sequence[int] = THREADS,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Compiles and inspects every configuration in `jobs` processes (one a CPU)."""
    tasks = [
        (arch, tuple(kernels), i, block, n)
        for arch in archs
        for i in range(len(chosen(arch, kernels)))
        for block in blocks
        for n in threads
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        rows = list(tqdm(pool.map(_inspect, tasks), total=len(tasks), desc="sweep"))
    return {
        "triton": triton.__version__,
        "source": source_hash("kernels", "sago/rules"),
        "rows": rows,
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "failures": ", ".join(row["failures"])}
