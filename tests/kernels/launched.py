"""`python -m tests.kernels.launched FOLDER ORDER`: what every case launches, twice, as JSON on the standard output.

ORDER is `forward` or `backward`: what is launched must not depend on what was launched before.
"""

import functools
import json
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from sago.rules import RULES, Coefficients
from tests.kernels.driver import StubDriver

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NUMELS = (40000, 7, 16)  # 2, 1 and 1 chunks


class Case(NamedTuple):
    rule: str
    gamma: Any = 0.75
    alpha: Any = 1.5
    dtypes: tuple[torch.dtype, ...] = (FP32, FP32, FP32)
    offset: int = 0
    sums: int = 0
    given: bool = False
    propagate: bool = False


def on_device(weight: float) -> torch.Tensor:
    return torch.tensor(weight, dtype=FP64)


CASES = {
    **{rule: Case(rule) for rule in RULES},
    "zero weights": Case("sago", 0.0, 0.0),  # Triton makes 32-bit integers of the bits of 0.0
    "other weights": Case("sago", -0.1, 1e300),
    "zero retain weight": Case("sago", 0.3, 0.0),
    "weights on the device": Case("sago", on_device(0.75), on_device(1.5)),
    "one weight on the device": Case("sago", 0.75, on_device(1.5)),
    "6 sums": Case("sago", sums=6),
    "9 sums": Case("sago", sums=9),
    "bf16": Case("sago", dtypes=(BF16, BF16, BF16)),
    "two dtypes": Case("sago", dtypes=(BF16, FP32, FP32), sums=6),
    "not aligned": Case("sago", offset=1),
    "propagate": Case("sago", propagate=True),
    "given coefficients": Case("sago", given=True),
}


def main(folder: str, order: str) -> None:
    stub = StubDriver(Path(folder))
    from sago import kernels
    from sago.kernels.formula import on_device

    for rule in RULES.values():
        on_device(rule.coefficients)  # they are numbered in the order of use, and the numbers are in the code
    found = {}
    for name in CASES if order == "forward" else reversed(CASES):
        launch, expected = prepared(kernels, CASES[name])
        # Memory for sums is allocated anew by every call; here the second call is given that of the first.
        with mock.patch.multiple(
            torch, empty=functools.cache(torch.empty), zeros=functools.cache(torch.zeros)
        ):
            first, second = [(launch(), stub.launches())[1] for _ in range(2)]
        found[name] = {"first": first, "second": second, "expected": expected}
    json.dump(found, sys.stdout)


def prepared(kernels: Any, case: Case) -> tuple[Any, list[int]]:
    """A function that launches the case, and what is to be found among the parameters of its last launch."""
    shapes = list(zip(NUMELS, case.dtypes, strict=True))
    forget, retain = ([torch.ones(n + 1, dtype=d)[case.offset :][:n] for n, d in shapes] for _ in range(2))
    rule = RULES[case.rule]
    batch = kernels.Batch(torch.device("cpu"), forget, retain, retain, [0, 1, 2], 3)
    gram = coefficients = None
    expected = [parameter(case.gamma), parameter(case.alpha)]
    if case.given:
        coefficients = Coefficients(torch.ones(3, 4, dtype=FP64), ("any",) * 4)
        expected = [coefficients.values.data_ptr()]
    if rule.scope != "element":
        gram = torch.ones(1 if rule.scope == "global" else 3, 3, dtype=FP64).expand(3, 3)
        expected += [gram.data_ptr(), gram.stride(0)]

    def launch() -> None:
        if gram is not None:
            kernels.gram(batch, 3)
        kernels.combine(
            batch, rule, case.gamma, case.alpha, 0.0, gram, case.sums, coefficients, case.propagate
        )

    return launch, expected


def parameter(weight: Any) -> int:
    """The bits of a float, the address of a tensor."""
    if isinstance(weight, torch.Tensor):
        return weight.data_ptr()
    return int.from_bytes(struct.pack("<d", weight), "little", signed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
