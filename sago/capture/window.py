"""The window between two updates: which captures are open, what was captured, and what may come next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

from torch import Tensor

from sago.capture.host import Arrived, Host
from sago.capture.others import Others
from sago.capture.side import Capture, Side
from sago.capture.steps import StepWatch


class State(Enum):
    """The state of a window. A window goes from one state to a later one, and from every state to BROKEN.

    EMPTY: Nothing was captured.
    CAPTURING: Gradients may be captured.
    REDUCED: The gradients are averaged over the ranks, so that no more may be captured.
    UNSCALED: Gradients are divided by the loss scale, so that no more may be captured.
    UPDATED: The window has ended and its update is published. The next capture begins a new window.
    BROKEN: A gradient is not whole, and only `zero_` is allowed.
    """

    EMPTY = auto()
    CAPTURING = auto()
    REDUCED = auto()
    UNSCALED = auto()
    UPDATED = auto()
    BROKEN = auto()


class Window:
    """Opens and closes captures, which mount the accumulators of the two sides in turn.

    Args:
        names, params: The captured parameters.
        host: Where the accumulators are mounted.
        forget, retain: The accumulators.

    Attributes:
        state: See `State`.
        unscaled: The positions of the parameters whose gradients were unscaled.
        agreed: Whether the ranks have compared which parameters were reached.
        others: The trained parameters that were not given.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[Tensor], host: Host, forget: Side, retain: Side
    ) -> None:
        self.names, self.params = names, params
        self.forget, self.retain = forget, retain
        self.state = State.EMPTY
        self.unscaled: set[int] = set()
        self.agreed = False
        self.others = Others()
        self._host = host
        self._open: list[Capture] = []
        self._reason = ""  # why the window is broken
        self._steps = StepWatch(self, params)

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

    def check_ready(self, *sides: Side) -> None:
        """Raises unless these sides are captured, all captures are closed and no backward ran outside."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before the synthesis. Found an open {self._open[-1].side.name}()."
            )
        self._check_whole()
        for side in sides:
            if side.captures == 0:
                since = " since the last synthesis" if self.state is State.UPDATED else ""
                raise ValueError(
                    f"The {side.name} gradient should be captured before the synthesis: run its backward "
                    f"within `with buckets.{side.name}():`. Found no such capture{since}."
                )
        self._host.check_outside()
        self._host.check_parameters()

    def finish(self, updates: Sequence[Tensor | None]) -> None:
        """Publishes the updates and ends the window."""
        self._host.publish(updates)
        self._end(State.UPDATED)

    def fail(self, reason: str) -> None:
        """Allows nothing but `zero_`, because a gradient of the window is not whole."""
        self.state, self._reason = State.BROKEN, reason

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
        self.unscaled.update(found)
        if self.unscaled:
            self.state = State.UNSCALED

    def zero_(self) -> None:
        """Ends the window in any state. No update is published, and all accumulators are zero."""
        if self._open:
            raise ValueError(
                f"Captures should be closed before zero_. Found an open {self._open[-1].side.name}()."
            )
        self._host.clear()
        self._end(State.EMPTY)
        self.forget.clear()
        self.retain.clear()

    def _end(self, state: State) -> None:
        self.forget.discard()
        self.retain.discard()
        self.state = state
        self.agreed = False
        self.unscaled = set()
        self._steps.stop()

    def _enter(self, side: Side, arrived: Arrived | None) -> Capture:
        if not self._open:
            self._check_start()
        elif self._open[-1].alone:
            raise ValueError("There should be no capture within synthesize_in_backward. Found one.")
        else:
            self._host.collect(self._open[-1])
        if side.empty:
            side.clear()
        capture = Capture(side, alone=arrived is not None)
        self._open.append(capture)
        self.agreed = False
        try:
            self._steps.start()
            if len(self._open) == 1:
                self.others.put_aside(self.params)
            self._host.mount(capture)
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
                    "Captures should be closed in reverse order. Found one that ended with the one around it."
                )
            return
        closed = self._open[self._open.index(capture) :]
        foreign = None
        try:
            self._host.collect(closed[-1])
        except BaseException as other:
            error, capture.reached = other, True
            raise
        finally:
            del self._open[-len(closed) :]
            for ended in closed:
                for handle in ended.handles:
                    handle.remove()
            if self._open:
                self._host.mount(self._open[-1])
            else:
                self._host.unmount()
                foreign = self.others.put_back()
            if error is not None and capture.reached:
                self.fail(f"a {side.name} capture ended in {error!r}")
        if len(closed) > 1:
            found = f"a {side.name} capture was closed before one within it"
            self.fail(found)
            raise ValueError(f"Captures should be closed in reverse order. Found that {found}.")
        if error is None:
            self._close(capture, foreign)

    def _close(self, capture: Capture, foreign: str | None) -> None:
        """Counts a capture that ended without an error, or raises for what was wrong inside it.

        `foreign` is the name of a parameter outside the buckets that a backward reached.
        """
        side = capture.side
        try:
            self._host.check_reduced()
        except ValueError as held_back:
            self.fail(str(held_back))
            raise
        if foreign is not None:
            self.fail(f"a {side.name} capture reached `{foreign}`, which the buckets do not have")
            raise ValueError(
                f"Parameter `{foreign}` should be given to the buckets, or be frozen with "
                "requires_grad_(False), because its own gradient would be the sum of both sides, which zero_ "
                f"does not clear. Found that a backward within {side.name}() reaches it."
            )
        if not capture.reached and not capture.nested:
            raise ValueError(
                f"A {side.name} capture should have a backward in it that reaches a parameter. Found none."
            )
        side.captures += capture.reached
        side.probed = [a or b for a, b in zip(side.probed, side.touched, strict=True)]
        if self._open:
            self._open[-1].nested = True

    def _check_start(self) -> None:
        """Raises where no capture may begin now; otherwise begins a window if there is none."""
        self._host.check_used()
        self._check_whole()
        self._host.check_reduced()
        if self.state in (State.REDUCED, State.UNSCALED):
            done, because = {
                State.REDUCED: ("they are averaged over the ranks", "averaged and other ones do not add up"),
                State.UNSCALED: ("unscale_", "scaled and unscaled ones do not add up"),
            }[self.state]
            raise ValueError(
                f"Gradients should be captured before {done}: {because}. Found a capture after it. Call "
                "synthesize_, or drop the gradients with zero_."
            )
        self._host.check_outside()
        self._host.check_parameters()
        self._host.check_start()
        self.state = State.CAPTURING

    def _check_whole(self) -> None:
        if self.state is State.BROKEN:
            raise ValueError(
                f"The gradients of this window should be whole. Found that {self._reason}. Call zero_ and "
                "capture both sides again."
            )
