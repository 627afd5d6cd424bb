"""`python -m tests.support.launched FOLDER` prints what every case launches, twice, as JSON.

Cold: each in a process that has launched nothing else. Warm: all in one, so that what is cached is used.
Dispatched: as with a version of Triton that was not tested, before a compiled kernel is kept.
"""

import functools
import json
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.driver import StubDriver
from sago import kernels
from sago.kernels.formula import on_device
from sago.rules import RULES, Coefficients
from tests.support.backends import RULES as PAPER

direct = import_module("sago.kernels.launch")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NUMELS = (40000, 7, 16)  # 2, 1 and 1 chunks


class Case(NamedTuple):
    rule: str
    gamma: float | Tensor = 0.75
    alpha: float | Tensor = 1.5
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = ((FP32, FP32),) * 3  # of forget and retain
    offset: int = 0
    sums: int = 0
    given: bool = False
    propagate: bool = False
    gramless: bool = False  # as a rule of scope "element" with the same coefficient function is launched


HALF, TWO = (torch.tensor(weight, dtype=FP64) for weight in (0.5, 2.0))

CASES = {
    **{rule: Case(rule) for rule in PAPER},
    "zero weights": Case("sago", 0.0, 0.0),  # Triton takes the bits of 0.0 for a 32-bit integer
    "other weights": Case("sago", -0.1, 1e300),
    "a zero weight": Case("sago", 0.3, 0.0),
    "weights on the device": Case("sago", HALF, TWO),
    "a weight on the device": Case("sago", 0.75, TWO),
    "6 sums": Case("sago", sums=6),
    "9 sums": Case("sago", sums=9),
    "6 sums ahead": Case("pcgrad", sums=6),
    "bf16": Case("sago", dtypes=((BF16, BF16),) * 3),
    "bf16, sums ahead": Case("pcgrad", dtypes=((BF16, BF16),) * 3),
    "forget in bf16": Case("sago", dtypes=((BF16, FP32),) * 3),
    "retain in bf16": Case("sago", dtypes=((FP32, BF16),) * 3),
    "two dtypes": Case("sago", dtypes=((BF16, BF16), (FP32, FP32), (FP32, FP32))),
    "not aligned": Case("sago", offset=1),
    "pcgrad, element": Case("pcgrad", gramless=True),
    "propagate": Case("sago", propagate=True),
    "given coefficients": Case("sago", given=True),
    "given coefficients, not gated": Case("sum", given=True),
}


def main() -> None:
    for rule in map(RULES.get, PAPER):
        on_device(rule.coefficients)  # numbered in the order of use, and the number is in the code
    with get_context("fork").Pool(2, maxtasksperchild=1) as processes:
        cold = dict(zip(CASES, processes.map(launched, CASES, chunksize=1), strict=True))
    with mock.patch.object(direct, "launches_directly", return_value=False):
        dispatched = {name: launched(name) for name in CASES}
    warm = {name: launched(name) for name in CASES}
    json.dump({"cold": cold, "warm": warm, "dispatched": dispatched}, sys.stdout)


def launched(name: str) -> dict[str, Any]:
    launch, expected = prepared(CASES[name])
    # A call allocates memory for its sums and coefficients. The second gets that of the first.
    made = {make: functools.cache(getattr(torch, make)) for make in ("empty", "zeros")}
    repeat = functools.cache(Tensor.repeat)
    with mock.patch.multiple(torch, **made), mock.patch.object(Tensor, "repeat", repeat):
        first, second = [(launch(), stub.launches())[1] for _ in range(2)]
    return {"first": first, "second": second, "expected": expected}


def prepared(case: Case) -> tuple[Callable[[], None], list[int]]:
    """Returns a function that launches the case, and values that its last launch must have as parameters."""
    forget, retain = (
        [
            torch.ones(n + 1, dtype=pair[side])[case.offset :][:n]
            for n, pair in zip(NUMELS, case.dtypes, strict=True)
        ]
        for side in range(2)
    )
    batch = kernels.Batch(torch.device("cpu"), forget, retain, retain, [0, 1, 2], 3)
    rule = RULES[case.rule]
    gram = coefficients = None
    expected = [parameter(case.gamma), parameter(case.alpha)]
    if case.given:
        columns = 4 if rule.gated else 2
        coefficients = Coefficients(torch.ones(3, columns, dtype=FP64), ("any",) * columns)
        expected = [coefficients.values.data_ptr()] if rule.gated else []
    ahead = rule.scope != "element" and not case.gramless
    if ahead:
        gram = torch.ones(1 if rule.scope == "global" else 3, 3, dtype=FP64).expand(3, 3)
        expected += [gram.data_ptr(), gram.stride(0)]

    def launch() -> None:
        if ahead:
            kernels.gram(batch, case.sums or 3)
        kernels.combine(
            batch,
            rule,
            case.gamma,
            case.alpha,
            0.0,
            gram,
            0 if ahead else case.sums,
            coefficients,
            case.propagate,
        )

    return launch, expected


def parameter(weight: float | Tensor) -> int:
    """The bits of a float, the address of a tensor."""
    if isinstance(weight, Tensor):
        return weight.data_ptr()
    return int.from_bytes(struct.pack("<d", weight), "little", signed=True)


if __name__ == "__main__":
    stub = StubDriver(Path(sys.argv[1]))  # found by the processes that are forked
    main()
