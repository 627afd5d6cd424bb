"""Compiles every kernel configuration that the launchers can ask for, without a GPU, and inspects the code.

The launchers themselves say what to compile: they run on small CPU tensors with a recorder in the place
of the kernel. What the recorder is given goes through Triton's own specialisation for the target and
through its compiler.

Checked for each: every gradient is read and written 16 bytes at a time where the tensors are aligned,
nothing is spilled, and no product is fused into a sum.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from sago.kernels.batch import TRITON_DTYPES, Batch
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.measure import source_hash
from sago.rules import RULES, Rule

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = (
    "kernel", "rule", "sums", "dtypes", "alignment", "arch", "registers", "spill_bytes", "shared_bytes",
    "load_bytes", "store_bytes", "vector_loads", "vector_stores", "fma", "failures",
)  # fmt: skip

Pair = tuple[torch.dtype, torch.dtype]  # of forget and of retain, where the update goes

_bf16, _fp16, _fp32, _fp64 = TRITON_DTYPES
PAIRS: tuple[Pair, ...] = (
    (_bf16, _bf16),
    (_fp16, _fp16),
    (_fp32, _fp32),
    (_fp64, _fp64),
    (_bf16, _fp32),
    (_fp32, _bf16),
)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# A coefficient function that runs as torch code ahead of the kernel, which then reads a table.
_FROM_TABLE = Rule("(torch)", lambda *numbers: (0.0, 1.0, 1.0, 1.0), "element", gated=True)
# NaN and inf propagate in GradientBuckets. What that adds to a kernel is behind the rule: one without a gate,
# one with, and one that reads a table stand for all.
_PROPAGATING = (RULES["sum"], RULES["sago"], _FROM_TABLE)


class Launch(NamedTuple):
    """What a launcher asked of a kernel, and the labels of its row in the table."""

    labels: dict[str, Any]
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` is written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def record(arch: str, name: str, *arguments: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel behind the launcher `name`, and what the launcher calls it with on `arch`."""
    module = import_module(f"sago.kernels.{name}")
    kernel = getattr(module, f"_{name}_kernel")
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("Kernels are compiled only where the variable TRITON_INTERPRET is unset.")
    recorder, options = _Recorder(), import_module("sago.kernels.batch").options
    with (
        mock.patch.object(module, f"_{name}_kernel", recorder),
        # The compiler options are asked for as on the target.
        mock.patch.object(module, "options", lambda _, *a, **k: options(torch.device("cuda"), *a, **k)),
        mock.patch("sago.kernels.batch.lanes", return_value=target(arch).warp_size),
        mock.patch.object(torch.version, "hip", None if target(arch).backend == "cuda" else "6"),
    ):
        getattr(module, name)(*arguments)
    ((positional, keywords),) = recorder.calls
    return kernel, positional, keywords


@lru_cache
def launches(arch: str, quick: bool = False) -> list[Launch]:
    """Every launch of both kernels on `arch` that differs in its code; where NaN propagates, of three rules.

    Quick: the longest gram, `sago` without statistics and the longest combine for every pair of dtypes, and
    the other rules, without statistics, for the first pair. All tensors are aligned but those of the longest
    combine.
    """
    rules = [(rule, False) for rule in (*RULES.values(), _FROM_TABLE)]
    rules += [(rule, True) for rule in _PROPAGATING]
    found: dict[Any, Launch] = {}

    def add(kernel: str, rule: str | None, sums: int, pair: Pair, aligned: bool, *arguments: Any) -> None:
        labels = {
            "kernel": kernel,
            "rule": rule,
            "sums": sums,
            "dtypes": "/".join(str(TRITON_DTYPES[dtype]) for dtype in pair),
            "alignment": "aligned" if aligned else "mixed",
        }
        launch = Launch(labels, *record(arch, kernel, _batch(pair, aligned), *arguments))
        key = kernel, *((k, id(v) if k == "FORMULA" else v) for k, v in launch.kwargs.items())
        if key in found:  # rules that share a coefficient function share a kernel
            found[key].labels["rule"] += f", {labels['rule']}"
        else:
            found[key] = launch

    for pair, aligned in product(PAIRS, (True, False)):
        for sums in (3, 6, 9):
            if not quick or (sums == 9 and aligned):
                add("gram", None, sums, pair, aligned, sums)
        for rule, propagate in rules:
            name = f"{rule.name} (propagate)" if propagate else rule.name
            elementwise = rule.scope == "element"
            gram = None if elementwise else torch.zeros(1, 6, dtype=torch.float64)
            for sums in (0, 9 if rule.gated else 6) if elementwise else (0,):
                longest = name == "sago (propagate)" and sums > 0 and not aligned
                plain = sums == 0 and aligned and (name == "sago" or pair == PAIRS[0])
                if not quick or plain or longest:
                    arguments = rule, 1.0, 1.0, 0.0, gram, sums, None, propagate
                    add("combine", name, sums, pair, aligned, *arguments)
    return list(found.values())


def _batch(pair: Pair, aligned: bool) -> Batch:
    forget, retain = (torch.zeros(65, dtype=dtype)[0 if aligned else 1 :] for dtype in pair)
    return Batch(retain.device, [forget], [retain], [retain], [0], 1)


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, arch: str) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel, and the arguments by name."""
    kernel, backend = launch.kernel, make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    signature, constants, attributes = {}, {}, {}
    for i, (name, (kind, hint)) in enumerate(zip(bound, specialization, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[(i,)] = bound[name]
        elif isinstance(hint, str):
            attributes[(i,)] = backend.parse_attr(hint)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target(arch), options=options), {**bound, **options}


def inspect(launch: Launch, arch: str) -> dict[str, Any]:
    """One row of the table."""
    compiled, arguments = compile_launch(launch, arch)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    loads, stores = _accesses(assembly, "load"), _accesses(assembly, "store")
    cubin = compiled.asm.get("cubin")
    registers, spilled = _nvidia_usage(cubin) if cubin else _amd_usage(assembly)

    # What a thread holds of a block, in pieces of 16 bytes at most.
    held = arguments["BLOCK"] / (arguments["num_warps"] * target(arch).warp_size)
    pieces = {
        name: -int(-held * dtype.primitive_bitwidth // 128) if dtype else 0
        for name, dtype in ((n, arguments.get(n)) for n in ("FORGET", "RETAIN", "OUT"))
    }
    row = {
        **launch.labels,
        "arch": arch,
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "load_bytes": max(loads),
        "store_bytes": max(stores) if pieces["OUT"] else None,
        "vector_loads": sum(width >= 16 for width in loads),
        "vector_loads_expected": pieces["FORGET"] + pieces["RETAIN"],
        "vector_stores": sum(width >= 16 for width in stores),
        "vector_stores_expected": pieces["OUT"],
        "fma": _fused(assembly),
    }
    row["failures"] = failures(row)
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row as the table prints it."""
    vectors = {name: f"{row[name]}/{row[f'{name}_expected']}" for name in ("vector_loads", "vector_stores")}
    return {**row, **vectors, "failures": ", ".join(row["failures"])}


def failures(row: dict[str, Any]) -> list[str]:
    """Which expectations a row does not meet."""
    found = []
    if row["vector_loads"] < row["vector_loads_expected"]:
        found.append("narrow loads")
    if row["vector_stores"] < row["vector_stores_expected"]:
        found.append("narrow stores")
    if row["spill_bytes"]:
        found.append("spills")
    if row["fma"]:
        found.append("fused multiply-add")
    return found


def _accesses(assembly: str, kind: str) -> list[int]:
    """The bytes a thread moves with each "load" from, or "store" to, global memory."""
    short = {"load": "ld", "store": "st"}[kind]
    ptx = re.findall(rf"\b{short}\.[.\w]*?global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", assembly)
    amd = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(dword|[a-z]+)(?:x(\d))?", assembly)
    unit = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2}
    return [int(n or 1) * int(bits) // 8 for n, bits in ptx] + [unit.get(u, 1) * int(n or 1) for u, n in amd]


def _fused(assembly: str) -> int:
    """The fused multiply-adds, and in PTX what the assembler would still be free to fuse."""
    ptx = re.findall(r"\bfma\.|\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)", assembly)
    amd = re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)\w*_b?f(?:16|32|64)\w* .*", assembly)
    # Of fp16 operands, a product is written as one with the addend -0, a sum as one with the factor 1 and a
    # difference as one with the factor -1: each has a single rounding.
    single = ("neg(0)", ", 1.0,", ", -1.0,")
    fused = sum(not any(operand in line for operand in single) for line in amd)
    # The division of two fp64 scalars is spelled out: five of them and one v_div_fmas.
    return len(ptx) + fused - 5 * len(re.findall(r"\bv_div_fmas_f64", assembly))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory or of spilled registers, whichever is more."""
    usage = {
        key: int(value)
        for key, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly
        )
    }
    spilled = 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"])
    return usage["vgpr_count"], max(spilled, usage["private_segment_fixed_size"])


def _inspect(task: tuple[str, bool, int]) -> dict[str, Any]:
    arch, quick, index = task
    return inspect(launches(arch, quick)[index], arch)


def run(archs: Sequence[str] = ARCHS, quick: bool = False, jobs: int | None = None) -> dict[str, Any]:
    """Compiles and inspects `launches` of every target in `jobs` processes (one a CPU)."""
    tasks = [(arch, quick, i) for arch in archs for i in range(len(launches(arch, quick)))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        rows = list(tqdm(pool.map(_inspect, tasks), total=len(tasks), desc="compile"))
    return {
        "triton": triton.__version__,
        "source": source_hash("kernels", "sago/rules"),
        "archs": list(archs),
        "rows": rows,
    }
