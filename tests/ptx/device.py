"""The backend "triton" on CPU tensors with compiled kernels: `with emulated("sm_90"): sago.synthesize_(...)`.

Everything before the launch is the library's own: tables, counters, scratch memory, order of launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .compiler import Compiler, Request
from .emulator import Kernel
from .memory import GRANULE, Allocation, Memory
from .program import parse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
NAMES = {
    "gram": ("addresses", "shapes", "owner", "rows", "partials", "counters", "table", "draws", "floors"),
    "combine": (
        *("addresses", "shapes", "owner", "rows", "partials", "counters", "table", "draws", "floors"),
        *("coefficients", "gram", "gamma", "alpha", "eps", "gram_stride"),
    ),
}
UNWRITTEN = ("partials", "table")
SHIPPED = Compiler()


class Setting(NamedTuple):
    """How launches are compiled and run.

    Attributes:
        arch: `sm_80`, `sm_90` or `sm_100`.
        compiler: Compiles the kernels, which may be wrong on purpose.
        change: Makes other code of the PTX.
        constants: Take the place of constexpr arguments.
        only: The program ids that run; None for all.
        options: Of `emulator.Kernel.run`: seed, races, late.
    """

    arch: str
    compiler: Compiler = SHIPPED
    change: Callable[[str], str] = str
    constants: dict[str, Any] = {}  # noqa: RUF012 (nothing writes it)
    only: Sequence[int] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012


@contextmanager
def emulated(arch: str, counts: Counter[str] | None = None, **setting: Any) -> Iterator[Counter[str]]:
    """The backend "triton" runs the code for `arch` on CPU tensors. Takes the attributes of `Setting`.

    Yields how many launches, blocks and elements ran, and adds them to `counts`.
    """
    chosen, found = Setting(arch, **setting), Counter[str]()
    combine = import_module("sago.kernels.combine")
    gram = import_module("sago.kernels.gram")
    compilable = combine.on_device
    with (
        mock.patch.object(gram, "_gram_kernel", Emulated("gram", chosen, found)),
        mock.patch.object(combine, "_combine_kernel", Emulated("combine", chosen, found)),
        # The functions themselves go to the compiling process, which has device functions of its own.
        mock.patch.object(combine, "on_device", lambda c: None if compilable(c) is None else c),
        mock.patch.object(combine, "gate_on_device", lambda gate: gate),
        mock.patch.object(gram, "gate_on_device", lambda gate: gate),
    ):
        yield found
    if counts is not None:
        counts.update(found)


class Emulated:
    """Takes the place of a kernel: `emulated[grid](*arguments, **constants)`."""

    def __init__(self, name: str, setting: Setting, counts: Counter[str]) -> None:
        self._name, self._setting, self._counts = name, setting, counts
        # The scratch memory of the last launch, and what has been written there. The next launch may use it.
        self._scratch: dict[str, tuple[Tensor, np.ndarray]] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            setting = self._setting
            constants = {**constants, **{k: v for k, v in setting.constants.items() if k in constants}}
            found = setting.compiler(
                Request(
                    self._name,
                    setting.arch,
                    tuple(x.dtype if isinstance(x, Tensor) else x for x in arguments),
                    tuple(constants.items()),
                )
            )
            kernel = _kernel(setting.change(found.ptx))
            numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments if x is not None]
            # Triton adds two pointers to memory that these kernels do not use.
            numbers += [0] * (len(kernel.program.parameters) - len(numbers))
            given = dict(zip(NAMES[self._name], arguments, strict=True))
            for name in UNWRITTEN:
                x = given[name]
                if x is not None and self._scratch.get(name, (None,))[0] is not x:
                    self._scratch[name] = x, np.zeros(-(-x.nbytes // GRANULE), bool)
            memory = Memory(_allocations(given, constants, self._scratch))
            blocks = range(grid[0]) if setting.only is None else setting.only
            written = kernel.run(blocks, numbers, memory, found.shared, **setting.options)
            for name in UNWRITTEN if written is not None else ():
                if given[name] is not None:
                    x, flags = self._scratch[name]
                    flags |= written[memory.granules_of(x.data_ptr())]
            elements = sum(numel for numel, *_ in given["shapes"].tolist())
            self._counts.update(launches=1, blocks=len(blocks), elements=elements)

        return launch


@lru_cache(maxsize=256)
def _kernel(ptx: str) -> Kernel:
    return Kernel(parse(ptx))


def _allocations(
    arguments: dict[str, Any], constants: dict[str, Any], scratch: dict[str, tuple[Tensor, np.ndarray]]
) -> Iterator[Allocation]:
    """The tables and scratch memory of a launch, and the tensors that the tables name."""
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            written = scratch[name][1] if name in UNWRITTEN else True
            extent = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
            yield Allocation(name, x.data_ptr(), x.data_ptr() + extent * x.itemsize, written)
    sizes = [_size(constants.get(side)) for side in ("FORGET", "RETAIN", "OUT")]
    tables = arguments["addresses"].tolist(), arguments["shapes"].tolist()
    for i, (addresses, (numel, *_)) in enumerate(zip(*tables, strict=True)):
        for side, address, size in zip(("forget", "retain", "out"), addresses[:3], sizes, strict=True):
            if address and size:
                yield Allocation(f"{side}[{i}]", address, address + numel * size, side != "out")
    for weight in ("gamma", "alpha"):
        if constants.get(f"{weight.upper()}_IN_MEMORY"):
            yield Allocation(weight, arguments[weight], arguments[weight] + 8, True)


def _size(dtype: Any) -> int:
    return 0 if dtype is None else DTYPES[str(dtype)].itemsize
