"""What a call was given, checked and put in order before anything is written."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago import shards
from sago.overlap import check_overlap
from sago.rules import Rule, resolve
from sago.shards import Shards

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("triton", "compiled", "reference")

NEW = object()  # for `out`: new tensors like retain

Gradients = Tensor | Iterable[Tensor | None]
Weight = float | Tensor


ReduceGram = Callable[[Tensor], Tensor | None]


@dataclass
class Pairs:
    """Gradient pairs, checked.

    Attributes:
        forget, retain, out: Local tensors; None for a zero gradient; out is None where both are.
        updates: `out` as the caller knows it, DTensors whole.
        rows: The report row of each pair.
        keys: The group a row stands for.
        backends: For each device in the list, the backend that runs there.
        shards: What other ranks hold; None where they are of no concern, or a `reduce_gram` takes care of it.
    """

    forget: list[Tensor | None]
    retain: list[Tensor | None]
    out: list[Tensor | None]
    updates: list[Tensor | None]
    rows: list[int]
    keys: list[Hashable]
    backends: dict[torch.device, str]
    shards: Shards | None = None

    def numel(self, everywhere: bool = True) -> list[int]:
        """Elements of each row, on all ranks or as this one counts them."""
        found = [0] * len(self.keys)
        for i, (row, o) in enumerate(zip(self.rows, self.out, strict=True)):
            if o is not None:
                s = self.shards
                here = o.numel() if s is None or s.counted[i] else 0
                found[row] += s.numel[i] if everywhere and s is not None else here
        return found


class Call(NamedTuple):
    """What is asked of a synthesis besides its gradients, checked.

    Attributes:
        gamma, alpha: Floats, or 0-d fp64 tensors on the gradients' device.
        max_norm: What the norm of the update is clipped to; None for no clipping.
        nonfinite: What NaN and inf in a gradient do to the update: what the rule makes of them (None), NaN
            where either gradient has them ("propagate"), or no update anywhere ("zero_update").
        scales: What forget and retain are multiplied by ahead of everything else.
    """

    rule: Rule
    gamma: Weight
    alpha: Weight
    eps: float
    stats: bool
    reduce_gram: Callable[[Tensor], Tensor] | None
    max_norm: float | None = None
    nonfinite: str | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def sums(self) -> int:
        """How many sums of the gradients are wanted, as in `sago.kernels.gram`; 0 for none."""
        if self.stats or self.limited:
            return 9 if self.rule.gated else 6
        return 0 if self.rule.scope == "element" else 3

    @property
    def limited(self) -> bool:
        """Whether sums decide on the size of the update."""
        return self.max_norm is not None or self.nonfinite == "zero_update"


def check_pairs(
    forget: Gradients,
    retain: Gradients,
    rule: Rule,
    out: Any,
    groups: Sequence[Hashable] | None,
    reduce_gram: ReduceGram | None,
    backend: str | None,
) -> Pairs:
    """Raises ValueError or TypeError for gradients that cannot be right. `out` may be `NEW`."""
    check_backend(backend)
    forget, retain = as_list("forget", forget), as_list("retain", retain)
    if len(forget) != len(retain):
        raise ValueError(
            "Parameters `forget` and `retain` should have the same length. "
            f"Found {len(forget)} and {len(retain)}."
        )
    if not forget:
        raise ValueError("Parameters `forget` and `retain` should hold at least one gradient. Found none.")
    rows, keys = check_groups(groups, len(forget), rule)
    allocate = out is NEW
    out = [None] * len(forget) if allocate else _out(out, forget, retain)
    for i, tensors in enumerate(zip(forget, retain, out, strict=True)):
        _check_pair(i, *tensors)
    if allocate:
        like = (f if r is None else r for f, r in zip(forget, retain, strict=True))
        out = [None if t is None else torch.empty_like(t, requires_grad=False) for t in like]
    parts = [forget, retain, out]
    spread = None
    if any(shards.is_dtensor(t) for side in parts for t in side):
        for i, tensors in enumerate(zip(forget, retain, out, strict=True)):
            shards.check_placed(i, tensors)
        if reduce_gram is None:
            spread = shards.read(out, rows)
        parts = [[shards.local(t) for t in side] for side in parts]
    for name, side in zip(("forget", "retain", "out"), parts, strict=True):
        for i, t in enumerate(side):
            if t is not None and not holds_data(t):
                raise TypeError(f"Parameter `{name}[{i}]` should hold data. Found {type(t).__name__}.")
    check_overlap(*parts)
    devices = dict.fromkeys(t.device for t in parts[2] if t is not None) or {torch.device("cpu"): None}
    return Pairs(
        forget=parts[0],
        retain=parts[1],
        out=parts[2],
        updates=out,
        rows=rows,
        keys=keys,
        backends={device: choose_backend(backend, device) for device in devices},
        shards=spread,
    )


def check_call(
    rule: str | Rule,
    gamma: Weight,
    alpha: Weight,
    eps: float,
    stats: bool,
    reduce_gram: ReduceGram | None,
    devices: Collection[torch.device],
    max_norm: float | None = None,
    nonfinite: str | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Call:
    if reduce_gram is not None and not callable(reduce_gram):
        raise TypeError(f"Parameter `reduce_gram` should be a callable. Found {type(reduce_gram).__name__}.")
    if nonfinite not in (None, "propagate", "zero_update"):
        raise ValueError(
            f"Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found {nonfinite!r}."
        )
    return Call(
        rule=resolve(rule),
        gamma=check_weight("gamma", gamma, devices),
        alpha=check_weight("alpha", alpha, devices),
        eps=non_negative("eps", eps),
        stats=stats,
        reduce_gram=None if reduce_gram is None else _checked(reduce_gram),
        max_norm=None if max_norm is None else non_negative("max_norm", max_norm, finite=False),
        nonfinite=nonfinite,
        scales=scales,
    )


def _checked(reduce_gram: ReduceGram) -> Callable[[Tensor], Tensor]:
    """`reduce_gram`, returning its table also where it works in place."""

    def reduce(table: Tensor) -> Tensor:
        reduced = reduce_gram(table)
        if reduced is None:
            return table
        if not isinstance(reduced, Tensor) or reduced.shape != table.shape:
            found = tuple(reduced.shape) if isinstance(reduced, Tensor) else type(reduced).__name__
            raise ValueError(
                f"Parameter `reduce_gram` should return None or a tensor of shape {tuple(table.shape)}. "
                f"Found {found}."
            )
        return reduced.to(table).contiguous()

    return reduce


def as_list(name: str, tensors: Gradients) -> list[Any]:
    if isinstance(tensors, Tensor):
        return [tensors]
    unordered = isinstance(tensors, (str, bytes, Mapping, Set)) or hasattr(tensors, "__array__")
    if unordered or not isinstance(tensors, Iterable):
        raise TypeError(
            f"Parameter `{name}` should be a tensor or a sequence of tensors. Found {type(tensors).__name__}."
        )
    return list(tensors)


def check_groups(
    groups: Sequence[Hashable] | None, length: int, rule: Rule
) -> tuple[list[int], list[Hashable]]:
    """The row of each tensor, and the group that each row stands for."""
    if groups is None:
        if rule.scope == "global":
            return [0] * length, ["all"]
        return list(range(length)), list(range(length))
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Sequence):
        raise TypeError(
            f"Parameter `groups` should be a sequence with one key a tensor. Found {type(groups).__name__}."
        )
    groups = list(groups)
    if len(groups) != length:
        raise ValueError(f"Parameter `groups` should have one key a tensor, {length}. Found {len(groups)}.")
    index: dict[Hashable, int] = {}
    for i, group in enumerate(groups):
        try:
            index.setdefault(group, len(index))
        except TypeError as error:
            raise TypeError(f"Parameter `groups[{i}]` should be hashable. Found {group!r}.") from error
    return [index[group] for group in groups], list(index)


def _out(out: Gradients | str | None, forget: list[Any], retain: list[Any]) -> list[Any]:
    if out is None or (isinstance(out, str) and out == "forget"):
        name, written = ("retain", retain) if out is None else ("forget", forget)
        for i, (f, r, o) in enumerate(zip(forget, retain, written, strict=True)):
            if o is None and f is not r:
                raise ValueError(
                    f"Parameter `{name}[{i}]` should be a tensor, because the update is written there. "
                    "Found None. Pass a tensor for it in `out=`, or use sago.synthesize."
                )
        return list(written)
    if isinstance(out, str):
        raise ValueError(f"Parameter `out` should be None, 'forget' or a sequence of tensors. Found {out!r}.")
    out = as_list("out", out)
    if len(out) != len(forget):
        raise ValueError(
            f"Parameter `out` should have one tensor a gradient, {len(forget)}. Found {len(out)}."
        )
    for i, (f, r, o) in enumerate(zip(forget, retain, out, strict=True)):
        if o is None and f is not r:
            raise ValueError(
                f"Parameter `out[{i}]` should be a tensor, because the update is written there. Found None."
            )
        if f is None and r is None:
            out[i] = None
    return out


def _check_pair(i: int, f: Any, r: Any, o: Any) -> None:
    first: Any = None
    for name, t in (("forget", f), ("retain", r), ("out", o)):
        if t is None or t is first or (name == "out" and t is r):
            continue
        _check_tensor(name, i, t)
        if first is None:
            first_name, first = name, t
        if t.shape != first.shape:
            raise ValueError(
                f"Parameters `{first_name}[{i}]` and `{name}[{i}]` should have the same shape. "
                f"Found {tuple(first.shape)} and {tuple(t.shape)}."
            )
        if t.device != first.device:
            raise ValueError(
                f"Parameters `{first_name}[{i}]` and `{name}[{i}]` should be on the same device. "
                f"Found {first.device} and {t.device}."
            )


def _check_tensor(name: str, i: int, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"Parameter `{name}[{i}]` should be a tensor or None. Found {type(t).__name__}.")
    if t.layout != torch.strided:
        raise TypeError(f"Parameter `{name}[{i}]` should be a dense tensor. Found layout {t.layout}.")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"Parameter `{name}[{i}]` should be bfloat16, float16, float32 or float64. Found {t.dtype}."
        )
    if t.is_meta:
        raise ValueError(f"Parameter `{name}[{i}]` should hold data. Found a meta tensor.")


def holds_data(t: Tensor) -> bool:
    try:
        return t.numel() == 0 or t.data_ptr() != 0
    except RuntimeError:  # tensors that are traced, faked or batched by a transform
        return False


def non_negative(name: str, value: Any, finite: bool = True) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"Parameter `{name}` should be a number. Found {type(value).__name__}.")
    number = float(value)
    if math.isnan(number) or number < 0.0 or (finite and number == math.inf):
        raise ValueError(
            f"Parameter `{name}` should be {'finite and ' if finite else ''}not negative. Found {value}."
        )
    return number


def check_weight(name: str, weight: Any, devices: Collection[torch.device]) -> Weight:
    if type(weight) is float:
        return weight
    if isinstance(weight, Tensor):
        if weight.ndim != 0:
            raise ValueError(
                f"Parameter `{name}` should be a float or a 0-d tensor. Found shape {tuple(weight.shape)}."
            )
        if weight.is_complex() or weight.dtype == torch.bool or weight.is_meta:
            raise TypeError(
                f"Parameter `{name}` should be a real number. Found {weight.dtype} on {weight.device}."
            )
        if devices and weight.device.type != "cpu" and weight.device not in devices:
            raise ValueError(
                f"Parameter `{name}` should be on a device of the gradients, {', '.join(map(str, devices))}. "
                f"Found {weight.device}."
            )
        # Gradients on a GPU need not wait for a weight on the CPU.
        if weight.device.type == "cpu" and all(device.type != "cpu" for device in devices):
            return float(weight)
        return weight.detach().resolve_neg().to(torch.float64)
    if not isinstance(weight, Real):
        raise TypeError(
            f"Parameter `{name}` should be a float or a 0-d tensor. Found {type(weight).__name__}."
        )
    return float(weight)


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"Parameter `backend` should be None or one of {', '.join(BACKENDS)}. Found {backend!r}."
        )


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend that runs on `device`. Raises where the one asked for cannot."""
    if backend is None:
        if device.type == "cpu":
            return "compiled"
        if device.type == "cuda" and triton_version():
            return "triton"
        _warn_without_triton(device)
        return "reference"
    if backend == "triton":
        if not triton_version():
            raise ValueError("Backend 'triton' should have Triton 3.4 or newer installed. Found none.")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "Backend 'triton' should be given tensors on a GPU. Found tensors on the CPU, where only "
                "Triton's interpreter runs (TRITON_INTERPRET=1)."
            )
    if backend == "compiled" and device.type != "cpu":
        raise ValueError(f"Backend 'compiled' should be given tensors on the CPU. Found tensors on {device}.")
    return backend


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The version of the Triton that the kernels can use; None if there is none or it is too old."""
    try:
        version: str = import_module("triton").__version__
    except ImportError:
        return None
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) >= (3, 4) else None


@lru_cache(maxsize=1)
def _warn_without_triton(device: torch.device) -> None:
    warnings.warn(
        f"sago: no Triton 3.4 or newer for gradients on {device}; the slow plain torch reference runs.",
        RuntimeWarning,
        stacklevel=2,
    )
