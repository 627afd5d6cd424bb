"""Determines which inner products each coefficient of a rule reads, by running its function on CPU tensors.

The values of the coefficients are not enough: a comparison with NaN is false, which would hide that a
coefficient depends on the compared sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Names = frozenset[str]
# For each case `(gamma == 0, alpha == 0)`, the names that each coefficient reads.
Reads = dict[tuple[bool, bool], tuple[Names, ...]]

PRODUCTS = ("ff", "fr", "rr")
CASES = ((False, False), (False, True), (True, False), (True, True))
_ALL, _CONSTANT = frozenset(PRODUCTS), frozenset({"constant"})

# `_METADATA` has functions that use no values of their arguments. `_SIZES` has functions that use only the
# size of a tensor. The size of an argument of the rule does not depend on any value. `_LIKE` has functions
# that use only the size of their first argument.
_METADATA = {"dtype", "device", "layout", "ndim", "dim", "is_floating_point", "is_cuda", "requires_grad"}
_SIZES = {"shape", "size", "numel", "__len__"}
_LIKE = {
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}


def reads(coefficients: Callable[..., Any], classes: int = 0, kept: int = 0) -> Reads:
    """The names of the inner products that each returned number depends on.

    A coefficient reads all of them if this cannot be determined, for example after `.item()`. `classes` is
    the number of classes whose sums the function takes as a sixth argument. The products of a class count as
    those of all elements, and its number of elements is always finite. `kept` is the number of values of the
    last argument, which are always finite.
    """
    found: Reads = {}
    constants = None
    # The first run only collects the tensors that the function holds.
    for zero in (CASES[0], *CASES):
        numbers = [torch.ones(2, dtype=torch.float64, device="cpu") for _ in PRODUCTS]
        numbers += [torch.full((), 0.0 if z else 1.0, dtype=torch.float64, device="cpu") for z in zero]
        zeros = frozenset(name for name, z in zip(("gamma", "alpha"), zero, strict=True) if z)
        names = [*PRODUCTS, "gamma", "alpha"]
        of_classes = [torch.ones(2, dtype=torch.float64, device="cpu") for _ in range(4 * classes)]
        state = tuple(torch.ones(2, dtype=torch.float64, device="cpu") for _ in range(kept))
        more: list[Any] = (
            [[tuple(of_classes[k : k + 4]) for k in range(0, 4 * classes, 4)]] if classes else []
        )
        more += [state] if kept else []
        named = dict(zip(map(id, numbers), names, strict=True))
        named.update(zip(map(id, of_classes), ("constant", *PRODUCTS) * classes, strict=True))
        named.update(dict.fromkeys(map(id, state), "constant"))
        tracker = _Tracker([*numbers, *of_classes, *state], named, zeros, constants)
        with tracker:
            values = coefficients(*numbers, *more)
        found[zero] = tuple(tracker.names(v) & _ALL for v in values)
        if tracker.unknown:
            return dict.fromkeys(CASES, (_ALL,) * len(values))
        if constants is None:
            constants = tracker.strangers
    return found


class _Tracker(TorchFunctionMode):
    """Keeps the names of the arguments that each tensor was computed from.

    Attributes:
        unknown: Whether a value became a Python number, so that any coefficient may depend on it.
        strangers: Tensors that no tracked function returned.
    """

    def __init__(
        self,
        numbers: Sequence[Tensor],
        named: dict[int, str],
        zeros: Names,
        constants: Sequence[Tensor] | None,
    ) -> None:
        super().__init__()
        self.unknown = False
        self.strangers: list[Tensor] = []
        self._zeros, self._constants = zeros, constants
        self._arguments = {id(t) for t in numbers}
        # The tensors are kept alive, so that each identity stays unique.
        self._known = {id(t): (t, frozenset({named[id(t)]})) for t in numbers}

    def names(self, value: Any) -> Names:
        """The names of the arguments from which the tensors in `value` were computed."""
        return frozenset().union(*(self._of(t) for t in _tensors(value)))

    def _of(self, t: Tensor) -> Names:
        if id(t) not in self._known:
            self.strangers.append(t)
            # A tensor that the function holds is the same one in each run. The origin of others is unknown.
            constant = self._constants is None or any(t is other for other in self._constants)
            self._known[id(t)] = t, _CONSTANT if constant else _ALL
        return self._known[id(t)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = self._read(func, args, kwargs)
        found = func(*args, **kwargs)
        made = list(_tensors(found))
        if not made and names - self._zeros:
            self.unknown = True
        for t in made:
            known = self._known.get(id(t))
            if known is not None and names - known[1]:  # written in place, and views of it may exist
                self.unknown = True
            self._known[id(t)] = t, names
        return found

    def _read(self, func: Any, args: Any, kwargs: Any) -> Names:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # the getter of a property
            name = getattr(func.__self__, "__name__", "")
        if name in _METADATA or (name in _SIZES and id(args[0]) in self._arguments):
            return frozenset()
        if name in _LIKE and id(args[0]) in self._arguments:
            return self.names((args[1:], kwargs))
        if func is torch.where and len(args) == 3:
            condition, *branches = args
            of_condition = self.names(condition)
            if of_condition and of_condition <= self._zeros:  # only weights that are 0 decide here
                taken = [
                    x
                    for x, flag in zip(branches, (condition.any(), not condition.all()), strict=True)
                    if flag
                ]
                return of_condition | self.names(taken)
        return self.names((args, kwargs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
