"""Selects the parameters that are captured, with their names and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.core.checks import check_keys, check_kind, holds_data
from sago.ranks import dtensor


class Parameters(NamedTuple):
    """The trainable parameters in the order given, each once.

    Attributes:
        tensors, names, keys: The parameters that require grad, with their names and the keys of their groups.
        frozen: The names and tensors of the other parameters.
        module: The module that holds them, if it is known.
    """

    tensors: list[Any]
    names: list[str]
    keys: list[Hashable]
    frozen: list[tuple[str, Any]]
    module: torch.nn.Module | None


def choose(
    source: Any, groups: Sequence[Hashable] | None, wanted: Callable[[Tensor], bool] | None = None
) -> Parameters:
    """The parameters of a module or an iterable, with the keys in `groups` or else their names."""
    keys, names, given = _listed(source)
    if groups is not None:
        instead = "Write `[key(name) for name, _ in model.named_parameters()]`."
        check_keys(groups, len(given), "parameter in `params`, frozen ones included", instead)
        keys = list(groups)
    first = {id(p): i for i, p in reversed(list(enumerate(given)))}
    kept = [i for i, p in enumerate(given) if first[id(p)] == i and p.requires_grad]
    if wanted is not None:
        kept = [i for i in kept if wanted(given[i])]
    if not kept:
        raise ValueError("Parameter `params` should hold a tensor that requires grad. Found none.")
    for i in kept:
        _check(names[i], given[i])
    return Parameters(
        [given[i] for i in kept],
        [names[i] for i in kept],
        [keys[i] for i in kept],
        [(name, p) for name, p in zip(names, given, strict=True) if not p.requires_grad],
        source if isinstance(source, torch.nn.Module) else None,
    )


def _listed(params: Any) -> tuple[list[Hashable], list[str], list[Any]]:
    """Group keys, names for messages, and tensors."""
    if isinstance(params, torch.nn.Module):
        params = params.named_parameters()
    if isinstance(params, (Tensor, str, Mapping)) or not isinstance(params, Iterable):
        instead = " Pass its `items()`." if isinstance(params, Mapping) else ""
        raise TypeError(
            "Parameter `params` should be a module or an iterable of parameters or of (name, parameter). "
            f"Found {type(params).__name__}.{instead}"
        )
    found = list(params)
    if found and all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in found):
        names, tensors = [name for name, _ in found], [p for _, p in found]
        # Names may repeat: RMU's list has a `down_proj.weight` for each layer. Each one is a group.
        count = Counter(names)
        keys: list[Hashable] = [f"{n} ({i})" if count[n] > 1 else n for i, n in enumerate(names)]
    else:
        names, tensors, keys = [f"params[{i}]" for i in range(len(found))], found, list(range(len(found)))
    for name, p in zip(names, tensors, strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(f"Parameter `{name}` should be a tensor. Found {type(p).__name__}.")
    return keys, names, tensors


def _check(name: str, p: Tensor) -> None:
    if not p.is_leaf:
        raise ValueError(
            f"Parameter `{name}` should be a leaf of the graph. Found the result of {p.grad_fn}."
        )
    check_kind(name, p)
    if dtensor.is_dtensor(p):
        dtensor.check_reduced(f"Parameter `{name}`", p)
        p = dtensor.local(p.detach())
    if not holds_data(p):
        raise TypeError(
            f"Parameter `{name}` should be a plain tensor or a DTensor of one. Found {type(p).__name__}, "
            "which wraps other tensors and holds no data of its own: freeze it with requires_grad_(False)."
        )
