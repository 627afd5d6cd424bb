"""The state machine of a window: which action is allowed in which state, and what an interruption leaves.

The errors are raised inside the library, at places where a signal or a full memory may raise them.
"""

from unittest import mock

import pytest
import torch
from torch import nn

import sago
from sago.capture import host, others, streamed
from sago.capture.window import NEXT, Action, State
from sago.core import pipeline

INTERRUPTED = KeyboardInterrupt("stop")


def two_parameters():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    return params, sago.GradientBuckets(params, bucket_cap_mb=1e-6)


def capture(block, params, value):
    """A capture whose backward gives every parameter the gradient `value`."""
    with block:
        sum((p * value).sum() for p in params).backward()


def interrupted(call, *args):
    with pytest.raises(KeyboardInterrupt, match="stop"):
        call(*args)


def captured():
    """Buckets with a forget gradient of 1 and a retain gradient of 2."""
    params, buckets = two_parameters()
    capture(buckets.forget(), params, 1.0)
    capture(buckets.retain(), params, 2.0)
    return params, buckets


def assert_usable(params, buckets):
    """After `zero_`, a window gives the update of its own gradients."""
    buckets.zero_()
    capture(buckets.forget(), params, 1.0)
    capture(buckets.retain(), params, 2.0)
    buckets.synthesize_("sum")
    assert all((p.grad == 3.0).all() for p in params)
    buckets.zero_()


def assert_lost(params, buckets):
    """No optimizer finds a gradient, every call names `zero_`, and `zero_` helps."""
    assert [p.grad for p in params] == [None] * len(params)
    for call in (
        lambda: buckets.synthesize_("sum"),
        lambda: capture(buckets.synthesize_in_backward("sum"), params, 2.0),
        lambda: capture(buckets.forget(), params, 1.0),
        lambda: capture(buckets.retain(), params, 1.0),
    ):
        with pytest.raises(ValueError, match=r"should be whole.*stop.*Call zero_"):
            call()
    assert_usable(params, buckets)


def half_published(self, updates):
    """`publish` that ends after the first parameter."""
    self._params[0].grad = updates[0]
    raise INTERRUPTED


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("place", ["the report", "the versions", "publish"])
def test_an_error_after_the_updates_were_written_loses_the_window(place, in_backward, monkeypatch):
    params, buckets = two_parameters()
    stop = mock.Mock(side_effect=INTERRUPTED)
    capture(buckets.forget(), params, 1.0)
    if not in_backward:
        capture(buckets.retain(), params, 2.0)
    with monkeypatch.context() as patched:
        if place == "the report":
            patched.setattr(streamed if in_backward else pipeline, "report", stop)
        elif place == "the versions":
            patched.setattr("sago.capture.buckets.count_versions", stop)
        else:
            patched.setattr(host.GradHost, "publish", half_published)
        if in_backward:
            interrupted(capture, buckets.synthesize_in_backward("sum"), params, 2.0)
        else:
            interrupted(buckets.synthesize_, "sum")
    assert_lost(params, buckets)


@pytest.mark.parametrize("place", ["unmount", "check_reduced"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_an_error_while_a_capture_closes_loses_the_window(in_backward, place, monkeypatch):
    """The accumulators may still be mounted, and the updates of a synthesis in backward are written."""
    params, buckets = two_parameters()
    capture(buckets.forget(), params, 1.0)
    original, calls = getattr(host.GradHost, place), []

    def late(self):
        calls.append(original(self))
        if len(calls) == (1 if place == "unmount" else 2):  # the first check is that of the entry
            raise INTERRUPTED

    monkeypatch.setattr(host.GradHost, place, late)
    block = buckets.synthesize_in_backward("sum") if in_backward else buckets.retain()
    interrupted(capture, block, params, 2.0)
    assert_lost(params, buckets)


def test_an_error_before_the_first_write_loses_nothing(monkeypatch):
    params, buckets = captured()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "gram", mock.Mock(side_effect=INTERRUPTED))
        interrupted(buckets.synthesize_, "pcgrad")
    buckets.synthesize_("sum")
    assert all((p.grad == 3.0).all() for p in params)


def half_mounted(self, capture):
    """`mount` that ends after the first parameter."""
    self._params[0].grad = capture.side.grads[0]
    raise INTERRUPTED


def aside(*_):
    raise INTERRUPTED


FAILED_ENTRIES = {
    "put_aside": (others.Others, "put_aside", aside),
    "mount": (host.GradHost, "mount", half_mounted),
    "watch": (host.GradHost, "watch", aside),
}


@pytest.mark.parametrize("place", FAILED_ENTRIES)
@pytest.mark.parametrize("failed", ["forget", "retain"])
def test_a_capture_that_could_not_be_opened_loses_no_earlier_gradient(place, failed, monkeypatch):
    params, buckets = captured()
    with monkeypatch.context() as patched:
        patched.setattr(*FAILED_ENTRIES[place])
        interrupted(capture, getattr(buckets, failed)(), params, 5.0)
    assert [p.grad for p in params] == [None, None]
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in params)
    capture(buckets.forget(), params, 1.0)
    buckets.synthesize_("sum")
    assert all((p.grad == 4.0).all() for p in params)


@pytest.mark.parametrize("place", ["mount", "watch"])
@pytest.mark.parametrize("failed", ["forget", "retain"])
def test_a_nested_capture_that_could_not_be_opened_leaves_the_outer_one_as_it_was(place, failed, monkeypatch):
    """The accumulators of the outer capture are mounted again, whether or not its gradient is new."""
    for ahead in (False, True):
        params, buckets = captured()
        owner, name, broken = FAILED_ENTRIES[place]
        original, calls = getattr(owner, name), []

        def once(*args, original=original, broken=broken, calls=calls):
            calls.append(args)
            return broken(*args) if len(calls) == 1 else original(*args)

        with buckets.forget():
            if ahead:
                sum(p.sum() for p in params).backward()
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, once)
                interrupted(getattr(buckets, failed)().__enter__)
            sum(p.sum() for p in params).backward()
        buckets.synthesize_("sum")
        assert all((p.grad == 4.0 + ahead).all() for p in params)


def test_an_outer_capture_that_could_not_be_mounted_again_loses_the_window(monkeypatch):
    params, buckets = captured()
    original = host.GradHost.mount

    def fails_for_the_outer(self, opened):
        (half_mounted if opened.side is buckets._forget and calls else original)(self, opened)
        calls.append(opened)

    def nested():
        with buckets.forget():
            capture(buckets.retain(), params, 2.0)

    calls = []
    with monkeypatch.context() as patched:
        patched.setattr(host.GradHost, "mount", fails_for_the_outer)
        interrupted(nested)
    assert_lost(params, buckets)


# One row for each state, one column for each action: the next state, or a dash where the action is refused.
TABLE = """
           OPEN       CLOSE      USE        REDUCE   UNSCALE   WRITE     PUBLISH  FAIL    CLEAR
EMPTY      EMPTY      CAPTURING  -          -        -         -         -        BROKEN  EMPTY
CAPTURING  CAPTURING  CAPTURING  CAPTURING  REDUCED  UNSCALED  UPDATING  -        BROKEN  EMPTY
REDUCED    -          -          REDUCED    -        UNSCALED  UPDATING  -        BROKEN  EMPTY
UNSCALED   -          -          UNSCALED   -        UNSCALED  UPDATING  -        BROKEN  EMPTY
UPDATING   -          UPDATING   -          -        -         UPDATING  UPDATED  BROKEN  EMPTY
UPDATED    UPDATED    CAPTURING  -          -        -         -         -        BROKEN  EMPTY
BROKEN     -          BROKEN     -          -        -         -         -        BROKEN  EMPTY
"""
ACTIONS, *ROWS = (line.split() for line in TABLE.strip().splitlines())
CELLS = {
    (State[row[0]], Action[action]): None if cell == "-" else State[cell]
    for row in ROWS
    for action, cell in zip(ACTIONS, row[1:], strict=True)
}
# The calls that lead from a new window to each state.
PATHS = {
    State.EMPTY: [],
    State.CAPTURING: [Action.CLOSE],
    State.REDUCED: [Action.CLOSE, Action.REDUCE],
    State.UNSCALED: [Action.CLOSE, Action.UNSCALE],
    State.UPDATING: [Action.CLOSE, Action.WRITE],
    State.UPDATED: [Action.CLOSE, Action.WRITE, Action.PUBLISH],
    State.BROKEN: [Action.FAIL],
}


def act(found, action):
    """Carries out an action on a window by the method that does it."""
    if action is Action.OPEN:
        with pytest.raises(Entered), found.capture(found.forget):
            raise Entered
    elif action is Action.CLOSE:
        found._go(Action.CLOSE)  # the last step of a capture, which OPEN may refuse
    elif action is Action.REDUCE:
        with found.reducing():
            pass
    elif action is Action.UNSCALE:
        with found.unscaling([0]):
            pass
    elif action is Action.PUBLISH:
        found.publish([None, None])
    elif action is Action.FAIL:
        found.fail("it was stopped")
    else:
        {Action.USE: found.check_ready, Action.WRITE: found.begin, Action.CLEAR: found.zero_}[action]()


class Entered(Exception):
    """A capture was opened."""


WAYS_OUT = {
    State.EMPTY: r"should be captured before.*run its backward",
    State.CAPTURING: "Call synthesize_",
    State.REDUCED: "Call synthesize_, or drop the gradients with zero_",
    State.UNSCALED: "Call synthesize_, or drop the gradients with zero_",
    State.UPDATING: r"a synthesis began and did not end\. Call zero_",
    State.UPDATED: r"should be captured before.*run its backward.*since the last synthesis",
    State.BROKEN: r"it was stopped\. Call zero_",
}


@pytest.mark.parametrize("action", Action, ids=lambda action: action.name)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_every_action_in_every_state(state, action):
    _, buckets = two_parameters()
    found = buckets._window
    for step in PATHS[state]:
        act(found, step)
    assert found.state is state
    after = CELLS[state, action]
    assert found.allows(action) == (after is not None)
    assert NEXT[state].get(action) is after
    if after is not None:
        act(found, action)
        assert found.state is after
        return
    says = "Call synthesize_" if action is Action.PUBLISH else WAYS_OUT[state]
    if state in (State.UPDATING, State.BROKEN):
        says = WAYS_OUT[state]
    with pytest.raises(ValueError, match=says) as refused:
        act(found, action)
    assert "should be" in str(refused.value)
    assert "Found" in str(refused.value)
    assert found.state is state


def test_the_state_is_changed_by_the_window_alone():
    _, buckets = two_parameters()
    for name in ("state", "agreed"):
        with pytest.raises(AttributeError):
            setattr(buckets._window, name, None)


@pytest.mark.parametrize("began", [State.EMPTY, State.UPDATED])
def test_a_capture_that_reached_nothing_leaves_the_state_as_it_was(began):
    params, buckets = two_parameters()
    for step in PATHS[began]:
        act(buckets._window, step)
    with pytest.raises(ValueError, match="should have a backward"), buckets.forget():
        pass
    with pytest.raises(Entered), buckets.retain():
        raise Entered
    assert buckets._window.state is began
    assert_usable(params, buckets)


def test_no_capture_is_opened_inside_another_after_a_failed_one():
    params, buckets = two_parameters()

    def failed():
        with buckets.retain():
            sum(p.sum() for p in params).backward()
            raise INTERRUPTED

    with buckets.forget():
        sum(p.sum() for p in params).backward()
        interrupted(failed)
        for side in (buckets.forget, buckets.retain):
            with pytest.raises(ValueError, match=r"should be whole.*stop.*Call zero_"):
                side().__enter__()
    assert_lost(params, buckets)
