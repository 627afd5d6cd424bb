"""Where a synthesis runs, as a callable that hides nothing: outputs are poisoned and fenced."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sago
from sago.backends.choose import triton_version
from sago.rules import resolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The rules of the paper. Every property is tested on them, and tests/sago/test_gallery.py tests all rules.
RULES = ("sum", "sago", "sago_prefer_retain", "pcgrad", "pcgrad_global", "blur")
ELEMENTWISE = tuple(name for name in RULES if resolve(name).scope == "element")
GRAM = tuple(name for name in RULES if resolve(name).scope != "element")
GLOBAL = tuple(name for name in RULES if resolve(name).scope == "global")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_FENCE = 64  # elements on both sides of an output; a multiple of 16 bytes in every dtype


def has_triton() -> bool:
    return triton_version() is not None


def import_with_triton(name: str) -> Any:
    """The module of that name. Skips the tests of the importing file where Triton is missing or too old."""
    if not has_triton():
        pytest.skip("needs Triton 3.4 or newer", allow_module_level=True)
    return import_module(name)


class Backend(NamedTuple):
    """`backend(forget, retain, rule, ...)` is `sago.synthesize_` into new outputs, on CPU copies or views.

    Returns the updates and the report. `dtypes` are those of the outputs, retain's unless given. An output
    starts `offset` elements after an aligned address.
    """

    name: str
    device: str
    offset: int = 0

    def __call__(
        self, forget: Any, retain: Any, rule: Any = "sago", dtypes: Any = None, **options: Any
    ) -> tuple[list[Tensor | None], sago.SynthesisReport]:
        forget, retain = ([t if t is None else self.place(t) for t in side] for side in (forget, retain))
        like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
        dtypes = [None if t is None else t.dtype for t in like] if dtypes is None else dtypes
        out = [None if t is None else poisoned(t, d, self.offset) for t, d in zip(like, dtypes, strict=True)]
        report = sago.synthesize_(forget, retain, rule=rule, out=out, backend=self.name, **options)
        for t in out:
            assert t is None or fence_holds(t), "written outside of an output"
        return [None if t is None else t.cpu() for t in out], report

    def place(self, t: Tensor) -> Tensor:
        return t if self.device == "cpu" else on_device(t, self.device)


def on_device(t: Tensor, device: str) -> Tensor:
    """A copy with the same strides and the same misalignment; overlapping elements become separate."""
    if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        return t.to(device)
    offset = t.storage_offset() % 16
    extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    memory = torch.zeros(offset + max(extent, 0), dtype=t.dtype, device=device)
    return memory.as_strided(t.shape, t.stride(), offset).copy_(t)


def poisoned(like: Tensor, dtype: torch.dtype | None = None, offset: int = 0) -> Tensor:
    """NaN, of `like`'s shape and element order, inside of a longer stretch of NaN."""
    start = _FENCE + offset
    strides = torch.empty_like(like, device="meta").stride()
    memory = torch.full(
        (start + like.numel() + _FENCE,), torch.nan, dtype=dtype or like.dtype, device=like.device
    )
    return memory.as_strided(like.shape, strides, start)


def fence_holds(out: Tensor) -> bool:
    memory = out._base
    assert memory is not None
    start, end = out.storage_offset(), out.storage_offset() + out.numel()
    return bool(memory[:start].isnan().all() and memory[end:].isnan().all())
