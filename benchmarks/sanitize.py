"""Launches both kernels a few times for compute-sanitizer, and compares the updates with `sago.reference`.

The lists have unaligned tensors, missing gradients, tails and tensors of several chunks.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

import sago
from benchmarks.gradients import WrongResult
from sago import reference

SIZES = (1, 7, 4096, 5003, 32768 + 5)


def run(device: str = "cuda", sizes: tuple[int, ...] = SIZES) -> int:
    """Returns the number of syntheses. Raises `WrongResult` if an update is not that of the reference."""
    cases = list(product((torch.bfloat16, torch.float32), (0, 1), ("sago", "pcgrad", "blur"), (True, False)))
    for dtype, offset, rule, stats in cases:
        # In elements: an offset of 1 is not a multiple of 16 bytes.
        forget, retain = (_tensors(sizes, dtype, offset, seed) for seed in (0, 1))
        _compare([forget[0], None, *forget[2:]], retain, rule, stats, device)
    return len(cases)


def _compare(forget: list[Tensor | None], retain: list[Tensor], rule: str, stats: bool, device: str) -> None:
    expected, _ = reference.synthesize(forget, retain, rule, gamma=0.75, alpha=1.25)
    placed = [[_place(t, device) for t in side] for side in (forget, retain)]
    backend = "triton" if device == "cuda" else None
    sago.synthesize_(*placed, rule, gamma=0.75, alpha=1.25, stats=stats, backend=backend)
    step = 2 * torch.finfo(retain[0].dtype).eps  # a coefficient may differ in its last bits
    for u, e in zip(placed[1], expected, strict=True):
        if u is None or not torch.allclose(u.cpu().float(), e.float(), rtol=step, atol=step):
            raise WrongResult(f"{rule} of {tuple(e.shape)} {e.dtype} is not that of sago.reference.")


def _tensors(sizes: tuple[int, ...], dtype: torch.dtype, offset: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + offset, generator=generator).to(dtype)[offset:] for n in sizes]


def _place(t: Tensor | None, device: str) -> Tensor | None:
    """Returns a copy with the same offset from a multiple of 16 bytes."""
    if t is None:
        return None
    offset = t.storage_offset()
    return torch.empty(offset + t.numel(), dtype=t.dtype, device=device)[offset:].copy_(t)
