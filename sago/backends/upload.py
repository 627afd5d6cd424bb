"""Copies small tables from the host to a device. The host does not wait for the copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sago.backends.streams import is_capturing

# Pinned host memory that a CUDA graph copies from at every replay. Each distinct content is kept once. It is
# never freed, because the library does not learn when a graph is deleted.
_captured: dict[tuple[object, ...], Tensor] = {}


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`, also in the capture of a CUDA graph."""
    table = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return table.to(device)
    # A copy from pageable memory synchronises, and is an error while a CUDA graph is captured.
    if is_capturing([device]):
        key = dtype, *table.shape, *table.flatten().tolist()
        if key not in _captured:
            _captured[key] = table.pin_memory()
        table = _captured[key]
    else:
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
