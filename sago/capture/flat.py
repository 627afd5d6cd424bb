"""Tensors laid side by side in flat buffers of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes, a cache line of a GPU


class Flat(NamedTuple):
    """Views like the given tensors, and the buffers that they lie in.

    Attributes:
        views: One a tensor, of its shape and strides, at a multiple of `ALIGNMENT` bytes. Each counts its own
            versions, so that it can be told which of them were written.
        owner: The buffer that each lies in.
        buffers: One-dimensional; all elements, the gaps between views included, are -0.
    """

    views: list[Tensor]
    owner: list[int]
    buffers: list[Tensor]


def flatten(like: Sequence[Tensor], dtypes: Sequence[torch.dtype], capacity: float) -> Flat:
    """Views like `like` of the given dtypes.

    Buffers are of one device and dtype each and of `capacity` bytes at most; a tensor that is larger has one
    of its own. Neighbours in `like` are neighbours in memory.
    """
    sizes: list[int] = []  # in elements, of each buffer
    kinds: list[tuple[torch.device, torch.dtype]] = []
    open_buffer: dict[tuple[torch.device, torch.dtype], int] = {}
    owner, offsets = [], []
    for t, dtype in zip(like, dtypes, strict=True):
        kind, unit = (t.device, dtype), ALIGNMENT // dtype.itemsize
        length = -(-t.numel() // unit) * unit
        at = open_buffer.get(kind)
        if at is None or (sizes[at] + length) * dtype.itemsize > capacity:
            at = open_buffer[kind] = len(sizes)
            sizes.append(0)
            kinds.append(kind)
        owner.append(at)
        offsets.append(sizes[at])
        sizes[at] += length
    views = []
    with torch.inference_mode(False):  # in which tensors have no versions
        buffers = [
            torch.empty(size, dtype=dtype, device=device)
            for size, (device, dtype) in zip(sizes, kinds, strict=True)
        ]
        clear(buffers)
        for t, b, offset in zip(like, owner, offsets, strict=True):
            strides = torch.empty_like(t, device="meta").stride()  # those that autograd gives a gradient of t
            view = buffers[b].new_empty(0)
            views.append(view.set_(buffers[b].untyped_storage(), offset, t.shape, strides))
    return Flat(views, owner, buffers)


@torch.no_grad()
def clear(buffers: Sequence[Tensor]) -> None:
    """Fills with -0, the zero that leaves every number as it is when it is added to: 0 turns -0 into 0."""
    for buffer in buffers:
        buffer.fill_(-0.0)
