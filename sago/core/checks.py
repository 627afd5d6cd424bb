"""Checks of the arguments of a call, which run before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from sago.backends.choose import check_backend, choose_backend
from sago.backends.upload import upload
from sago.core.overlap import check_overlap
from sago.core.pairs import Call, Pairs, Placement, Weight
from sago.rules import Rule, resolve

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

NONFINITE = ("propagate", "zero_update")

NEW = object()  # for `out`: new tensors like retain

Gradients = Tensor | Iterable[Tensor | None]
ReduceGram = Callable[[Tensor], Tensor | None]


def check_pairs(
    forget: Gradients,
    retain: Gradients,
    rule: Rule,
    out: Any,
    groups: Sequence[Hashable] | None,
    reduce_gram: ReduceGram | None,
    backend: str | None,
    placement: Placement,
) -> Pairs:
    """Checks the gradients of a call, and raises ValueError or TypeError if they are invalid. `out` may be
    `NEW`."""
    check_backend(backend)
    _check_reduction(reduce_gram)
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
    out = [None] * len(forget) if allocate else check_outputs(out, forget, retain)
    for i, tensors in enumerate(zip(forget, retain, out, strict=True)):
        check_pair(i, *tensors)
    for name, side in (("forget", forget), ("retain", retain), ("out", out)):
        for i, t in enumerate(side):
            if t is not None and not holds_data(placement.local(t)):
                raise TypeError(
                    f"Parameter `{name}[{i}]` should hold data. Found {type(t).__name__}, which has no "
                    "memory of its own. Pass plain tensors or DTensors."
                )
    if allocate:
        like = (f if r is None else r for f, r in zip(forget, retain, strict=True))
        out = [None if t is None else torch.empty_like(t, requires_grad=False) for t in like]
    sides = [forget, retain, out]
    spread = None
    if any(placement.is_dtensor(t) for side in sides for t in side):
        for i, tensors in enumerate(zip(forget, retain, out, strict=True)):
            placement.check_placed(i, tensors)
        if reduce_gram is None:
            spread = placement.read(out, rows)
        sides = [[placement.local(t) for t in side] for side in sides]
    for i, t in enumerate(sides[2]):
        if t is not None and t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"The output for gradient {i} should not be a tensor of inference mode, which cannot be "
                "written outside of it. Found one. Clone the tensor, or call inside torch.inference_mode()."
            )
    check_overlap(*sides)
    devices = dict.fromkeys(t.device for t in sides[2] if t is not None) or {torch.device("cpu"): None}
    return Pairs(
        forget=sides[0],
        retain=sides[1],
        out=sides[2],
        updates=out,
        rows=rows,
        keys=keys,
        backends={device: choose_backend(backend, device) for device in devices},
        spread=spread,
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
    state: Tensor | None = None,
    draw: Tensor | None = None,
    retain_floor: float = 0.0,
) -> Call:
    _check_reduction(reduce_gram)
    check_bool("stats", stats)
    if nonfinite not in (None, *NONFINITE):
        raise ValueError(
            f"Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found {nonfinite!r}."
        )
    found = rule if isinstance(rule, Rule) else resolve(rule)
    if found.state and state is None:
        raise ValueError(
            "Parameter `rule` should keep no numbers from step to step, because nothing holds them between "
            f"two calls. Found {found.name!r}. Use `synthesize_` of sago.GradientBuckets, which holds them."
        )
    if found.seed is not None and reduce_gram is not None:
        raise ValueError(
            "Parameter `reduce_gram` should be None for a rule with a random gate, which needs the positions "
            f"of the elements in the whole list. Found {found.name!r}. Pass DTensors, or use another rule."
        )
    if found.seed is not None and draw is None:
        device = next(iter(devices), torch.device("cpu"))
        draw = upload([found.seed, 0], torch.int64, device)
    if not found.by_sign and scales[0] != scales[1]:
        raise ValueError(
            "Parameter `rule` should have a gate that only reads signs where the accumulators are divided by "
            f"{1 / scales[0]:g} (forget) and {1 / scales[1]:g} (retain), because its gate reads the "
            f"accumulators. Found {found.name!r}. Capture both sides equally often and without "
            "`retain_decay`, or use accumulation='sum' and divide the losses."
        )
    return Call(
        rule=found,
        gamma=check_weight("gamma", gamma, devices),
        alpha=check_weight("alpha", alpha, devices),
        eps=non_negative("eps", eps),
        stats=stats,
        reduce_gram=None if reduce_gram is None else _checked(reduce_gram),
        max_norm=None if max_norm is None else non_negative("max_norm", max_norm, finite=False),
        nonfinite=nonfinite,
        scales=scales,
        state=state,
        draw=draw,
        retain_floor=check_floor(found, retain_floor) if retain_floor != 0.0 else 0.0,
    )


def check_floor(rule: Rule, retain_floor: float) -> float:
    floor = non_negative("retain_floor", retain_floor)
    if floor and rule.classes == 1:
        raise ValueError(
            "Parameter `retain_floor` should be 0 for a rule without a gate, because it changes which "
            f"elements conflict. Found {retain_floor} with {rule.name!r}. Use a rule with a gate, for "
            "example 'sago'."
        )
    if floor and not _keeps_forget(rule):
        raise ValueError(
            "Parameter `retain_floor` should be 0 for a rule that leaves the forget gradient out where the "
            "retain gradient is 0, because it would then leave out all elements of the dead zone. Found "
            f"{retain_floor} with {rule.name!r}. Use another rule with a gate, for example 'sago'."
        )
    return floor


@lru_cache(maxsize=256)
def _keeps_forget(rule: Rule) -> bool:
    """Whether the forget gradient has a coefficient that is not 0 in the classes of elements with `r = 0`."""
    f = torch.tensor([1.0, -1.0], device="cpu")
    drawn = [] if rule.seed is None else [torch.full_like(f, 0.5)]
    classes = (
        {1} if rule.gate is None else {int(k) for k in rule.gate(f, torch.zeros_like(f), *drawn).tolist()}
    )
    ones = torch.ones(1, dtype=torch.float64, device="cpu")
    more: list[Any] = [[(ones,) * 4] * rule.classes] if rule.by_class else []
    more += [(ones,) * len(rule.state)] if rule.state else []
    values = rule.coefficients(ones, ones, ones, ones[0], ones[0], *more)
    return all(float(values[2 * k]) != 0.0 for k in classes)


def _check_reduction(reduce_gram: Any) -> None:
    if reduce_gram is not None and not callable(reduce_gram):
        raise TypeError(f"Parameter `reduce_gram` should be a callable. Found {type(reduce_gram).__name__}.")


def _checked(reduce_gram: ReduceGram) -> Callable[[Tensor], Tensor]:
    """Wraps `reduce_gram` so that it returns the table even if it works in place."""

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
        if reduced.dtype != table.dtype:
            raise ValueError(
                f"Parameter `reduce_gram` should return {table.dtype}, because coefficients and counts need "
                f"its precision. Found {reduced.dtype}."
            )
        return reduced.to(table.device).contiguous()

    return reduce


def as_list(name: str, tensors: Gradients) -> list[Any]:
    if isinstance(tensors, Tensor):
        return [tensors]
    unordered = isinstance(tensors, (str, bytes, Mapping, Set)) or hasattr(tensors, "__array__")
    if unordered or not isinstance(tensors, Iterable):
        instead = " Pass its values as a list." if isinstance(tensors, Mapping) else ""
        instead = " Convert it with torch.from_numpy." if hasattr(tensors, "__array__") else instead
        raise TypeError(
            f"Parameter `{name}` should be a tensor or a sequence of tensors. Found {type(tensors).__name__}."
            f"{instead}"
        )
    return list(tensors)


def check_groups(
    groups: Sequence[Hashable] | None, length: int, rule: Rule
) -> tuple[list[int], list[Hashable]]:
    """The row of each tensor, and the key of each row."""
    if groups is None:
        if rule.scope == "global":
            return [0] * length, ["all"]
        return list(range(length)), list(range(length))
    return check_keys(groups, length, "tensor")


def check_keys(
    groups: Any, length: int, what: str, instead: str = "Pass a list."
) -> tuple[list[int], list[Hashable]]:
    """The row of each key, and the keys without repetition. `what` is the thing that has a key."""
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Sequence):
        raise TypeError(
            f"Parameter `groups` should be a sequence with a key for each {what}. "
            f"Found {type(groups).__name__}. {instead}"
        )
    groups = list(groups)
    if len(groups) != length:
        raise ValueError(
            f"Parameter `groups` should have {length} keys, one for each {what}. Found {len(groups)}."
        )
    index: dict[Hashable, int] = {}
    for i, group in enumerate(groups):
        try:
            index.setdefault(group, len(index))
        except TypeError as error:
            raise TypeError(f"Parameter `groups[{i}]` should be hashable. Found {group!r}.") from error
        if isinstance(group, Tensor) or group != group:
            raise TypeError(
                f"Parameter `groups[{i}]` should equal the other keys of its group. Found {group!r}, which "
                "equals itself at most. Use strings or integers, for example with `tolist()`."
            )
    return [index[group] for group in groups], list(index)


def check_outputs(out: Gradients | str | None, forget: list[Any], retain: list[Any]) -> list[Any]:
    """The output of each pair."""
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
            f"Parameter `out` should have {len(forget)} tensors, one for each gradient. Found {len(out)}."
        )
    for i, (f, r, o) in enumerate(zip(forget, retain, out, strict=True)):
        if o is None and f is not r:
            raise ValueError(
                f"Parameter `out[{i}]` should be a tensor, because the update is written there. "
                "Found None. Pass a tensor, or use sago.synthesize."
            )
        if f is None and r is None:
            out[i] = None
    return out


def check_pair(i: int, f: Any, r: Any, o: Any) -> None:
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
    check_kind(f"{name}[{i}]", t)


def check_kind(name: str, t: Tensor) -> None:
    """Raises unless the tensor is dense, floating-point and has memory."""
    if t.layout != torch.strided or t.is_nested:
        found = f"layout {t.layout}" if t.layout != torch.strided else "a nested tensor"
        raise TypeError(f"Parameter `{name}` should be dense. Found {found}.")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"Parameter `{name}` should be bfloat16, float16, float32 or float64. Found {t.dtype}."
        )
    if t.is_meta:
        raise ValueError(f"Parameter `{name}` should hold data. Found a meta tensor.")
    if not torch.compiler.is_compiling() and is_lazy(t):
        raise ValueError(
            f"Parameter `{name}` should hold data. Found {type(t).__name__}, which has no shape yet. Run a "
            "forward of the module first."
        )


def holds_data(t: Tensor) -> bool:
    try:
        # `data_ptr` of a FakeTensor warns before it fails. Its storage is on the device "meta".
        real = t.untyped_storage().device.type != "meta"
        return real and (t.numel() == 0 or t.data_ptr() != 0)
    except RuntimeError:  # tensors that are traced, faked or batched by a transform
        return False


def non_negative(name: str, value: Any, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Parameter `{name}` should be a number. Found {type(value).__name__}.")
    number = _as_float(name, value)
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
        plain = weight.layout == torch.strided and not weight.is_quantized
        real = plain and not weight.is_complex() and weight.dtype != torch.bool
        if not real or weight.is_meta or not (type(weight) is Tensor or holds_data(weight)):
            raise TypeError(
                f"Parameter `{name}` should be a real number in a dense tensor with memory. Found "
                f"{weight.dtype}, {weight.layout}, on {weight.device}."
            )
        if devices and weight.device.type != "cpu" and weight.device not in devices:
            raise ValueError(
                f"Parameter `{name}` should be on a device of the gradients, {', '.join(map(str, devices))}. "
                f"Found {weight.device}."
            )
        # A weight on the CPU is read at once, so that gradients on a GPU need not wait for it.
        if weight.device.type == "cpu" and all(device.type != "cpu" for device in devices):
            return float(weight)
        return weight.detach().resolve_neg().to(torch.float64)
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(
            f"Parameter `{name}` should be a float or a 0-d tensor. Found {type(weight).__name__}."
        )
    return _as_float(name, weight)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"Parameter `{name}` should be True or False. Found {value!r}.")


def check_accumulate_dtype(dtype: Any) -> None:
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"Parameter `accumulate_dtype` should be None, torch.float32 or torch.float64. Found {dtype!r}."
        )


def _as_float(name: str, number: Real) -> float:
    try:
        return float(number)
    except OverflowError as error:
        raise ValueError(
            f"Parameter `{name}` should be in the range of float. Found a larger {type(number).__name__}."
        ) from error
