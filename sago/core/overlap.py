"""Checks that tensors do not share memory that is written."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor


class _Span(NamedTuple):
    """The addresses from the first to the last byte of a tensor; `name` is None for an output."""

    start: int
    end: int
    tensor: Tensor
    name: str | None
    position: int

    def __str__(self) -> str:
        return f"`{self.name}[{self.position}]`" if self.name else f"the output for gradient {self.position}"


def check_overlap(forget: list[Tensor | None], retain: list[Tensor | None], out: list[Tensor | None]) -> None:
    """Raises ValueError if memory would be written twice, or written before another tensor reads it."""
    spans: dict[torch.device, list[_Span]] = {}
    for i, (f, r, o) in enumerate(zip(forget, retain, out, strict=True)):
        if o is None or o.numel() == 0:
            continue
        if not is_dense(o) and _overlaps_itself(o):
            raise ValueError(
                f"The output for gradient {i} should not overlap itself. "
                f"Found shape {tuple(o.shape)} with strides {o.stride()}. Pass a tensor that is "
                "not expanded."
            )
        there = spans.setdefault(o.device, [])
        there.append(_span(o, None, i))
        for name, t in (("forget", f), ("retain", r)):
            if t is not None and t is not o and not _is_alias(t, o):
                there.append(_span(t, name, i))
    for there in spans.values():
        there.sort(key=attrgetter("start"))
        read_to = written_to = 0
        for k, span in enumerate(there):
            written = span.name is None
            if span.start < written_to or (written and span.start < read_to):
                _check_shared(span, there[:k])
            if written:
                written_to = max(written_to, span.end)
            else:
                read_to = max(read_to, span.end)


def _check_shared(span: _Span, before: list[_Span]) -> None:
    for other in before:
        both_read = span.name is not None and other.name is not None
        if not both_read and span.start < other.end and _share_memory(span.tensor, other.tensor):
            raise ValueError(
                "Memory that is written should not be shared, unless the output is exactly the forget or "
                f"retain gradient of the same index. Found that {span} and {other} share memory. Pass "
                "`out=` with memory of its own, or use sago.synthesize."
            )


def _span(t: Tensor, name: str | None, index: int) -> _Span:
    start = t.data_ptr()
    if t.is_contiguous():
        return _Span(start, start + t.nbytes, t, name, index)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return _Span(start, start + (last + 1) * t.itemsize, t, name, index)


def _is_alias(t: Tensor, out: Tensor) -> bool:
    return (
        t.data_ptr() == out.data_ptr()
        and t.dtype == out.dtype
        and t.stride() == out.stride()
        and t.shape == out.shape
    )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _overlaps_itself(t: Tensor) -> bool:
    # This test is sufficient for all views that slicing, transposing and expanding can make.
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors with overlapping memory ranges have a byte in common. Columns of a matrix do not.

    Each tensor consists of runs of bytes that repeat with a common period. If the runs do not meet in one
    period, they never meet. Otherwise small ranges are compared byte by byte, and large ranges count as
    overlapping.
    """
    (run_x, strides_x), (run_y, strides_y) = _runs(x), _runs(y)
    period = math.gcd(*strides_x, *strides_y)
    if period == 0:  # each tensor is one run
        return True
    shift = (y.data_ptr() - x.data_ptr()) % period
    if run_x <= shift and shift + run_y <= period:
        return False
    first = min(x.data_ptr(), y.data_ptr())
    length = max(_span(t, None, 0).end for t in (x, y)) - first
    if length > 1 << 16:
        return True
    marks = torch.zeros(length, dtype=torch.bool)
    _bytes(marks, x, first).fill_(True)
    return bool(_bytes(marks, y, first).any())


def _runs(t: Tensor) -> tuple[int, list[int]]:
    """The length in bytes of the contiguous runs of `t`, and the strides in bytes between the runs."""
    run = t.itemsize
    strides: list[int] = []
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride * t.itemsize == run and not strides:
            run *= size
        elif size > 1:
            strides.append(stride * t.itemsize)
    return run, strides


def _bytes(marks: Tensor, t: Tensor, first: int) -> Tensor:
    strides = [stride * t.itemsize for stride in t.stride()]
    return marks.as_strided((*t.shape, t.itemsize), (*strides, 1), t.data_ptr() - first)
