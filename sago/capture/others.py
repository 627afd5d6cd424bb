"""Trainable parameters that were not given to the buckets. A capture must not reach them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from sago.capture.global_hooks import end_with
from sago.ranks import fsdp
from sago.ranks.dtensor import is_dtensor


class Others:
    """The parameters that were not given, but belong to a live module that also holds a given parameter.

    During a capture, the gradients of those that require grad are set to None. If a backward gives one of
    them a gradient, this is noticed and the gradient is dropped. The live modules are searched before the
    first capture, and again before a later one if a parameter, or a module with parameters, was registered
    meanwhile with a module that still exists.

    Args:
        params: The captured parameters.
        sharded: The FSDP2 modules that hold the parameters.

    Attributes:
        registrations: Numbers the registrations as long as this object lives.
    """

    def __init__(self, params: Sequence[Tensor], sharded: Sequence[torch.nn.Module]) -> None:
        self._params, self._sharded = params, sharded
        self._may_be_beside = any(isinstance(p, torch.nn.Parameter) for p in params)
        self.registrations = Registrations(self)
        self._searched_at = -1  # the number of the last registration before the last search
        self._named: list[tuple[str, Any]] = []
        self._aside: list[tuple[str, Any, Tensor | None]] = []

    def put_aside(self, captured: Sequence[Tensor]) -> None:
        """Begins a capture of these parameters."""
        _capturing[self] = {id(p) for p in captured}
        latest = self.registrations.latest()  # later ones are searched by the next capture
        if self._may_be_beside and self._searched_at < latest:
            self._named = _beside(self._params, self._sharded)
            self._searched_at = latest  # a search that was interrupted is repeated
        elsewhere = set().union(*_capturing.values())  # other buckets capture these right now
        for name, ref in self._named:
            p = ref()
            if p is not None and p.requires_grad and id(p) not in elsewhere:
                self._aside.append((name, p, p.grad))
                p.grad = None

    def put_back(self) -> str | None:
        """Ends the capture. Returns the name of the first parameter that was given a gradient inside it."""
        _capturing.pop(self, None)
        reached = None
        for name, p, grad in self._aside:
            if p.grad is not None and reached is None:
                reached = name
            p.grad = grad
        self._aside = []
        return reached


class Registrations:
    """Numbers the registrations of a parameter, or of a module with parameters, with any module.

    torch calls two hooks of this object for all modules of the process, as long as `owner` lives.
    """

    def __init__(self, owner: object) -> None:
        end_with(
            owner,
            register_module_parameter_registration_hook(self._add_parameter),
            register_module_module_registration_hook(self._add_module),
        )
        self._owner = weakref.ref(owner)
        self._count = 0
        # The last registration of each living module, by its id. A slice of a ModuleList is a new module,
        # which many models make and drop in each forward.
        self._of: dict[int, tuple[weakref.ref[torch.nn.Module], int]] = {}

    def latest(self) -> int:
        """The number of the last registration with a module that still exists. 0 if there is none."""
        # Garbage collection and other threads may change the dict meanwhile, so a copy is searched.
        return max((number for _, number in list(self._of.values())), default=0)

    # A compiled forward must not read the numbers, because it would be compiled again for each registration.

    def _add_parameter(self, module: torch.nn.Module, name: str, p: Any) -> None:
        if torch.compiler.is_compiling() or self._owner() is None:
            return
        # FSDP2 replaces a sharded parameter by its unsharded form and back. It registers them if the class of
        # the layer has its own `__setattr__`.
        before = module._parameters.get(name)
        if before is None or is_dtensor(before) == is_dtensor(p):
            self._add(module)

    def _add_module(self, module: torch.nn.Module, name: str, added: torch.nn.Module | None) -> None:
        if torch.compiler.is_compiling() or self._owner() is None:
            return
        if added is not None and _may_have_parameters(added):
            self._add(module)

    def _add(self, module: torch.nn.Module) -> None:
        self._count += 1
        key, known = id(module), self._of
        known[key] = weakref.ref(module, lambda _: known.pop(key, None)), self._count


def _may_have_parameters(module: torch.nn.Module) -> bool:
    try:
        return next(torch.nn.Module.named_parameters(module), None) is not None
    except AttributeError:  # the module's own __init__ has not run
        return True


# The ids of the parameters of open captures.
_capturing: weakref.WeakKeyDictionary[Others, set[int]] = weakref.WeakKeyDictionary()


def _beside(params: Sequence[Tensor], sharded: Sequence[torch.nn.Module]) -> list[tuple[str, Any]]:
    """The names of the other parameters, with weak references to them."""
    given = {id(p) for p in params}
    shard_of = fsdp.sharded_parameters(sharded)
    found: dict[int, tuple[str, Any]] = {}
    # A parameter does not know its modules, so all live modules are searched.
    for module in [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]:
        try:
            # The method of a subclass may do anything, so the method of the base class is called.
            named = torch.nn.Module.named_parameters(module)
            listed = [(name, shard_of.get(id(p), p)) for name, p in named]
        except AttributeError:  # the module's own __init__ has not run
            continue
        if any(id(p) in given for _, p in listed):
            for name, p in listed:
                known, _ = found.get(id(p), ("", None))
                # The longest name is that in the outermost module.
                if id(p) not in given and len(name) > len(known):
                    found[id(p)] = name, weakref.ref(p)
    return list(found.values())
