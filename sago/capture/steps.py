"""Notices optimizers that step before the gradients of a window are synthesized."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sago.capture.global_hooks import end_with
from sago.capture.side import Capture, Side
from sago.ranks.ddp import reduces_in_backward


class WatchedWindow(Protocol):
    """The attributes of a window that `StepWatch` reads."""

    params: Sequence[Tensor]
    forget: Side
    retain: Side
    lent: Tensor | None

    @property
    def current(self) -> Capture | None:
        """The innermost open capture."""

    @property
    def empty(self) -> bool:
        """Whether no gradient was captured and no update is published."""


class StepWatch:
    """A hook on every optimizer, from the first capture of a window to its end.

    If an optimizer steps on a captured parameter inside a capture, the hook raises, because `p.grad` is the
    gradient of one side. Between a capture and the synthesis, the hook warns once, because `p.grad` is None.

    Args:
        window: The window. Neither it nor its parameters are kept alive.
    """

    def __init__(self, window: WatchedWindow) -> None:
        self._window = weakref.ref(window)
        self._handle: RemovableHandle | None = None
        self._warned = False

    def start(self) -> None:
        window = self._window()
        if self._handle is None and window is not None:
            self._handle = register_optimizer_step_pre_hook(self._check)
            # The buckets may be dropped in the middle of a window.
            self._end = end_with(window, self._handle)

    def stop(self) -> None:
        if self._handle is not None:
            self._end.detach()
            self._handle.remove()
            self._handle = None

    def _check(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        window = self._window()
        if window is None:
            return
        params = [p for g in optimizer.param_groups for p in g["params"]]
        captured = {id(p) for p in window.params}
        params = [p for p in params if id(p) in captured]
        if not params:
            return
        if window.lent is not None:
            if any(p.grad is not None and p is not window.lent for p in params):
                raise ValueError(
                    "An optimizer that steps in `on_update` should hold no other captured parameter than the "
                    "one that it was called with. Found another with a gradient, which is not an update yet. "
                    "Make one optimizer for each parameter."
                )
            return
        capture = window.current
        if capture is not None:
            if not capture.alone or capture.side.fresh:
                name = capture.side.name
                raise ValueError(
                    f"optimizer.step() should come after synthesize_. Found one within {name}(), where "
                    f"`p.grad` is the {name} gradient alone."
                )
            return
        if self._warned or not (window.forget.captures or window.retain.captures):
            return
        self._warned = True
        warnings.warn(
            "optimizer.step() should come after synthesize_. Found one between a capture and synthesize_: "
            "`p.grad` of the captured parameters is None there, so that the step does not change them.",
            RuntimeWarning,
            stacklevel=3,  # this hook, torch's wrapper of step, and the caller of step
        )


_windows: weakref.WeakKeyDictionary[Any, weakref.WeakSet[WatchedWindow]] = weakref.WeakKeyDictionary()


def watch_reduction(window: WatchedWindow, modules: Iterable[Any]) -> None:
    """Warns if an optimizer steps with gradients of these DDP modules that nothing averaged.

    The buckets have switched the reduction of the modules off, and it stays off without the buckets. A
    backward outside of captures then leaves each rank with its own gradient.
    """
    for module in modules:
        if module not in _windows:
            _windows[module] = weakref.WeakSet()
            hook = partial(_check_reduced, weakref.ref(module), _windows[module])
            end_with(module, register_optimizer_step_pre_hook(hook))
        _windows[module].add(window)


def _check_reduced(
    module: weakref.ref[Any],
    windows: weakref.WeakSet[WatchedWindow],
    optimizer: torch.optim.Optimizer,
    *_: object,
) -> None:
    ddp = module()
    if ddp is None or reduces_in_backward(ddp) or not all(window.empty for window in windows):
        return
    own = {id(p) for p in ddp.parameters()}
    params = (p for group in optimizer.param_groups for p in group["params"])
    if any(p.grad is not None and id(p) in own for p in params):
        warnings.warn(
            "Gradients of DistributedDataParallel should be averaged over the ranks before optimizer.step(). "
            "Found gradients of a backward outside of captures. Only your own code can have averaged them, "
            "because GradientBuckets have switched DDP's own reduction off. Set `require_backward_grad_sync` "
            "of the DDP module to True before the forward of such a step, and to False for the next capture.",
            RuntimeWarning,
            stacklevel=3,  # this hook, torch's wrapper of step, and the caller of step
        )
