"""The compiled code of the experiments, inspected as `benchmarks.compile` inspects what ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks import compile
from benchmarks.experiments import kernels, sweep
from benchmarks.measure import source_hash
from sago.rules import RULES

ARCHS = ("sm_80", "sm_90", "sm_100")
COLUMNS = (
    "experiment", "phase", "dtypes", "arch", "registers", "spill_bytes", "blocks_per_sm", "load_bytes",
    "store_bytes", "fma", "failures",
)  # fmt: skip


def launches(dtype: torch.dtype) -> list[compile.Launch]:
    """Every launch of every experiment that differs in its code."""
    if not isinstance(kernels._work_kernel, JITFunction):
        raise RuntimeError("Kernels are compiled only where the variable TRITON_INTERPRET is unset.")
    found: dict[Any, compile.Launch] = {}
    f, r = (torch.zeros(64, dtype=dtype) for _ in range(2))
    for name, experiment in kernels.EXPERIMENTS.items():
        calls, _ = kernels.prepare(experiment, [f], [r], RULES["pcgrad"], 1.0, 1.0, [r])()
        for call in calls:
            constants = {k: v for k, v in call.kwargs.items() if k not in ("FORMULA",)}
            if call.kwargs["PHASE"] == "reduce":
                constants["REVERSE"] = constants["SECOND"] = constants["OUT"] = None
            labels = {
                "experiment": name,
                "phase": call.kwargs["PHASE"],
                "dtypes": str(dtype).removeprefix("torch."),
            }
            kwargs = call.kwargs | ({"OUT": None} if call.kwargs["PHASE"] == "reduce" else {})
            found.setdefault(str(constants), compile.Launch(labels, call.kernel, call.args, kwargs))
    return list(found.values())


def run(
    archs: Sequence[str] = ARCHS, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> dict[str, Any]:
    rows = []
    for arch in archs:
        for dtype in dtypes:
            for launch in launches(dtype):
                row = compile.inspect(launch, arch)
                row["blocks_per_sm"] = sweep.resident(row["registers"], kernels.THREADS)
                rows.append({**row, "failures": ", ".join(row["failures"])})
    return {
        "triton": triton.__version__,
        "source": source_hash("kernels", "benchmarks/experiments"),
        "rows": rows,
    }
