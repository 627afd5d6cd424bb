"""Hooks of other code that run when a gradient has been accumulated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from sago.private import require

HOOKS = "_post_accumulate_grad_hooks"  # of a tensor: None or a dict
_TESTED = "torch 2.6 to 2.14"
# The hook of its `CPUOffloadOptimizer` copies the gradient for the step, which then reads nothing else.
_OFFLOADING = "torchao.optim"


def check_hooks(names: Sequence[str], params: Sequence[Any]) -> None:
    """Warns of hooks that were registered with `register_post_accumulate_grad_hook`.

    They run inside the captures, where `p.grad` is the gradient of one side, and never see the update.

    Raises:
        ValueError: For a hook of an optimizer that steps with the gradients that the hook has copied.
    """
    seen = []
    for name, p in zip(names, params, strict=True):
        require(p, [HOOKS], "torch", _TESTED)
        for hook in (getattr(p, HOOKS) or {}).values():
            where = _where(hook)
            if where.startswith(_OFFLOADING):
                raise ValueError(
                    f"Parameter `{name}` should be in an optimizer that reads `p.grad` in its step. Found "
                    f"the hook `{where}`, which copies the gradient in each backward: the optimizer would "
                    "step with the gradient of one side. Use an optimizer without offloading to the CPU."
                )
            seen.append((name, where))
    if seen:
        name, where = seen[0]
        warnings.warn(
            f"Parameter `{name}` should have no hook that uses `p.grad` after the backward. Found "
            f"`{where}`, registered with register_post_accumulate_grad_hook. In a capture `p.grad` is the "
            "gradient of one side, and the hook does not see the update. Remove the hook, unless it does not "
            "matter which gradient it sees.",
            RuntimeWarning,
            stacklevel=4,  # this function, `_check_around`, `forget` or `retain`, and its caller
        )


def check_not_taken(name: str, p: Any) -> None:
    """Raises if a hook of other code may have taken the gradient before the only hook of the buckets."""
    require(p, [HOOKS], "torch", _TESTED)
    if len(getattr(p, HOOKS) or ()) > 1:
        raise ValueError(
            f"`{name}.grad` should be the gradient that the backward has just made. Found None: another hook "
            "has taken it. Make the buckets without `one_copy`."
        )


def _where(hook: Any) -> str:
    """The module and the name of the function of a hook, or of the class of a hook without a name."""
    function = hook.func if isinstance(hook, partial) else hook
    found = function if hasattr(function, "__qualname__") else type(function)
    # Methods of built-in classes have no module.
    module = getattr(found, "__module__", None) or type(function).__module__
    return f"{module}.{found.__qualname__}"
