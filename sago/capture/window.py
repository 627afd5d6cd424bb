"""Two gradients of one model: accumulators that take turns under `p.grad`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sago.capture.flat import Flat, clear
from sago.capture.others import Others
from sago.core.guards import Guards
from sago.ranks import fsdp
from sago.ranks.dtensor import is_dtensor, local_as, wrap

Arrived = Callable[[int, torch.device], None]


class Side:
    """The accumulators of one of the two gradients, and what is in them.

    Attributes:
        views, owner, buffers: See `sago.capture.flat.Flat`; the views are of what this rank holds.
        grads: The views as `p.grad` takes them.
        touched: Whether a backward of the window reached the parameter.
        captures: Captures of the window that had a backward.
    """

    def __init__(self, name: str, flat: Flat, params: Sequence[Tensor]) -> None:
        self.name = name
        self.views, self.owner, self.buffers = flat
        self.grads = [wrap(view, p) for view, p in zip(self.views, params, strict=True)]
        self.touched = [False] * len(params)
        self.captures = 0
        self.written = False  # since it was cleared
        self.probed = [False] * len(params)  # for sparse gradients

    def version(self, i: int) -> int:
        """A number that changes when gradient `i` is written."""
        view, grad = self.views[i], self.grads[i]
        # Operations on a DTensor count there alone, and FSDP2 writes to what is within.
        return view._version if grad is view else view._version + grad._version

    def versions(self) -> list[int]:
        return [self.version(i) for i in range(len(self.views))]

    def discard(self) -> None:
        self.touched = [False] * len(self.touched)
        self.captures = 0

    def clear(self) -> None:
        if self.written:
            clear(self.buffers)
        self.written = False


class Capture:
    """An open capture.

    Attributes:
        versions: Of the accumulators when they were last looked at.
        reached: Whether a backward of its own reached a parameter.
        nested: Whether one of a capture within did.
        alone: Whether it takes no capture within.
    """

    def __init__(self, side: Side, alone: bool) -> None:
        self.side = side
        self.alone = alone
        self.versions = side.versions()
        self.reached = False
        self.nested = False
        self.handles: list[Any] = []


class Extraction:
    """Swaps the accumulators of the sides under `p.grad` and back, and keeps the books of a window.

    Outside of captures `p.grad` is None, so that a backward there is noticed and its gradient kept apart.

    Args:
        names, params: The parameters; all of them require grad.
        frozen: Names and parameters that do not, and should not begin to.
        module: Where the parameters come from, if that is known.
        sharded: The modules of FSDP2 that the parameters are in.
        forget, retain: The accumulators.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        frozen: Sequence[tuple[str, Tensor]],
        module: torch.nn.Module | None,
        sharded: Sequence[torch.nn.Module],
        forget: Side,
        retain: Side,
    ) -> None:
        self.names, self.params = names, params
        self.forget, self.retain = forget, retain
        self.unscaled: set[int] = set()  # positions of parameters
        self.others = Others()
        self.agreed = False  # with the other ranks on what was reached
        self._open: list[Capture] = []
        self.reduced = False  # over the ranks, which ends the captures of a window
        self._failure: str | None = None  # why the gradients of the window are not whole
        self._updates: Sequence[Tensor | None] | None = None  # that `finish` has put under `p.grad`
        self._frozen, self._sharded = frozen, sharded
        # Between forward and backward FSDP has other parameters in its modules.
        self._module = None if sharded else module
        self._described = [_describe(p) for p in params]
        self._guards = Guards(params)
        self._members = None if module is None else [id(p) for p in module.parameters()]
        self._step_watch: Callable[[], object] | None = None  # removes the hook on optimizers
        self._warned = False
        self._wider = [p.dtype != view.dtype for p, view in zip(params, retain.views, strict=True)]

    @contextmanager
    def capture(self, side: Side, arrived: Arrived | None = None) -> Iterator[None]:
        """Backwards within the block accumulate into `side`.

        `arrived(i, device)` is called in the backward, when the gradient of parameter `i` has been
        accumulated; there can be no capture within then.
        """
        capture = self._enter(side, arrived)
        try:
            yield
        except BaseException as error:
            self._leave(capture, error)
            raise
        self._leave(capture, None)

    def check_ready(self, *sides: Side) -> None:
        """Raises unless these sides were captured, nothing is open and nothing is astray."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before the synthesis. Found an open {self._open[-1].side.name}()."
            )
        self._check_whole()
        for side in sides:
            if side.captures == 0:
                raise ValueError(
                    f"The {side.name} gradient should be captured before the synthesis: run its backward "
                    f"within `with buckets.{side.name}():`. Found no such capture"
                    f"{'.' if self._updates is None else ' since the last synthesis.'}"
                )
        self._check_outside()
        self._check_parameters()

    def finish(self, updates: Sequence[Tensor | None]) -> None:
        """Makes the updates `p.grad` and ends the window."""
        for p, update in zip(self.params, updates, strict=True):
            p.grad = update
        self._updates = updates
        self._discard()

    def spoil(self, reason: str) -> None:
        """Allows nothing but `zero_`, because the gradients of the window are not whole."""
        self._failure = reason

    def check_scaled(self, found: Iterable[int]) -> None:
        """Raises where gradients of the parameters at these positions were unscaled before."""
        for i in found:
            if i in self.unscaled:
                raise ValueError(
                    "Gradients should be unscaled once a window, both sides by one GradScaler, because the "
                    f"division applies to forget and retain alike. Found that those of `{self.names[i]}` are "
                    "unscaled already."
                )

    def note_unscaled(self, found: Iterable[int]) -> None:
        """From here on the window takes no more captures."""
        self.unscaled.update(found)

    def zero_(self) -> None:
        """Ends the window, whatever is in it. `p.grad` is None, all accumulators are zero."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before zero_. Found an open {self._open[-1].side.name}()."
            )
        self._uninstall()
        fsdp.discard(self._sharded)
        self._updates = None
        self._discard()
        self.forget.clear()
        self.retain.clear()

    def _discard(self) -> None:
        self.forget.discard()
        self.retain.discard()
        self._failure = None
        self.reduced = self.agreed = False
        self.unscaled = set()
        if self._step_watch is not None:
            self._step_watch()
            self._step_watch = None

    def _enter(self, side: Side, arrived: Arrived | None) -> Capture:
        if not self._open:
            self._check_start()
        elif self._open[-1].alone:
            raise ValueError("There should be no capture within synthesize_in_backward. Found one.")
        else:
            self._collect(self._open[-1])
        if side.captures == 0 and not any(side.touched):
            side.clear()
        capture = Capture(side, alone=arrived is not None)
        self._open.append(capture)
        self.agreed = False
        try:
            if self._step_watch is None:
                self._watch_steps()
            if len(self._open) == 1:
                self.others.put_aside(self.params)
            self._install(capture)
            self._watch(capture, arrived)
        except BaseException as error:
            self._leave(capture, error)
            raise
        return capture

    def _leave(self, capture: Capture, error: BaseException | None) -> None:
        if capture not in self._open:
            if error is None:
                raise ValueError(
                    "Captures should be closed in reverse order. Found one that ended with the one around it."
                )
            return
        closed = self._open[self._open.index(capture) :]
        foreign = None
        try:
            self._collect(closed[-1])
        except BaseException as other:
            error, capture.reached = other, True
            raise
        finally:
            del self._open[-len(closed) :]
            for ended in closed:
                for handle in ended.handles:
                    handle.remove()
            if self._open:
                self._install(self._open[-1])
            else:
                self._uninstall()
                foreign = self.others.put_back()
            if error is not None and capture.reached:
                self.spoil(f"a {capture.side.name} capture ended in {error!r}")
        if len(closed) > 1:
            found = f"a {capture.side.name} capture was closed before one within it"
            self.spoil(found)
            raise ValueError(f"Captures should be closed in reverse order. Found that {found}.")
        if error is None:
            try:
                self._check_reduced()
            except ValueError as held_back:
                self.spoil(str(held_back))
                raise
        if error is None and foreign is not None:
            name = capture.side.name
            self.spoil(f"a {name} capture reached `{foreign}`, which the buckets do not have")
            raise ValueError(
                f"Parameter `{foreign}` should be given to the buckets, or be frozen with "
                "requires_grad_(False), because its own gradient would be the sum of both sides, which zero_ "
                f"does not clear. Found that a backward within {name}() reaches it."
            )
        if error is None and not capture.reached and not capture.nested:
            raise ValueError(
                f"A {capture.side.name} capture should have a backward in it that reaches a parameter. "
                "Found none."
            )
        if error is None:
            side = capture.side
            side.captures += capture.reached
            side.probed = [a or b for a, b in zip(side.probed, side.touched, strict=True)]
            if self._open:
                self._open[-1].nested = True

    def _watch_steps(self) -> None:
        """Until the window ends, notices optimizers that step on the captured parameters."""
        ref = weakref.ref(self)

        def check(optimizer: torch.optim.Optimizer, *_: object) -> None:
            extraction = ref()
            if extraction is not None:
                extraction._check_step(optimizer)

        # The hook is global, so it goes when the buckets die in the middle of a window.
        self._step_watch = weakref.finalize(self, register_optimizer_step_pre_hook(check).remove)

    def _check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises within a capture, where `p.grad` is the gradient of one side. Warns once behind one."""
        captured = {id(p) for p in self.params}
        if not any(id(p) in captured for g in optimizer.param_groups for p in g["params"]):
            return
        if self._open:
            if not self._open[-1].alone:
                name = self._open[-1].side.name
                raise ValueError(
                    f"optimizer.step() should come after synthesize_. Found one within {name}(), where "
                    f"`p.grad` is the {name} gradient alone."
                )
            return
        if self._warned or not (self.forget.captures or self.retain.captures):
            return
        self._warned = True
        warnings.warn(
            "optimizer.step() should come after synthesize_. Found one between a capture and synthesize_: "
            "`p.grad` of the captured parameters is None there, so that the step does not change them.",
            RuntimeWarning,
            stacklevel=4,  # the hook, torch's wrapper of step, and who calls it
        )

    def _install(self, capture: Capture) -> None:
        side = capture.side
        for p, grad, wider in zip(self.params, side.grads, self._wider, strict=True):
            p.grad = None if wider else grad
        capture.versions = side.versions()

    def _uninstall(self) -> None:
        for p in self.params:
            p.grad = None

    def _watch(self, capture: Capture, arrived: Arrived | None) -> None:
        for i, p in enumerate(self.params):
            if not p.requires_grad:
                continue
            if not capture.side.probed[i]:
                capture.handles.append(p.register_hook(partial(_refuse_sparse, self.names[i])))
            if self._wider[i]:
                hook = partial(self._widen, capture, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))
            if arrived is not None:
                hook = partial(self._arrive, capture, arrived, i)
                capture.handles.append(p.register_post_accumulate_grad_hook(hook))

    def _collect(self, capture: Capture) -> None:
        """Notes what backwards did since the accumulators were put under `p.grad`."""
        side = capture.side
        if capture.alone:  # `_arrive` has noted it, and accumulators may hold updates by now
            return
        kept = not any(side.touched)
        for i, (p, view) in enumerate(zip(self.params, side.views, strict=True)):
            g = p.grad
            own = g is side.grads[i]
            kept |= side.touched[i] and (own or self._wider[i] or (g is not None and g.requires_grad))
            if g is None and not self._wider[i]:  # zero_grad(set_to_none=True), and no backward since
                if side.touched[i] or side.version(i) != capture.versions[i]:
                    clear([view])
                side.touched[i] = False
                continue
            if not own:
                self._settle(side, i)
            if side.version(i) != capture.versions[i]:
                side.touched[i] = capture.reached = side.written = True
        if not kept:  # zero_grad(set_to_none=True) has dropped the captures before
            side.captures = 0

    @torch.no_grad()
    def _settle(self, side: Side, i: int) -> None:
        """Takes over the tensor that is in the accumulator's place.

        Autograd makes one behind a zero_grad(set_to_none=True), and with create_graph.
        """
        view, g = side.views[i], self.params[i].grad
        if g is None or g is side.grads[i]:
            return
        _refuse_sparse(self.names[i], g)
        g = local_as(g, self.params[i])
        view.add_(g) if self._wider[i] else view.copy_(g)

    @torch.no_grad()
    def _widen(self, capture: Capture, i: int, p: Tensor) -> None:
        """Adds to the wider accumulator what autograd has put into `p.grad`."""
        if self._open[-1] is capture and p.grad is not None:
            part = local_as(p.grad, p)
            if part.device.type == "cpu" and torch.cuda.is_initialized() and part.is_pinned():
                torch.cuda.current_stream().synchronize()  # FSDP2, before torch 2.13, may still be copying
            capture.side.views[i].add_(part)
            p.grad = None

    def _arrive(self, capture: Capture, arrived: Arrived, i: int, p: Tensor) -> None:
        self._settle(capture.side, i)
        p.grad = None if self._wider[i] else capture.side.grads[i]
        capture.side.touched[i] = capture.reached = capture.side.written = True
        arrived(i, p.device)

    def _check_start(self) -> None:
        self._check_whole()
        self._check_reduced()
        if self.reduced:
            raise ValueError(
                "Gradients should be captured before they are averaged over the ranks. Found a capture after "
                "it. Call synthesize_, or zero_ to start anew."
            )
        if self.unscaled:
            raise ValueError(
                "Gradients should be captured before unscale_: scaled and unscaled ones do not add up. Found "
                "a capture after it. Call synthesize_, or zero_ to start anew."
            )
        if self._updates is not None:
            for name, p, update in zip(self.names, self.params, self._updates, strict=True):
                if update is not None and p.grad is update:
                    raise ValueError(
                        "The last update should be used and cleared before the next capture: call "
                        f"optimizer.step() and buckets.zero_(). Found it in `{name}.grad`."
                    )
            self._updates = None
        self._check_outside()
        self._check_parameters()
        for name, p in self._frozen:
            if p.requires_grad:
                raise ValueError(
                    f"Parameter `{name}` should be frozen, as it was when the buckets were made. Found that "
                    "it requires grad. Make new GradientBuckets when parameters are unfrozen."
                )
        if self._module is not None and [id(p) for p in self._module.parameters()] != self._members:
            raise ValueError(
                "The module should have the parameters that it had when the buckets were made. Found others. "
                "Make new GradientBuckets when parameters are added, removed or replaced."
            )

    def _check_reduced(self) -> None:
        fsdp.check_synced(self._sharded)

    def _check_parameters(self) -> None:
        if self._guards.hold(self.params):
            return
        for name, p, before in zip(self.names, self.params, self._described, strict=True):
            if _describe(p) != before:
                raise ValueError(
                    f"Parameter `{name}` should be as it was when the buckets were made, {_text(before)}. "
                    f"Found {_text(_describe(p))}. Make new GradientBuckets when a model is moved or cast."
                )
        self._guards = Guards(self.params)  # one may have been frozen, which is allowed

    def _check_whole(self) -> None:
        if self._failure is not None:
            raise ValueError(
                f"The gradients of this window should be whole. Found that {self._failure}. Call zero_ and "
                "capture both sides anew."
            )

    def _check_outside(self) -> None:
        for name, p in zip(self.names, self.params, strict=True):
            if p.grad is not None:
                raise ValueError(
                    f"Backwards should run within forget() or retain(). Found a gradient in `{name}.grad` "
                    "that no capture put there, of a backward outside or from before the window. Set it to "
                    "None, or call zero_ to start anew."
                )


def _refuse_sparse(name: str, g: Tensor) -> None:
    if g.layout != torch.strided:
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


def ranks() -> int:
    """Of torch.distributed; 1 where it is not in use."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
