"""Packs: small tensors are processed together, in memory of their own.

A call of torch on one tensor takes microseconds, whatever its size. A pack copies some small tensors into one
buffer a side, where each takes whole tiles, so that one call processes all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sago.backends.graphs import TILE, compute_dtype

PACK = 1 << 16  # the largest number of elements of a pack: two buffers of fp32 take half a MiB
SMALL = 1 << 15  # the smallest number of elements of a tensor that is not packed


class Pack:
    """Some small pairs, and the positions in the buffers that they are copied to.

    Args:
        pairs: The positions of the pairs in their batch.
        like: Tensors with the shapes and strides of the pairs, which are dense in memory.
        rows: The row of each pair.
        buffers: The buffers for forget and retain, in the dtype of the computation.

    Attributes:
        numel: The number of elements, with those after a pair that are 0.
        tiles: The number of tiles of each pair.
        padding: The number of elements after each pair that are 0.
        rows: The row of each tile.
        row: The row, if it is that of all pairs.
    """

    def __init__(
        self, pairs: Sequence[int], like: Sequence[Tensor], rows: Sequence[int], buffers: Sequence[Tensor]
    ) -> None:
        tiles = [-(-t.numel() // TILE) for t in like]
        starts = [TILE * before for before in accumulate(tiles, initial=0)]
        self.pairs = pairs
        self.numel = starts.pop()
        self._buffers = self.forget, self.retain = [b[: self.numel] for b in buffers]
        self._views = [
            [
                b.as_strided(t.shape, t.stride(), b.storage_offset() + at)
                for t, at in zip(like, starts, strict=True)
            ]
            for b in buffers
        ]
        padding = [TILE * n - t.numel() for n, t in zip(tiles, like, strict=True)]
        self._padded = any(padding)
        self.padding = torch.tensor(padding, dtype=torch.float64, device="cpu")
        self.tiles = torch.tensor(tiles, device="cpu")
        self.rows = torch.tensor(rows, device="cpu").repeat_interleave(self.tiles)
        self.row = rows[0] if len(set(rows)) == 1 else None

    def fill(self, forget: Sequence[Tensor | None], retain: Sequence[Tensor | None]) -> None:
        """Copies the pairs of the batch into the buffers. None is copied as zeros."""
        for buffer, views, side in zip(self._buffers, self._views, (forget, retain), strict=True):
            pairs = [(v, t) for v, i in zip(views, self.pairs, strict=True) if (t := side[i]) is not None]
            if self._padded or len(pairs) < len(views):
                buffer.zero_()
            if pairs:
                torch._foreach_copy_([v for v, _ in pairs], [t for _, t in pairs])

    def empty(self, out: Sequence[Tensor]) -> None:
        """Copies the updates from the retain buffer to the outputs of the batch."""
        torch._foreach_copy_([out[i] for i in self.pairs], self._views[1])


def lay_out(
    forget: Sequence[Tensor | None], retain: Sequence[Tensor | None], rows: Sequence[int]
) -> tuple[list[Pack], list[int]]:
    """The packs of the small pairs, and the positions of the others."""
    like, alone = [], []
    packed: dict[torch.dtype, list[list[int]]] = {}
    sizes: dict[torch.dtype, list[int]] = {}
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        present = [t for t in (f, r) if t is not None]
        like.append(present[0])
        numel = present[0].numel()
        if numel >= SMALL:
            alone.append(i)
            continue
        dtype, padded = compute_dtype(*present), -(-numel // TILE) * TILE
        of_dtype, held = packed.setdefault(dtype, []), sizes.setdefault(dtype, [])
        if not of_dtype or held[-1] + padded > PACK:
            of_dtype.append([])
            held.append(0)
        of_dtype[-1].append(i)
        held[-1] += padded
    packs = []
    # Tensors that are made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        for dtype, of_dtype in packed.items():
            buffers = torch.empty(2, max(sizes[dtype]), dtype=dtype, device="cpu").unbind()
            for pairs in of_dtype:
                packs.append(Pack(pairs, [like[i] for i in pairs], [rows[i] for i in pairs], buffers))
    return packs, alone
