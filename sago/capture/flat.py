"""Flat buffers of bounded size, with a view for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes, a cache line of a GPU


class Flat(NamedTuple):
    """Views like the given tensors, and the buffers that hold them.

    Attributes:
        views: One view for each tensor, of its shape and strides, at a multiple of `ALIGNMENT` bytes. Each
            has a version counter of its own, which shows whether the view was written.
        owner: For each view, the index of its buffer.
        buffers: One-dimensional tensors. All elements are -0, including the gaps between views.
    """

    views: list[Tensor]
    owner: list[int]
    buffers: list[Tensor]


def flatten(like: Sequence[Tensor], dtypes: Sequence[torch.dtype], capacity: float) -> Flat:
    """Allocates views like `like` of the given dtypes.

    Each buffer has one device and one dtype, and at most `capacity` bytes. A larger tensor has a buffer of
    its own. Neighbours in `like` are neighbours in memory.
    """
    sizes: list[int] = []  # of each buffer, in elements
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
    with torch.inference_mode(False):  # tensors of inference mode have no versions
        buffers = [
            torch.empty(size, dtype=dtype, device=device)
            for size, (device, dtype) in zip(sizes, kinds, strict=True)
        ]
        clear(buffers)
        for t, b, offset in zip(like, owner, offsets, strict=True):
            strides = torch.empty_like(t, device="meta").stride()  # autograd gives a gradient these strides
            view = buffers[b].new_empty(0)
            views.append(view.set_(buffers[b].untyped_storage(), offset, t.shape, strides))
    return Flat(views, owner, buffers)


@torch.no_grad()
def clear(buffers: Sequence[Tensor]) -> None:
    """Fills the buffers with -0. The sum of -0 and a number is that number. 0 would turn -0 into 0."""
    for buffer in buffers:
        end = buffer.storage_offset() * buffer.element_size() + buffer.nbytes
        if buffer.untyped_storage().nbytes() < end:  # torch would write there
            raise ValueError(
                "The accumulators should keep their memory. Found that the storage of a gradient was "
                "resized. Make new GradientBuckets, and clear gradients with zero_."
            )
        buffer.fill_(-0.0)
