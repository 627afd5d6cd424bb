"""The window between two updates: which captures are open, what was captured, and what may come next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, auto

from torch import Tensor

from sago.capture.host import Arrived, Host
from sago.capture.others import Others
from sago.capture.side import Capture, Side
from sago.capture.steps import StepWatch


class State(IntEnum):
    """The state of a window. `NEXT` has the actions that are allowed in each state.

    EMPTY: No gradient was captured.
    CAPTURING: A capture had a backward, and more captures may follow.
    REDUCED: The gradients are averaged over the ranks. No more gradients may be captured.
    UNSCALED: Gradients are divided by the loss scale. No more gradients may be captured.
    UPDATING: Updates are being written over the gradients, and are not all published yet.
    UPDATED: The window has ended and its update is published. The next capture begins a new window.
    BROKEN: A gradient is not complete. Only `zero_` is allowed.
    """

    EMPTY = auto()
    CAPTURING = auto()
    REDUCED = auto()
    UNSCALED = auto()
    UPDATING = auto()
    UPDATED = auto()
    BROKEN = auto()


class Action(IntEnum):
    """An action that depends on the state of a window.

    OPEN: A capture is opened.
    CLOSE: A capture is closed in which a backward reached a parameter.
    USE: A method begins that averages, unscales or synthesizes the gradients.
    REDUCE: The gradients are averaged over the ranks.
    UNSCALE: Gradients are divided by the loss scale.
    WRITE: Updates are written over gradients.
    PUBLISH: All updates are written, and the optimizer gets them.
    FAIL: A gradient was lost.
    CLEAR: All gradients and updates are dropped.
    """

    OPEN = auto()
    CLOSE = auto()
    USE = auto()
    REDUCE = auto()
    UNSCALE = auto()
    WRITE = auto()
    PUBLISH = auto()
    FAIL = auto()
    CLEAR = auto()


_ALWAYS = {Action.FAIL: State.BROKEN, Action.CLEAR: State.EMPTY}
# For each state, the actions that are allowed and the state after each of them. Other actions raise.
NEXT = {
    State.EMPTY: {Action.OPEN: State.EMPTY, Action.CLOSE: State.CAPTURING, **_ALWAYS},
    State.CAPTURING: {
        Action.OPEN: State.CAPTURING,
        Action.CLOSE: State.CAPTURING,
        Action.USE: State.CAPTURING,
        Action.REDUCE: State.REDUCED,
        Action.UNSCALE: State.UNSCALED,
        Action.WRITE: State.UPDATING,
        **_ALWAYS,
    },
    State.REDUCED: {
        Action.USE: State.REDUCED,
        Action.UNSCALE: State.UNSCALED,
        Action.WRITE: State.UPDATING,
        **_ALWAYS,
    },
    State.UNSCALED: {
        Action.USE: State.UNSCALED,
        Action.UNSCALE: State.UNSCALED,  # a second optimizer
        Action.WRITE: State.UPDATING,
        **_ALWAYS,
    },
    State.UPDATING: {
        Action.CLOSE: State.UPDATING,  # the capture of `synthesize_in_backward`
        Action.WRITE: State.UPDATING,
        Action.PUBLISH: State.UPDATED,
        **_ALWAYS,
    },
    State.UPDATED: {Action.OPEN: State.UPDATED, Action.CLOSE: State.CAPTURING, **_ALWAYS},
    State.BROKEN: {Action.CLOSE: State.BROKEN, **_ALWAYS},
}
# Why no gradient may be captured in these states.
_COMPLETE = {
    State.REDUCED: ("they are averaged over the ranks", "later gradients would not be averaged"),
    State.UNSCALED: ("unscale_", "later gradients would still be scaled"),
}


class Window:
    """Opens and closes captures, which mount the accumulators of the two sides in turn.

    Args:
        names, params: The captured parameters.
        others: The parameters that no capture may reach.
        host: Where the accumulators are mounted.
        forget, retain: The accumulators.

    Attributes:
        unscaled: The positions of the parameters whose gradients were unscaled.
        lent: The parameter whose `p.grad` is an update at present, so that an optimizer may step on it
            although the window has not ended.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        others: Others,
        host: Host,
        forget: Side,
        retain: Side,
    ) -> None:
        self.names, self.params = names, params
        self.forget, self.retain = forget, retain
        self.unscaled: set[int] = set()
        self.lent: Tensor | None = None
        self._state = State.EMPTY
        self._agreed = False
        self._others = others
        self._host = host
        self._open: list[Capture] = []
        self._reason = ""  # why the gradients are not complete, in UPDATING and BROKEN
        self._incomplete: set[Side] = set()
        self._steps = StepWatch(self)

    @property
    def state(self) -> State:
        """The state. The methods of the window change it."""
        return self._state

    @property
    def empty(self) -> bool:
        return self._state is State.EMPTY

    @property
    def agreed(self) -> bool:
        """Whether the ranks have compared which parameters were reached."""
        return self._agreed

    @property
    def current(self) -> Capture | None:
        """The innermost open capture."""
        return self._open[-1] if self._open else None

    @contextmanager
    def capture(self, side: Side, arrived: Arrived | None = None) -> Iterator[None]:
        """Backwards inside the block accumulate into `side`.

        If `arrived` is given, the backward calls `arrived(i, device)` when the gradient of parameter `i` has
        been accumulated, and no other capture can be opened inside the block.
        """
        capture = self._enter(side, arrived)
        try:
            yield
        except BaseException as error:
            self._leave(capture, error)
            raise
        self._leave(capture, None)

    def allows(self, action: Action) -> bool:
        """Whether the action is allowed in the present state."""
        return action in NEXT[self._state]

    def check_ready(self, *sides: Side) -> None:
        """Raises unless these sides are captured, all captures are closed and no backward ran outside."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before the synthesis. Found an open {self._open[-1].side.name}()."
            )
        self._check(Action.USE)
        for side in sides:
            if side.captures == 0:
                raise ValueError(self._not_captured(side))
        self._host.check_outside()
        self._host.check_parameters()

    def check_between(self, name: str) -> None:
        """Raises unless no gradient of a window is captured. `name` is the method that needs it."""
        if self._open or self._state not in (State.EMPTY, State.UPDATED):
            raise ValueError(
                f"{name} should be called between two windows, because the accumulators hold gradients of a "
                "window after a capture. Found such a window. Call synthesize_ or zero_ before."
            )

    def agree(self) -> None:
        """Records that the same parameters were reached on all ranks, until the next capture."""
        self._agreed = True

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """The gradients are averaged over the ranks inside the block. An error breaks the window."""
        self._check(Action.REDUCE)
        try:
            yield
            self._go(Action.REDUCE)
        except BaseException as error:
            self.fail(f"the average over the ranks ended in {error!r}")
            raise

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Updates are written and published inside the block, which calls `begin` before the first write."""
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def abandon(self, error: BaseException) -> None:
        """After an error in a synthesis: if `begin` came before it, the window is broken, without updates."""
        if self._state is State.UPDATING:
            # The update of a running mean is written over the forget gradient only.
            self.fail(f"a synthesis ended in {error!r}", self.forget)
            self._host.unmount()

    def begin(self) -> None:
        """From now on, gradients are overwritten by updates. Only `publish` makes the window usable again."""
        self._go(Action.WRITE)
        self._reason = "a synthesis began and did not end"

    def publish(self, updates: Sequence[Tensor | None]) -> None:
        """Hands the updates to the optimizer and ends the window."""
        self._check(Action.PUBLISH)
        self._host.publish(updates)
        self._end(Action.PUBLISH)

    @contextmanager
    def lending(self, p: Tensor, update: Tensor) -> Iterator[None]:
        """Inside the block `p.grad` is the update, and an optimizer may step on it."""
        p.grad, self.lent = update, p
        try:
            yield
        finally:
            p.grad, self.lent = None, None

    def fail(self, reason: str, *sides: Side) -> None:
        """Allows nothing but `zero_`, because the gradients of these sides, or of both, are not complete."""
        self._go(Action.FAIL)
        self._reason = reason
        self._incomplete |= set(sides or (self.forget, self.retain))

    def check_scaled(self, found: Iterable[int]) -> None:
        """Raises if gradients of the parameters at these positions are already unscaled."""
        for i in found:
            if i in self.unscaled:
                raise ValueError(
                    "Gradients should be unscaled once a window, both sides by one GradScaler, because the "
                    f"division applies to forget and retain alike. Found that those of `{self.names[i]}` are "
                    "unscaled already."
                )

    @contextmanager
    def unscaling(self, found: Sequence[int]) -> Iterator[None]:
        """The gradients of the parameters at these positions are unscaled inside the block.

        torch raises its own errors before it divides. An interruption may come between two divisions, and a
        division must not be repeated, so the interruption breaks the window.
        """
        try:
            yield
            if found:
                self._go(Action.UNSCALE)
                self.unscaled.update(found)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.fail(f"unscale_ ended in {error!r}")
            raise

    def zero_(self) -> None:
        """Ends the window in any state. No update is published, and all accumulators are cleared."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before zero_. Found an open {self._open[-1].side.name}()."
            )
        self._host.clear()
        incomplete = self._incomplete
        unused = [side for side in (self.forget, self.retain) if side.captures and side not in incomplete]
        self._end(Action.CLEAR)
        for side in (self.forget, self.retain):
            if side not in incomplete:
                side.clear()
        self._incomplete = set()
        for side in incomplete:
            side.drop()
        for side in unused:
            side.warn_unused()

    def _check(self, action: Action) -> None:
        """Raises if the action is not allowed now, with the way out."""
        if action not in NEXT[self._state]:
            raise ValueError(self._refusal(action))

    def _go(self, action: Action) -> None:
        following = NEXT[self._state].get(action)
        if following is None:
            raise ValueError(self._refusal(action))
        self._state = following

    def _refusal(self, action: Action) -> str:
        if self._state in (State.UPDATING, State.BROKEN):
            return (
                f"The gradients of this window should be whole. Found that {self._reason}. Call zero_ and "
                "capture both sides again."
            )
        if action is Action.PUBLISH:
            return "Updates should be written before they are published. Found none. Call synthesize_."
        if self._state not in _COMPLETE:
            return self._not_captured(self.forget)
        if action is Action.REDUCE:
            return (
                "Gradients should be averaged over the ranks once a window, and before unscale_. Found that "
                "they are averaged or unscaled already. Call synthesize_, or drop the gradients with zero_."
            )
        done, because = _COMPLETE[self._state]
        return (
            f"Gradients should be captured before {done}, because {because}. Found a capture after it. "
            "Call synthesize_, or drop the gradients with zero_."
        )

    def _not_captured(self, side: Side) -> str:
        since = " since the last synthesis" if self._state is State.UPDATED else ""
        return (
            f"The {side.name} gradient should be captured before the synthesis: run its backward "
            f"within `with buckets.{side.name}():`. Found no such capture{since}."
        )

    def _end(self, action: Action) -> None:
        self.forget.discard()
        self.retain.discard()
        self._agreed = False
        self.unscaled = set()
        self._steps.stop()
        self._go(action)

    def _enter(self, side: Side, arrived: Arrived | None) -> Capture:
        if not self._open:
            self._check_start()
        elif self._open[-1].alone:
            raise ValueError(
                "There should be no capture within synthesize_in_backward. Found one. Open it before the "
                "block."
            )
        else:
            self._check(Action.OPEN)
            self._host.collect(self._open[-1])
        if side.empty:
            side.clear()
            side.exposed.renew()
        capture = Capture(side, alone=arrived is not None)
        self._agreed = False
        try:
            self._open.append(capture)
            self._steps.start()
            if len(self._open) == 1:
                self._others.put_aside(self.params)
            self._host.mount(capture)
            capture.mounted = True
            self._host.watch(capture, arrived)
        except BaseException as error:
            self._leave(capture, error)
            raise
        return capture

    def _leave(self, capture: Capture, error: BaseException | None) -> None:
        side = capture.side
        if capture not in self._open:
            if error is None:
                raise ValueError(
                    "Captures should be closed in reverse order. Found a capture that was already "
                    "closed together with the capture around it. Use `with` blocks."
                )
            return
        closed = self._open[self._open.index(capture) :]
        try:
            try:
                if closed[-1].mounted:
                    self._host.collect(closed[-1])
            finally:
                foreign = self._restore(closed)
        except BaseException as other:
            for ended in closed:
                ended.side.written = True  # `collect` has not recorded it
            self.fail(f"a {side.name} capture ended in {error or other!r}")
            if error is None or not isinstance(other, Exception):
                raise
            return  # the caller raises `error`, the cause
        if error is not None and capture.reached:
            self.fail(f"a {side.name} capture ended in {error!r}", side)
        if len(closed) > 1:
            found = f"a {side.name} capture was closed before one within it"
            self.fail(found)
            raise ValueError(f"Captures should be closed in reverse order. Found that {found}.")
        if error is None:
            self._close(capture, foreign)

    def _restore(self, closed: Sequence[Capture]) -> str | None:
        """Mounts what was mounted before these captures. Their own mounting may have been incomplete.

        Returns the name of a parameter outside the buckets that a backward reached.
        """
        del self._open[-len(closed) :]
        for ended in closed:
            for handle in ended.handles:
                handle.remove()
        if self._open:
            self._host.mount(self._open[-1])
            return None
        try:
            self._host.unmount()
        finally:
            foreign = self._others.put_back()
        return foreign

    def _close(self, capture: Capture, foreign: str | None) -> None:
        """Counts a capture that ended without an error. Raises if its gradients are wrong.

        `foreign` is the name of a parameter outside the buckets that a backward reached.
        """
        side = capture.side
        try:
            self._host.check_reduced()
        except BaseException as error:
            self.fail(str(error) or repr(error))
            raise
        if foreign is not None:
            self.fail(f"a {side.name} capture reached `{foreign}`, which the buckets do not have", side)
            raise ValueError(
                f"Parameter `{foreign}` should be given to the buckets, or be frozen with "
                "requires_grad_(False), because its own gradient would be the sum of both sides, which zero_ "
                f"does not clear. Found that a backward within {side.name}() reaches it."
            )
        if not capture.reached and not capture.nested:
            raise ValueError(
                f"A {side.name} capture should have a backward in it that reaches a parameter. Found none."
            )
        if capture.reached:
            self._go(Action.CLOSE)
            side.captures += 1
        side.probed = [a or b for a, b in zip(side.probed, side.touched, strict=True)]
        if self._open:
            self._open[-1].nested = True

    def _check_start(self) -> None:
        """Raises if no capture may begin now."""
        self._host.check_used()
        self._check(Action.OPEN)
        self._host.check_reduced()
        self._host.check_outside()
        self._host.check_parameters()
        self._host.check_start()
