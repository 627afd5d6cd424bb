"""Compiles every kernel variant that the launchers can ask for, without a GPU, and inspects the code.

The launchers run on small CPU tensors, with a recorder instead of the kernel. The recorded arguments
pass through Triton's specialisation for the target and through its compiler.

A variant fails if aligned gradients are not read or written 16 bytes at a time, if registers are spilled, or
if a product is fused into a sum. `instructions` are those of the main loop for one pair of elements (NVIDIA).
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

from benchmarks import released
from benchmarks.measure import source_hash
from benchmarks.sweep import SHIPPED, Configuration, configured
from sago.rules import RULES, Rule

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = (
    "kernel", "rule", "sums", "dtypes", "alignment", "arch", "registers", "spill_bytes", "shared_bytes",
    "load_bytes", "store_bytes", "vector_loads", "vector_stores", "instructions", "fma", "failures",
)  # fmt: skip

Pair = tuple[torch.dtype, torch.dtype]  # the dtype of forget, and the dtype of retain and of the update

_bf16, _, _fp32, _ = TRITON_DTYPES
PAIRS: tuple[Pair, ...] = (*((dtype, dtype) for dtype in TRITON_DTYPES), (_bf16, _fp32), (_fp32, _bf16))
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# torch evaluates this coefficient function before the launch, and the kernel reads a table.
_FROM_TABLE = Rule("(torch)", lambda *numbers: (0.0, 1.0, 1.0, 1.0), "element", gated=True)
_GATE = RULES["ties"]  # three classes
_GATE_FROM_TABLE = Rule(
    "(torch, three classes)", lambda *numbers: (0.0, 1.0, 1.0, 1.0, 1.0, 1.0), "element", gate=_GATE.gate
)
# NaN and inf propagate in GradientBuckets. The added code does not depend on the formula of the rule: a rule
# without a gate, a rule with a gate and a rule that reads a table stand for all.
_PROPAGATING = (RULES["sum"], RULES["sago"], _FROM_TABLE)
_FLOORED = (RULES["sago"], _GATE)  # a rule with two classes and a rule with three


class Launch(NamedTuple):
    """The arguments that a launcher gives a kernel, and the labels of the row in the table."""

    labels: dict[str, Any]
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder:
    """Takes the place of a kernel, and records the calls of `recorder[grid](*args, **kwargs)`."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def record(
    arch: str, configuration: Configuration, name: str, *arguments: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns the kernel of the launcher `name`, and the arguments that the launcher gives it on `arch`."""
    module = import_module(f"sago.kernels.{name}")
    kernel = getattr(module, f"_{name}_kernel")
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("Kernels are compiled only where the variable TRITON_INTERPRET is unset.")
    recorder, options = _Recorder(), import_module("sago.kernels.batch").options
    with (
        configured(configuration),
        mock.patch.object(module, f"_{name}_kernel", recorder),
        # The compiler options are those of the target.
        mock.patch.object(module, "options", lambda _, *a, **k: options(torch.device("cuda"), *a, **k)),
        mock.patch("sago.kernels.batch.lanes", return_value=target(arch).warp_size),
        mock.patch.object(torch.version, "hip", None if target(arch).backend == "cuda" else "6"),
    ):
        getattr(module, name)(*arguments)
    ((positional, keywords),) = recorder.calls
    return kernel, positional, keywords


@lru_cache
def launches(arch: str, quick: bool = False, configuration: Configuration = SHIPPED) -> list[Launch]:
    """Returns every launch of both kernels on `arch` that differs in its code.

    For every pair of dtypes the quick set has the longest gram and the longest combine. For the first pair it
    also has `sago` without statistics, and on sm_90 all other rules of up to two classes. All tensors are
    aligned, except those of the longest combine.
    """
    published = (RULES[name] for name in released.RULES)
    rules = [(rule, rule.name, False, None) for rule in (*published, _FROM_TABLE, _GATE, _GATE_FROM_TABLE)]
    rules += [(rule, f"{rule.name} (propagate)", True, None) for rule in _PROPAGATING]
    floors = torch.zeros(1, dtype=torch.float64)
    rules += [(rule, f"{rule.name} (floor)", False, floors) for rule in _FLOORED]
    found: dict[Any, Launch] = {}

    def add(kernel: str, rule: str | None, sums: int, pair: Pair, aligned: bool, *arguments: Any) -> None:
        labels = {
            "kernel": kernel,
            "rule": rule,
            "sums": sums,
            "dtypes": "/".join(str(TRITON_DTYPES[dtype]) for dtype in pair),
            "alignment": "aligned" if aligned else "mixed",
        }
        forget, retain = (torch.zeros(65, dtype=dtype)[0 if aligned else 1 :] for dtype in pair)
        batch = Batch(retain.device, [forget], [retain], [retain], [0], 1)
        launch = Launch(labels, *record(arch, configuration, kernel, batch, *arguments))
        options = ((k, id(v) if k in ("FORMULA", "GATE") else v) for k, v in launch.kwargs.items())
        key = kernel, arguments[-1] is None, *options
        if key in found:  # rules that share a coefficient function share a kernel
            found[key].labels["rule"] += f", {labels['rule']}"
        else:
            found[key] = launch

    for pair, aligned in product(PAIRS, (True, False)):
        for sums in (3, 6, 9):
            if not quick or (sums == 9 and aligned):
                add("gram", None, sums, pair, aligned, sums, None, None, None)
        if not quick:
            add("gram", "(three classes)", 15, pair, aligned, 15, _GATE.gate, None, None)
            add("gram", "(floor)", 9, pair, aligned, 9, None, None, floors)
            add("gram", "(three classes, floor)", 15, pair, aligned, 15, _GATE.gate, None, floors)
        for rule, name, propagate, floor in rules:
            elementwise = rule.scope == "element"
            gram = None if elementwise else torch.zeros(1, 6, dtype=torch.float64)
            statistics = 15 if rule.gate else 9 if rule.gated else 6
            for sums in (0, statistics) if elementwise else (0,):
                longest = name == "sago (propagate)" and sums > 0 and not aligned
                every = arch == "sm_90" and not rule.gate
                plain = sums == 0 and aligned and pair == PAIRS[0] and (every or name == "sago")
                if not quick or plain or longest:
                    arguments = rule, 1.0, 1.0, 0.0, gram, sums, None, propagate, None, floor
                    add("combine", name, sums, pair, aligned, *arguments)
    return list(found.values())


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, arch: str) -> tuple[Any, dict[str, Any]]:
    """Returns the compiled kernel, and the arguments by name."""
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
    """Compiles a launch, and returns its row of the table."""
    compiled, arguments = compile_launch(launch, arch)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    loads, stores = _accesses(assembly, "load"), _accesses(assembly, "store")
    cubin = compiled.asm.get("cubin")
    registers, spilled = _nvidia_usage(cubin) if cubin else _amd_usage(assembly)
    bits = {n: x.primitive_bitwidth for n in ("FORGET", "RETAIN", "OUT") if (x := arguments.get(n))}
    # The elements of a block that a thread holds, in pieces of at most 16 bytes.
    held = arguments["BLOCK"] / (arguments["num_warps"] * target(arch).warp_size)
    pieces = {name: -int(-held * bits.get(name, 0) // 128) for name in ("FORGET", "RETAIN", "OUT")}
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
        "instructions": _instructions(cubin, bits["FORGET"] + bits["RETAIN"]) if cubin else None,
        "fma": _fused(assembly, compiled.asm["llir"]),
    }
    row["failures"] = failures(row)
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row in the form that the table prints."""
    vectors = {name: f"{row[name]}/{row[f'{name}_expected']}" for name in ("vector_loads", "vector_stores")}
    return {**row, **vectors, "failures": ", ".join(row["failures"])}


def failures(row: dict[str, Any]) -> list[str]:
    """Names the expectations that a row does not meet."""
    failed = {
        "narrow loads": row["vector_loads"] < row["vector_loads_expected"],
        "narrow stores": row["vector_stores"] < row["vector_stores_expected"],
        "spills": row["spill_bytes"] > 0,
        "fused multiply-add": row["fma"] > 0,
    }
    return [name for name, yes in failed.items() if yes]


def _accesses(assembly: str, kind: str) -> list[int]:
    """Returns the bytes that a thread moves with each "load" from, or "store" to, global memory."""
    short = {"load": "ld", "store": "st"}[kind]
    ptx = re.findall(rf"\b{short}\.[.\w]*?global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", assembly)
    amd = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(dword|[a-z]+)(?:x(\d))?", assembly)
    unit = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2}
    return [int(n or 1) * int(bits) // 8 for n, bits in ptx] + [unit.get(u, 1) * int(n or 1) for u, n in amd]


def _fused(assembly: str, ir: str) -> int:
    """Counts the products that the compiler fused, or that the assembler may fuse, into a sum.

    The fused multiply-adds of the source, which are calls in the LLVM IR, do not count.
    """
    calls = re.findall(r"call (?:<(\d+) x )?\w+>? @llvm\.fma\.", ir)
    ptx = re.findall(r"\bfma\.rn\.f(?:32|64)(x2)?", assembly)
    open_to_fusion = re.findall(r"\b(?:mul|add|sub|fma)(?:\.ftz)?\.f(?:32|64)", assembly)
    amd = re.findall(r"\bv_(pk_)?(?:fma|fmac|mad|mac)\w*_b?f(?:16|32|64)\w*( .*)", assembly)
    # The compiler writes an fp16 product as one with the addend -0, a sum as one with the factor 1, and a
    # difference as one with the factor -1. Each has a single rounding.
    single = ("neg(0)", ", 1.0,", ", -1.0,")
    fused = sum(1 + bool(packed) for packed, line in amd if not any(operand in line for operand in single))
    # The division of two fp64 scalars takes five of them and one v_div_fmas.
    fused -= 5 * len(re.findall(r"\bv_div_fmas_f64", assembly))
    fused += sum(1 + bool(packed) for packed in ptx)
    more = fused - sum(int(width or 1) for width in calls)
    # An unused lane of a vector in the IR has no instruction in PTX.
    return len(open_to_fusion) + (max(more, 0) if ptx else abs(more))


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Returns the registers, and the bytes of stack and local memory."""
    text = _cuobjdump(cubin, "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _instructions(cubin: bytes, bits: int) -> float:
    """Returns the instructions of the main loop for each pair of elements, which has so many bits."""
    count, loaded = main_loop(_cuobjdump(cubin, "-sass"))
    return count * bits / (8 * loaded)


def main_loop(sass: str) -> tuple[int, int]:
    """Returns the instructions of the loop that loads most, and the bytes that a thread loads in one pass."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", sass)]
    found = [(0, 0)]
    for end, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < end:
            body = [t for at, t in code if int(branch[1], 16) <= at <= end]
            loads = [load[0] for t in body if (load := re.search(r"\bLDG\S*", t))]
            widths = [re.search(r"\.(U8|U16|64|128)\b", x) for x in loads if "STRONG" not in x]  # no sums
            sizes = {"U8": 1, "U16": 2, "64": 8, "128": 16}
            found.append((len(body), sum(sizes[width[1]] if width else 4 for width in widths)))
    return max(found, key=lambda loop: (loop[1], -loop[0]))


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Returns the vector registers, and the bytes of scratch memory or of spilled vector registers.

    Scalar registers are spilled to lanes of vector registers, or else to scratch memory.
    """
    usage = {
        key: int(value)
        for key, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly
        )
    }
    return usage["vgpr_count"], max(4 * usage["vgpr_spill_count"], usage["private_segment_fixed_size"])


def _inspect(task: tuple[int, str, bool, Configuration]) -> dict[str, Any]:
    index, arch, *chosen = task
    return inspect(launches(arch, *chosen)[index], arch)


def run(
    archs: Sequence[str] = ARCHS,
    quick: bool = False,
    jobs: int | None = None,
    configuration: Configuration = SHIPPED,
) -> dict[str, Any]:
    """Compiles and inspects `launches` of every target in `jobs` processes (by default one for each CPU)."""
    each = [(arch, quick, configuration) for arch in archs]
    tasks = [(i, *chosen) for chosen in each for i in range(len(launches(*chosen)))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        rows = list(tqdm(pool.map(_inspect, tasks), total=len(tasks), desc="compile"))
    return {
        "triton": triton.__version__,
        "source": source_hash("kernels", "sago/rules"),
        "archs": list(archs),
        "configuration": configuration._asdict(),
        "rows": rows,
    }
