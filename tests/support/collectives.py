"""Records the collectives that a block of code calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """The collectives that are called inside the block, in order.

    Attributes:
        found: The name of each and the elements that it is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            given = [args[0]] if isinstance(args[0], Tensor) else args[0]
            numel = sum(t.numel() for t in given if isinstance(t, Tensor))
            self.found.append((op.name().split("::")[1].rstrip("_"), numel))
        return op(*args, **(kwargs or {}))


def all_reduces(found: list[tuple[str, int]]) -> list[int]:
    """The number of elements of each collective. Asserts that all are all-reduces."""
    assert {name for name, _ in found} <= {"allreduce", "all_reduce"}, found
    return [numel for _, numel in found]
