"""Gradients that FSDP2 holds back: not yet reduced, and so not under `p.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def check_synced(modules: Sequence[torch.nn.Module]) -> None:
    """Raises where a gradient was not reduced, or would not be by the next backward."""
    for group in _groups(modules):
        off = not (group.reduce_grads and group.all_reduce_grads)
        if off or any(getattr(holder, name, None) is not None for holder, name in _held_back(group)):
            found = "it switched off" if off else "gradients of an earlier backward that were not reduced"
            raise ValueError(
                "FSDP should reduce gradients in every backward, because those that it holds back mix the "
                f"two sides later. Found {found}. Call set_requires_gradient_sync(True) on the model before "
                "the backward; accelerate does with GradientAccumulationPlugin(sync_each_batch=True)."
            )


def sharded_parameters(modules: Sequence[torch.nn.Module]) -> dict[int, Any]:
    """The parameters by the `id` of those that stand in their place between forward and backward."""
    return {
        id(p._unsharded_param): p.sharded_param
        for group in _groups(modules)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def discard(modules: Sequence[torch.nn.Module]) -> None:
    """Drops gradients that were not reduced."""
    for group in _groups(modules):
        for holder, name in _held_back(group):
            setattr(holder, name, None)


def _held_back(group: Any) -> Iterator[tuple[Any, str]]:
    """Where gradients wait."""
    yield group, "_partial_reduce_output"  # for the all-reduce of HSDP
    for p in group.fsdp_params:
        yield p, "unsharded_accumulated_grad"
        if hasattr(p, "_unsharded_param"):
            yield p._unsharded_param, "grad"


def _groups(modules: Sequence[torch.nn.Module]) -> Iterator[Any]:
    for module in modules:
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups
        elif state._fsdp_param_group is not None:  # torch before 2.12
            yield state._fsdp_param_group
