"""Small tables from the host to a device, without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sago.cache import is_capturing

_captured: list[Tensor] = []  # host memory that copies in CUDA graphs read at every replay


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`, also in the capture of a CUDA graph."""
    table = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return table.to(device)
    # A copy from pageable memory synchronises, and is an error while a CUDA graph is captured.
    table = table.pin_memory()
    if is_capturing([device]):
        _captured.append(table)
    return table.to(device, non_blocking=True)
