"""Hosts mount the accumulators, so that a backward adds to them. In plain torch they become `p.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from sago.capture.flat import clear
from sago.capture.fresh import FreshGradients
from sago.capture.hooks import check_not_taken
from sago.capture.side import Capture, Side
from sago.core.guards import Guards
from sago.ranks import fsdp
from sago.ranks.dtensor import is_dtensor, local, local_as

Arrived = Callable[[int, torch.device], None]


class Host(Protocol):
    """The operations of a window on the place where a training loop keeps its gradients."""

    def mount(self, capture: Capture) -> None:
        """Puts the accumulators of the capture in place and records their versions."""

    def watch(self, capture: Capture, arrived: Arrived | None) -> None:
        """Registers the hooks of the capture, which call `arrived(i, device)` for each complete gradient."""

    def collect(self, capture: Capture) -> None:
        """Records in the capture and its side which parameters a backward reached since `mount`."""

    def unmount(self) -> None:
        """Takes the accumulators away, so that a backward outside of captures is noticed."""

    def publish(self, updates: Sequence[Tensor | None]) -> None:
        """Hands the updates to the optimizer."""

    def clear(self) -> None:
        """Drops every gradient and update, including those that were not reduced over the ranks."""

    def check_used(self) -> None:
        """Raises if no optimizer step has used the last update."""

    def check_start(self) -> None:
        """Raises if a capture cannot begin. `check_parameters` checks the layout of the parameters."""

    def check_outside(self) -> None:
        """Raises if a backward outside of captures left a gradient."""

    def check_reduced(self) -> None:
        """Raises if gradients are not reduced over the ranks yet, which would mix the two sides."""

    def check_parameters(self) -> None:
        """Raises if a parameter was moved, cast or resized after the buckets were made."""


class GradHost:
    """The host of plain torch, DDP and FSDP2: `p.grad` is the accumulator inside captures and None outside.

    Args:
        names, params: The parameters; all of them require grad.
        frozen: The names and tensors of parameters that do not require grad, and must stay frozen.
        module: The module of the parameters, if it is known.
        sharded: The FSDP2 modules that hold the parameters.
        retain: The accumulators of one side. Both sides have the same dtypes.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        frozen: Sequence[tuple[str, Tensor]],
        module: torch.nn.Module | None,
        sharded: Sequence[torch.nn.Module],
        retain: Side,
    ) -> None:
        self._names, self._params, self._frozen, self._sharded = names, params, frozen, sharded
        # Between forward and backward FSDP2 puts other parameters into its modules.
        self._module = None if sharded else module
        self._ids = None if module is None else [id(p) for p in module.parameters()]
        self._described = [_describe(p) for p in params]
        self._guards = Guards(params)
        self._wider = [p.dtype != view.dtype for p, view in zip(params, retain.views, strict=True)]
        self._mounted: Capture | None = None
        self._updates: Sequence[Tensor | None] = ()  # the tensors that `publish` has put into `p.grad`

    def mount(self, capture: Capture) -> None:
        side = capture.side
        for p, grad, wider in zip(self._params, side.grads, self._wider, strict=True):
            p.grad = None if wider or side.fresh else grad
        capture.versions = side.versions()
        self._mounted = capture

    def unmount(self) -> None:
        for p in self._params:
            p.grad = None
        self._mounted = None

    def publish(self, updates: Sequence[Tensor | None]) -> None:
        for p, update in zip(self._params, updates, strict=True):
            p.grad = update
        self._updates = updates

    def clear(self) -> None:
        self.unmount()
        self._updates = ()
        fsdp.discard(self._sharded)

    def watch(self, capture: Capture, arrived: Arrived | None) -> None:
        for i, p in enumerate(self._params):
            if not p.requires_grad:
                if arrived is not None:
                    p.grad = None  # a gradient without a hook is then noticed by `collect`
                continue
            if not capture.side.probed[i]:
                capture.handles.append(p.register_hook(partial(_refuse_sparse, self._names[i])))
            if self._wider[i]:
                hook = partial(self._widen, capture, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))
            if capture.side.keeps and not self._wider[i]:
                capture.handles.append(p.register_hook(partial(self._put_back, capture, i)))
            if arrived is not None:
                hook = partial(self._arrive, capture, arrived, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))

    def collect(self, capture: Capture) -> None:
        side = capture.side
        if capture.alone:  # `_arrive` has recorded the gradients, and accumulators may hold updates now
            for name, p, grad in zip(self._names, self._params, side.grads, strict=True):
                if p.grad is not None and (side.fresh or p.grad is not grad):
                    raise ValueError(
                        f"`{name}.grad` should be written by the backward alone in synthesize_in_backward. "
                        "Found another tensor, which is in no update: it was set by hand, or the parameter "
                        "was frozen when the block began. Use retain() and synthesize_, without `one_copy`."
                    )
            return
        kept = not any(side.touched)
        found = [p.grad for p in self._params]
        moved = set(side.exposed.moved())
        self._copy_shared(side, found, moved)
        for i, (g, view, grad) in enumerate(zip(found, side.views, side.grads, strict=True)):
            own = g is grad
            kept |= side.touched[i] and (own or self._wider[i] or (g is not None and g.requires_grad))
            if g is None and not self._wider[i]:  # zero_grad(set_to_none=True) without a later backward
                if side.keeps:
                    self._check_begun(capture, i)
                elif side.touched[i] or side.version(i) != capture.versions[i]:
                    clear([view])
                side.touched[i] = False
                continue
            if not own or i in moved:
                self._settle(side, i, g)
            if side.version(i) != capture.versions[i]:
                side.touched[i] = capture.reached = side.written = True
        side.exposed.renew(moved)
        if not kept:  # zero_grad(set_to_none=True) has dropped the earlier captures
            side.captures = 0

    def check_used(self) -> None:
        for name, p, update in zip(self._names, self._params, self._updates, strict=False):
            if update is not None and p.grad is update:
                raise ValueError(
                    "The last update should be used and cleared before the next capture: call "
                    f"optimizer.step() and buckets.zero_(). Found it in `{name}.grad`."
                )
        self._updates = ()

    def check_start(self) -> None:
        for name, p in self._frozen:
            if p.requires_grad:
                raise ValueError(
                    f"Parameter `{name}` should be frozen, as it was when the buckets were made. Found that "
                    "it requires grad. Make new GradientBuckets when parameters are unfrozen."
                )
        if self._module is not None and [id(p) for p in self._module.parameters()] != self._ids:
            raise ValueError(
                "The module should have the parameters that it had when the buckets were made. Found others. "
                "Make new GradientBuckets when parameters are added, removed or replaced."
            )

    def check_outside(self) -> None:
        for name, p in zip(self._names, self._params, strict=True):
            if p.grad is not None:
                raise ValueError(
                    f"Backwards should run within forget() or retain(). Found a gradient in `{name}.grad` "
                    "that no capture put there. A backward ran outside, or before the window. Set the "
                    "gradient to None, or call zero_, which drops all gradients."
                )

    def check_reduced(self) -> None:
        fsdp.check_synced(self._sharded)

    def check_parameters(self) -> None:
        if self._guards.hold(self._params):
            return
        for name, p, before in zip(self._names, self._params, self._described, strict=True):
            if _describe(p) != before:
                raise ValueError(
                    f"Parameter `{name}` should be as it was when the buckets were made, {_text(before)}. "
                    f"Found {_text(_describe(p))}. Make new GradientBuckets when a model is moved or cast."
                )
        self._guards = Guards(self._params)  # a parameter may have been frozen, which is allowed

    def _copy_shared(self, side: Side, found: list[Any], moved: Set[int]) -> None:
        """Copies the gradients that other code took from accumulators of the side.

        Otherwise, `_settle` could overwrite one before it is copied to its own accumulator.
        """
        if not moved and all(map(is_, found, side.grads)):
            return
        memory = {b.untyped_storage().data_ptr() for b in side.buffers}
        other = {i for i, (g, own) in enumerate(zip(found, side.grads, strict=True)) if g is not own}
        for i in other | moved:
            g = local(found[i])
            if g is not None and g.layout == torch.strided and g.untyped_storage().data_ptr() in memory:
                found[i] = found[i].detach().clone()

    @torch.no_grad()
    def _settle(self, side: Side, i: int, g: Tensor | None) -> None:
        """Copies a gradient into the accumulator, if it is in other memory.

        Autograd makes a new tensor after zero_grad(set_to_none=True), and with create_graph=True.
        """
        view = side.views[i]
        if g is None:
            return
        _refuse_sparse(self._names[i], g)
        if side.keeps and not self._wider[i] and is_dtensor(self._params[i]):
            self._refuse_zero_grad(i)  # no hook has put the accumulator back
        g = local_as(g, self._params[i])
        if g.shape != view.shape:
            raise ValueError(
                f"`{self._names[i]}.grad` should have shape {tuple(view.shape)}. Found {tuple(g.shape)}: "
                "other code has replaced its data. Call zero_ and capture both sides again."
            )
        if g.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
            g = g.clone()  # the memory may overlap, for example if the gradient was transposed
        view.add_(g) if self._wider[i] else view.copy_(g)

    def _check_own(self, side: Side, i: int, g: Tensor | None) -> None:
        """Raises if a gradient lies in the accumulator of another parameter, which it would then change."""
        memory = {b.untyped_storage().data_ptr() for b in side.buffers}
        g, view = local(g), side.views[i]
        if g is None or g.untyped_storage().data_ptr() not in memory or g.data_ptr() == view.data_ptr():
            return
        raise ValueError(
            f"`{self._names[i]}.grad` should have memory of its own in synthesize_in_backward. Found that it "
            "shares memory with the gradient of another parameter. Assign a copy of that gradient."
        )

    @torch.no_grad()
    def _widen(self, capture: Capture, i: int, p: Tensor) -> None:
        """Adds `p.grad`, which autograd has written, to the wider accumulator."""
        if self._mounted is capture and p.grad is not None:
            capture.side.views[i].add_(_arrived_shard(p))
            p.grad = None

    def _put_back(self, capture: Capture, i: int, g: Tensor | None) -> None:
        """Mounts a running mean again that zero_grad(set_to_none=True) took away."""
        if self._mounted is capture and self._params[i].grad is None:
            self._check_begun(capture, i)
            self._params[i].grad = capture.side.grads[i]

    def _check_begun(self, capture: Capture, i: int) -> None:
        """Raises if the window has a gradient already, which zero_grad would have to take out of the mean."""
        if capture.side.touched[i] or capture.side.version(i) != capture.versions[i]:
            self._refuse_zero_grad(i)

    def _refuse_zero_grad(self, i: int) -> None:
        raise ValueError(
            "zero_grad(set_to_none=True) should not be called after a backward of the window where a running "
            f"mean is kept, because a gradient cannot be taken out again. Found that `{self._names[i]}.grad` "
            "was replaced. Call buckets.zero_() between windows."
        )

    def _arrive(self, capture: Capture, arrived: Arrived, i: int, p: Tensor) -> None:
        """Takes the gradient of a parameter. Autograd also calls this if it has none for the parameter."""
        side = capture.side
        if isinstance(side, FreshGradients):
            if p.grad is None:
                check_not_taken(self._names[i], p)
                return
            _refuse_sparse(self._names[i], p.grad)
            side.add(i, _arrived_shard(p))
            p.grad = None
        else:
            moved = not self._wider[i] and side.exposed.is_moved(i)
            if moved or p.grad is not side.grads[i]:
                self._check_own(side, i, p.grad)
                self._settle(side, i, p.grad)
            if moved:
                side.exposed.renew([i])
            p.grad = None if self._wider[i] else side.grads[i]
            if side.version(i) == capture.versions[i]:
                return
        side.touched[i] = capture.reached = side.written = True
        arrived(i, p.device)


def _arrived_shard(p: Tensor) -> Tensor:
    """The gradient that a backward has just made, on this rank."""
    shard: Tensor = local_as(p.grad, p)
    if shard.device.type == "cpu" and torch.cuda.is_initialized() and shard.is_pinned():
        torch.cuda.current_stream().synchronize()  # FSDP2, before torch 2.13, may still be copying
    return shard


def _refuse_sparse(name: str, g: Tensor | None) -> None:
    # Autograd passes None to a hook if a function returns no gradient for the parameter.
    if g is not None and g.layout != torch.strided:
        raise TypeError(
            f"The gradient of parameter `{name}` should be dense. Found layout {g.layout}: make its "
            "embedding with sparse=False."
        )


def _describe(p: Any) -> tuple[torch.dtype, torch.device, torch.Size, Any]:
    return p.dtype, p.device, p.shape, p.placements if is_dtensor(p) else None


def _text(description: tuple[torch.dtype, torch.device, torch.Size, Any]) -> str:
    dtype, device, shape, placements = description
    placed = "" if placements is None else f", placed {placements}"
    return f"{dtype} {tuple(shape)} on {device}{placed}"
