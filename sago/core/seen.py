"""Remembers lists of gradients, so that the same memory and metadata are not checked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago.backends.choose import BY_ADDRESS
from sago.backends.streams import Cache
from sago.core.checks import ReduceGram, check_pairs
from sago.core.guards import Guards
from sago.core.pairs import Placement
from sago.core.pipeline import Pipeline
from sago.rules import Rule

Updates = Sequence[Tensor | None]


class Seen(NamedTuple):
    """A pipeline, and guards of the metadata of its tensors."""

    pipeline: Pipeline
    guards: Guards


class Found(NamedTuple):
    """A pipeline for the lists of a call.

    Attributes:
        updates: The tensors that the updates are written to.
        lists: Forget, retain and out, if the pipeline has to be bound to them for the call.
    """

    pipeline: Pipeline
    updates: Updates
    lists: tuple[Updates, Updates, Updates] | None = None


_PLAIN = (list, tuple)
_KINDS = (Tensor, torch.nn.Parameter)  # other classes may have no memory
_seen = Cache(256)
# On the CPU, a list keeps about 2 KiB for each small tensor, and buffers of up to 1 MiB.
_seen_on_cpu, _long_on_cpu = Cache(16), Cache(2)
_LONG = 4096  # tensors of a long list


def find(
    forget: Any,
    retain: Any,
    rule: Rule,
    out: Any,
    groups: Any,
    reduce_gram: ReduceGram | None,
    backend: str | None,
    placement: Placement,
) -> Found:
    """The pipeline of a call of `sago.synthesize_`.

    A list that has the addresses and the metadata of an earlier one is not checked again. Equal addresses are
    not enough, because another tensor may have the same address later. No tensor is kept alive.
    """
    tensors, key = _key(forget, retain, rule, out, groups, backend)
    on_cpu = False
    if key is not None:
        devices = [tensors[0].device]
        on_cpu = devices[0].type == "cpu" and backend not in BY_ADDRESS
        cache = (_long_on_cpu if len(tensors) > _LONG else _seen_on_cpu) if on_cpu else _seen
        seen = cache.find(key, devices)
        # A `reduce_gram` that synthesizes the lists of its own call finds their pipeline in use.
        in_use = on_cpu and seen is not None and seen.pipeline.bound
        if seen is not None and not in_use and seen.guards.hold(tensors):
            updates = _written(forget, retain, out)
            lists = (_listed(forget), _listed(retain), updates) if on_cpu else None
            return Found(seen.pipeline, updates, lists)
    pairs = check_pairs(forget, retain, rule, out, groups, reduce_gram, backend, placement)
    pipeline = Pipeline(pairs, pairs.numel())
    plain = all(type(t) in _KINDS for t in tensors)
    if key is None or not plain or len(pipeline.devices) != 1 or not pipeline.release():
        return Found(pipeline, pairs.updates)
    cache.add(key, devices, Seen(pipeline, Guards(tensors)))
    return Found(pipeline, pairs.updates, (pairs.forget, pairs.retain, pairs.out) if on_cpu else None)


def _key(
    forget: Any, retain: Any, rule: Rule, out: Any, groups: Any, backend: str | None
) -> tuple[list[Any], Any]:
    """The tensors of a call and its key in the cache. The key is None if the call cannot be cached."""
    given = (forget, retain) if out is None or isinstance(out, str) else (forget, retain, out)
    sides = [[x] if isinstance(x, Tensor) else x for x in given]
    if not all(type(x) in _PLAIN for x in sides) or not (groups is None or type(groups) in _PLAIN):
        return [], None
    tensors = list(chain(*sides))
    first = None
    for side in sides:
        for t in side:  # up to the first tensor of the side
            if t is None:
                continue
            if type(t) not in _KINDS:
                return [], None
            first = t if first is None else first
            break
    if first is None:
        return [], None
    addresses = _addresses(tensors)
    missing: tuple[int, ...] = ()
    if addresses is None:
        missing = tuple(i for i, t in enumerate(tensors) if t is None)
        tensors = [t for t in tensors if t is not None]
        addresses = _addresses(tensors)
    where = out if isinstance(out, str) else None
    keys = None if groups is None else tuple(groups)
    # Keys of other types could keep memory alive, or define their own equality.
    if addresses is None or (keys and not {str, int}.issuperset(map(type, keys))):
        return [], None
    return tensors, (addresses, missing, *map(len, sides), where, rule.scope, keys, backend)


def _addresses(tensors: Iterable[Any]) -> tuple[int, ...] | None:
    """The addresses of the tensors. None if an item is not a tensor with an address."""
    try:
        return tuple(map(Tensor.data_ptr, tensors))
    except (TypeError, RuntimeError, ValueError):
        return None


def _written(forget: Any, retain: Any, out: Any) -> Updates:
    written = retain if out is None else forget if isinstance(out, str) else out
    return _listed(written)


def _listed(tensors: Any) -> Updates:
    return [tensors] if isinstance(tensors, Tensor) else tensors
