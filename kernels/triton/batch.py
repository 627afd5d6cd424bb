"""Tables on the device that tell the kernels where the tensors of a list are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from sago.backends.streams import Cache, Streams, is_capturing
from sago.backends.upload import upload

# CHUNK, BLOCK and THREADS fix the order of every sum: changing one changes the last bits of results.
# A lane of the sums adds at most CHUNK / THREADS squares in fp32, so magnitudes up to 1e18 stay in range.
CHUNK = 32768
BLOCK = 1024
THREADS = 128
SPAN = 256  # chunks of a row whose sums are added before those of the row

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

Signature = tuple[torch.dtype, torch.dtype, torch.dtype]
Entry = tuple[int, int, int, int]  # addresses of forget, retain and out; whether all are multiples of 16


class Section(NamedTuple):
    """The tensors of one dtype combination, in the order of the list: one launch.

    Attributes:
        dtypes: The dtypes of forget, retain and out.
        members: The positions of these tensors in the list.
        shapes: int64 `[members, 4]`: elements, first chunk in this launch, first slot, row.
        owner: int32 `[chunks]`: which member a chunk belongs to.
        compiled: Kernels that were compiled for this section, by alignment; see `launch`.
    """

    dtypes: Signature
    members: list[int]
    shapes: Tensor
    owner: Tensor
    compiled: dict[bool, dict[Hashable, Any]]


class Launch(NamedTuple):
    """A launch of a batch.

    Attributes:
        dtypes: The dtypes of forget, retain and out.
        chunks: The number of chunks. Each chunk has one program of the launch.
        tables: The first arguments of both kernels: addresses int64 `[members, 4]`, shapes, owner and rows.
        addresses: The addresses of these tables.
        aligned: Whether the addresses of all gradients are multiples of 16.
        compiled: Kernels that were compiled for this launch; see `launch`.
    """

    dtypes: Signature
    chunks: int
    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    addresses: tuple[int, ...]
    aligned: bool
    compiled: dict[Hashable, Any]


class Layout:
    """The chunks, slots and tables of a list, which depend on sizes, dtypes and rows only.

    A tensor is cut into chunks of `CHUNK` elements. Each chunk owns one slot for its partial sums. The slots
    of a row are contiguous and in the order of the list, for any dtypes.

    Attributes:
        rows: int64 `[rows, 4]`: the first slot of each row, the number of its slots, its counter, which the
            counters of its spans follow, and the slot of its first span, if it has several.
        first_slot: For each tensor, the slot of its first chunk.
        slots: The total number of slots.
        entries: The number of slots of chunks and spans.
        counters: The number of counters: one for each row and each span.
        sections: The tensors of each combination of dtypes.
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
        first_slot = self.first_slot = [0] * len(numels)
        row_table: list[tuple[int, ...]] = []
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
        # A row of several spans has a slot for each, behind the slots of all chunks.
        self.counters = self.entries = 0
        for row, (start, slots) in enumerate(row_table):
            spans = -(-slots // SPAN)
            row_table[row] = start, slots, self.counters, self.slots + self.entries
            self.counters += 1 + spans
            self.entries += spans if spans > 1 else 0
        self.entries += self.slots
        self.rows = upload(row_table, torch.int64, device)

        self.sections = []
        for signature in dict.fromkeys(dtypes):
            members = [i for i, s in enumerate(dtypes) if s == signature and numels[i]]
            shapes, first_chunk = [], 0
            for i in members:
                shapes.append((numels[i], first_chunk, first_slot[i], rows[i]))
                first_chunk += chunks[i]
            if members:
                owner = torch.arange(len(members), dtype=torch.int32, device="cpu").repeat_interleave(
                    torch.tensor([chunks[i] for i in members], device="cpu")
                )
                tables = upload(shapes, torch.int64, device), upload(owner, torch.int32, device)
                self.sections.append(Section(signature, members, *tables, {}))


_layouts = Cache(64)


class Batch:
    """Gradient pairs on one device, laid out for `gram` and `combine`.

    It keeps the tensors alive until `release`.

    Args:
        device: The device of all tensors.
        forget, retain: Tensors, or None for a zero gradient. The two tensors of a pair have the same shape
            and strides and are dense in memory. At most one of a pair is None.
        out: The tensors that `combine` writes. They may be those of forget or retain.
        rows: For each pair, its row in the table of sums.
        row_count: The number of rows of the table. A row without elements is zero.
        origins: For each pair, the position of its first element in the list, for random gates.

    Attributes:
        launches: One launch for each combination of dtypes.
    """

    def __init__(
        self,
        device: torch.device,
        forget: Sequence[Tensor | None],
        retain: Sequence[Tensor | None],
        out: Sequence[Tensor],
        rows: Sequence[int],
        row_count: int,
        origins: Sequence[int] = (),
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
        self._tensors: object = (forget, retain, out)  # kept alive, because the tables hold only addresses
        self.row_count = row_count
        key = (tuple(numels), tuple(dtypes), tuple(rows), row_count, device)
        self.layout: Layout = _layouts.get(key, [device], lambda: Layout(*key))
        self.launches = []
        for section in self.layout.sections:
            entries = [addresses[i] for i in section.members]
            aligned = all(entry[3] for entry in entries)
            tables = upload(entries, torch.int64, device), section.shapes, section.owner, self.layout.rows
            self.launches.append(
                Launch(
                    section.dtypes,
                    len(section.owner),
                    tables,
                    tuple(t.data_ptr() for t in tables),
                    aligned,
                    section.compiled.setdefault(aligned, {}),
                )
            )
        self._empty_rows = len(set(rows)) < row_count or 0 in numels
        self._streams = Streams(device)
        self._counters: dict[Hashable, Tensor] = {}
        self._numels, self._origins = numels, origins
        self._positions: Tensor | None = None

    def draws(self, draw: Tensor) -> Tensor:
        """The seed and the step, and the position of each chunk's first element, int64 `[2 + slots]`."""
        if self._positions is None:
            found = torch.zeros(self.layout.slots, dtype=torch.int64, device="cpu")
            for numel, origin, slot in zip(self._numels, self._origins, self.layout.first_slot, strict=True):
                chunks = -(-numel // CHUNK)
                found[slot : slot + chunks] = origin + CHUNK * torch.arange(chunks, device="cpu")
            # On the host, because another stream may use it, and the upload may be part of a capture.
            self._positions = found
        return torch.cat([draw, upload(self._positions, torch.int64, self.device)])

    def scratch(self, sums: int, stream: Hashable) -> tuple[Tensor, Tensor]:
        """Memory for sums of chunks and spans, `[entries, sums]`. Counters, which are 0 between launches."""
        partials = torch.empty(self.layout.entries, sums, dtype=torch.float64, device=self.device)
        # Launches on two streams may overlap. So may those of a CUDA graph with those of eager calls.
        counters = None if is_capturing([self.device]) else self._counters.get(stream)
        if counters is None:
            counters = torch.zeros(self.layout.counters, dtype=torch.int32, device=self.device)
            if not is_capturing([self.device]):
                self._counters[stream] = counters
        return partials, counters

    def join(self) -> Hashable:
        """Lets the current stream use the tables, and returns it. Every operation begins with it."""
        return self._streams.join(t for one in self.launches for t in one.tables)

    def release(self) -> bool:
        """Drops the references to the tensors. The kernels work by their addresses."""
        self._tensors = None
        return True

    def discard_counters(self) -> None:
        """Drops the counters after a failed launch, because they may not be 0."""
        self._counters.clear()

    def table(self, sums: int) -> Tensor:
        """Allocates the table of sums, fp64 `[rows, sums]`, with 0 in rows that no kernel writes."""
        make = torch.zeros if self._empty_rows else torch.empty
        return make(self.row_count, sums, dtype=torch.float64, device=self.device)


def compute_dtype(signature: Signature) -> tl.dtype:
    return tl.float64 if torch.float64 in signature[:2] else tl.float32


def vector(signature: Signature) -> int:
    """Elements in 16 bytes of the narrowest gradient."""
    return 16 // min(dtype.itemsize for dtype in signature)


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def options(
    device: torch.device, aligned: bool, dtypes: Signature, spills: bool = False
) -> dict[str, int | bool]:
    """Compiler options of a launch. `spills`: the kernel is one of those that would spill registers."""
    found: dict[str, int | bool] = {"num_warps": THREADS // lanes(device), "enable_fp_fusion": False}
    spills = spills or not aligned or len(set(dtypes)) > 1 or torch.float64 in dtypes
    if spills and device.type == "cuda" and torch.version.hip is None:
        # Without this limit, ptxas spills a few registers so that one more block fits. It does so in kernels
        # with two paths (aligned and not), with several dtypes or fp64, with coefficients from a table, with
        # the counts beside an update without a gate, and with the sums of three classes.
        found["maxnreg"] = 255
    return found
