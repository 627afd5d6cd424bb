"""Where the tensors of a list lie, as tables on their device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

# CHUNK, BLOCK and THREADS fix the order of every sum: changing one changes the last bits of results.
# A lane of the sums adds at most CHUNK / THREADS squares in fp32, so magnitudes up to 1e18 stay in range.
CHUNK = 32768
BLOCK = 2048
THREADS = 256

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

Signature = tuple[torch.dtype, torch.dtype, torch.dtype]
Entry = tuple[int, int, int, int]  # addresses of forget, retain and out; whether all are multiples of 16


class Uploaded(NamedTuple):
    """A table on the device, and the host memory that a captured copy reads at every replay."""

    tensor: Tensor
    source: Tensor


class Launch(NamedTuple):
    """The tensors of one dtype combination, in the order of the list.

    Attributes:
        dtypes: Of forget, retain and out.
        members: Positions in the list.
        shapes: int64 `[members, 4]`: elements, first chunk in this launch, first slot, row.
        owner: int32 `[chunks]`: which member a chunk belongs to.
    """

    dtypes: Signature
    members: list[int]
    shapes: Uploaded
    owner: Uploaded


class Layout:
    """What follows from sizes, dtypes and rows alone: chunks, slots and their tables.

    A tensor is cut into chunks of `CHUNK` elements. Each chunk owns one slot for its partial sums; the
    slots of a row are contiguous and ordered as the list is, whatever the dtypes are.

    Attributes:
        rows: int64 `[rows, 2]`: first slot and number of slots.
        slots: Their total.
    """

    def __init__(
        self,
        numels: tuple[int, ...],
        dtypes: tuple[Signature, ...],
        rows: tuple[int, ...],
        row_count: int,
        device: torch.device,
    ) -> None:
        chunks = [-(-n // CHUNK) for n in numels]
        first_slot = [0] * len(numels)
        row_table = []
        self.slots = 0
        members_of: list[list[int]] = [[] for _ in range(row_count)]
        for i, row in enumerate(rows):
            members_of[row].append(i)
        for members in members_of:
            start = self.slots
            for i in members:
                first_slot[i] = self.slots
                self.slots += chunks[i]
            row_table.append((start, self.slots - start))
        self.rows = _upload(row_table, torch.int64, device)

        self.launches = []
        for signature in dict.fromkeys(dtypes):
            members = [i for i, s in enumerate(dtypes) if s == signature and numels[i]]
            shapes, owner, first_chunk = [], [], 0
            for m, i in enumerate(members):
                shapes.append((numels[i], first_chunk, first_slot[i], rows[i]))
                owner += [m] * chunks[i]
                first_chunk += chunks[i]
            if members:
                self.launches.append(
                    Launch(
                        signature,
                        members,
                        _upload(shapes, torch.int64, device),
                        _upload(owner, torch.int32, device),
                    )
                )


class Cache:
    """Device tables by what they were made from, the least recently used dropped first.

    What a CUDA graph captures is replayed on the same memory, so it is kept for good; and what is made
    during a capture is not filled before the first replay, so it is not shared.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._kept: list[Any] = []

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
        # A copy to the device is ordered by its stream only, and so is the reuse of memory. A capture
        # starts behind everything, and must not pin memory if it can be helped.
        current = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream, found = self._found.get(key, (current, None))
        if found is not None and (stream == current or capturing):
            self._found.move_to_end(key)
        else:
            found = make()
            if not capturing:
                self._found[key] = current, found
                if len(self._found) > self._size:
                    self._found.popitem(last=False)
        if capturing:
            self._kept.append(found)
        return found


_layouts = Cache(64)
_addresses = Cache(256)


class Batch:
    """Gradient pairs on one device and where their update goes, ready for `gram` and `combine`.

    Args:
        device: Where all of them are.
        forget, retain: Tensors or None (a zero gradient), pairwise of one shape and, over dense memory,
            of one element order. At most one of a pair is None.
        out: Where `combine` writes; may be forget or retain themselves.
        rows: The row of the Gram table a pair belongs to.
        row_count: Rows of the table; a row without elements is zero.
    """

    def __init__(
        self,
        device: torch.device,
        forget: Sequence[Tensor | None],
        retain: Sequence[Tensor | None],
        out: Sequence[Tensor],
        rows: Sequence[int],
        row_count: int,
    ) -> None:
        numels: list[int] = []
        dtypes: list[Signature] = []
        addresses: list[Entry] = []
        for f, r, o in zip(forget, retain, out, strict=True):
            dtypes.append(((r if f is None else f).dtype, (f if r is None else r).dtype, o.dtype))  # type: ignore[union-attr]
            numels.append(o.numel())
            f_at, r_at, o_at = (
                0 if f is None else f.data_ptr(),
                0 if r is None else r.data_ptr(),
                o.data_ptr(),
            )
            addresses.append((f_at, r_at, o_at, int((f_at | r_at | o_at) % 16 == 0)))
        self.device = device
        self.tensors = (forget, retain, out)  # the tables hold bare addresses
        self.row_count = row_count
        key = (tuple(numels), tuple(dtypes), tuple(rows), row_count, device)
        self.layout: Layout = _layouts.get(key, device, lambda: Layout(*key))
        self.tables = []
        for launch in self.layout.launches:
            table = tuple(addresses[i] for i in launch.members)
            aligned = all(entry[3] for entry in table)
            uploaded: Uploaded = _addresses.get(
                (table, device), device, partial(_upload, table, torch.int64, device)
            )
            self.tables.append((launch, uploaded.tensor, aligned))

    def scratch(self, sums: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial sums `[sums, slots]`, the zeroed table `[rows, sums]` and a zeroed counter a row."""
        partials = torch.empty(sums, self.layout.slots, dtype=torch.float64, device=self.device)
        counters = -(-self.row_count // 4) * 2  # in doubles; even, which keeps the table aligned
        zeros = torch.zeros(counters + self.row_count * sums, dtype=torch.float64, device=self.device)
        table = zeros[counters:].view(self.row_count, sums)
        return partials, table, zeros[:counters].view(torch.int32)


def compute_dtype(signature: Signature) -> tl.dtype:
    return tl.float64 if torch.float64 in signature[:2] else tl.float32


def vector(signature: Signature) -> int:
    """Elements in 16 bytes of the narrowest gradient."""
    return 16 // min(dtype.itemsize for dtype in signature)


def _upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Uploaded:
    # Pinned, because a pageable copy synchronises and is an error while a CUDA graph is captured.
    pinned = device.type == "cuda"
    source = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)
    return Uploaded(source.to(device, non_blocking=pinned), source)


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def options(device: torch.device, aligned: bool, dtypes: Signature) -> dict[str, int | bool]:
    """Compiler options of a launch."""
    found: dict[str, int | bool] = {"num_warps": THREADS // lanes(device), "enable_fp_fusion": False}
    rare = not aligned or len(set(dtypes)) > 1
    if rare and device.type == "cuda" and torch.version.hip is None:
        # With two paths or two widths in a kernel, ptxas spills a little to fit in one more block, unless
        # it is told not to.
        found["maxnreg"] = 255
    return found


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current, as a launch needs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
