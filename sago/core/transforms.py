"""Refuses calls inside transforms of torch.func, forward-mode AD and `torch.jit.trace`.

They follow the operations of torch. They do not see a kernel that writes to memory, so that their results
would be wrong.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

_log = logging.getLogger("sago")


def _private_names() -> tuple[Any, Any]:
    """The function that tells which transform is active, and the module with the level of forward-mode AD.

    They use private names of torch. Without these names, only the tensors of a transform are refused.
    """
    try:
        from torch._C._functorch import TransformType, peek_interpreter_stack

        if forward_ad._current_level < 0 and hasattr(TransformType, "Vmap"):
            return peek_interpreter_stack, forward_ad
        reason = "its names have other values"
    except (ImportError, AttributeError, TypeError) as error:
        reason = repr(error)
    _log.warning(
        "sago: torch %s does not tell whether a transform of torch.func is active (%s). Tensors of a "
        "transform are refused without its name.",
        torch.__version__,
        reason,
    )
    return lambda: None, SimpleNamespace(_current_level=-1)


_innermost, _levels = _private_names()


def refuse_transforms() -> None:
    """Raises ValueError inside vmap, grad, jvp or functionalize, a dual level, or a trace."""
    transform = _innermost()
    if transform is not None:
        name = f"torch.func.{transform.key().name.lower()}"
        raise ValueError(
            "Gradients should be synthesized outside of the transforms of torch.func, which do not see "
            f"writes to memory. Found a call inside {name}. Return both gradients from the transformed "
            "function, and synthesize them afterwards."
        )
    if _levels._current_level >= 0:
        raise ValueError(
            "Gradients should be synthesized outside of forward-mode AD, which does not see writes to "
            "memory. Found a call inside torch.autograd.forward_ad.dual_level. Synthesize after the block."
        )
    if torch._C._is_tracing():
        raise ValueError(
            "Gradients should be synthesized outside of a trace, which would keep sums of the example as "
            "constants. Found a call inside torch.jit.trace. Trace the model alone."
        )
