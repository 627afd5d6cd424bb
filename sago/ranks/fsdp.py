"""Parameters of FSDP2, and gradients that it has not reduced yet. Only this file uses its private names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sago.private import require

_GROUP = ("fsdp_params", "reduce_grads", "all_reduce_grads", "_partial_reduce_output")
_PARAM = ("sharded_param", "unsharded_accumulated_grad", "_unsharded_param")
_TESTED = "torch 2.6 to 2.14"


def check_known(modules: Sequence[torch.nn.Module]) -> None:
    """Raises RuntimeError if a private name that this file reads is missing."""
    for group in _groups(modules):
        require(group, _GROUP, "FSDP2", _TESTED)
        for p in group.fsdp_params:
            require(p, _PARAM, "FSDP2", _TESTED)


def check_synced(modules: Sequence[torch.nn.Module]) -> None:
    """Raises if a gradient was not reduced, or if the next backward would not reduce its gradients."""
    for group in _groups(modules):
        off = not (group.reduce_grads and group.all_reduce_grads)
        if off or any(getattr(owner, name) is not None for owner, name in _unreduced(group)):
            found = "that this is switched off" if off else "unreduced gradients of an earlier backward"
            raise ValueError(
                "FSDP should reduce gradients in every backward, because unreduced gradients would mix the "
                f"two sides later. Found {found}. Call set_requires_gradient_sync(True) on the model before "
                "the backward; accelerate does with GradientAccumulationPlugin(sync_each_batch=True)."
            )


def sharded_parameters(modules: Sequence[torch.nn.Module]) -> dict[int, Any]:
    """The sharded parameters, by the `id` of the unsharded ones that replace them during a forward."""
    return {
        id(p._unsharded_param): p.sharded_param
        for group in _groups(modules)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def reshard(module: torch.nn.Module) -> None:
    """Shards the parameters that a forward without a backward has left unsharded."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def discard(modules: Sequence[torch.nn.Module]) -> None:
    """Drops gradients that were not reduced."""
    for group in _groups(modules):
        for owner, name in _unreduced(group):
            setattr(owner, name, None)


def _unreduced(group: Any) -> Iterator[tuple[Any, str]]:
    """Yields the (object, attribute) pairs that hold unreduced gradients."""
    yield group, "_partial_reduce_output"  # waits for the all-reduce of HSDP
    for p in group.fsdp_params:
        yield p, "unsharded_accumulated_grad"
        if hasattr(p, "_unsharded_param"):  # exists after the first forward
            yield p._unsharded_param, "grad"


def _groups(modules: Sequence[torch.nn.Module]) -> Iterator[Any]:
    for module in modules:
        require(module, ["_get_fsdp_state"], "FSDP2", _TESTED)
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups
        else:  # torch before 2.12
            require(state, ["_fsdp_param_group"], "FSDP2", _TESTED)
            if state._fsdp_param_group is not None:
                yield state._fsdp_param_group
