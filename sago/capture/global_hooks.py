"""Hooks that torch calls for all modules or optimizers of the process, and that end with an object."""

from __future__ import annotations

import weakref

from torch.utils.hooks import RemovableHandle


def end_with(owner: object, *handles: RemovableHandle) -> weakref.finalize[..., object]:
    """Ends hooks when `owner` is deleted. The next call of this function removes them.

    The hooks must do nothing in between. Garbage collection may delete the owner while torch iterates over
    its hooks, and torch raises if one is removed then.
    """
    while _ended:
        _ended.pop().remove()
    return weakref.finalize(owner, _ended.extend, handles)


_ended: list[RemovableHandle] = []
