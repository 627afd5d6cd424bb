"""Numbers for random gates, from a hash of a seed, a step and the position of an element in the list.

The same element has the same number on every backend, rank and shard. The kernels have a copy of this code,
and the tests compare the two bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # the lower 32 bits


def mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers in which every input bit changes about half of the output bits.

    Source: the constants are those of the hash prospector, github.com/skeeto/hash-prospector (issue 19).
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def uniform(draw: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each position, a multiple of 2^-24, in fp32.

    Args:
        draw: int64 `[2]`: the seed and the step.
        positions: int64, of any shape.
    """
    key = torch.zeros((), dtype=torch.int64, device=draw.device)
    for x in draw.unbind():
        key = mix(mix(key ^ (x & _LOW)) ^ ((x >> 32) & _LOW))
    first = mix(key ^ ((positions >> 32) & _LOW))
    second = mix(first ^ 0x9E3779B9)
    hashed = mix((mix(first ^ (positions & _LOW)) + second) & _LOW)
    return (hashed >> 8).to(torch.float32) * 2.0**-24


class Drawn:
    """The random gate of one pair as a function of `(f, r)`, which is called on its elements in order.

    Args:
        gate: A function of `(f, r, u)`.
        draw: The seed and the step.
        start: The position of the first element.
    """

    def __init__(self, gate: Callable[..., Any], draw: Tensor, start: int) -> None:
        self._gate, self._draw, self.at = gate, draw, start

    def __call__(self, f: Tensor, r: Tensor) -> Any:
        numbers = torch.arange(self.at, self.at + f.numel(), device=f.device)
        self.at += f.numel()
        dense = f.numel() and _is_dense(f) and f.stride() == r.stride()
        positions = numbers.as_strided(f.shape, f.stride()) if dense else numbers.view(f.shape)
        return self._gate(f, r, uniform(self._draw.to(f.device), positions).to(f.dtype))


def _is_dense(t: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order of dimensions. Positions follow that order."""
    return torch.empty_like(t, device="meta").stride() == t.stride()


def of_pair(gate: Any, draw: Tensor | None, origins: Sequence[int], i: int) -> Any:
    """The gate of pair `i` of a list as a function of `(f, r)`. `draw` is None if it is not random."""
    return gate if draw is None or gate is None else Drawn(gate, draw, origins[i])
