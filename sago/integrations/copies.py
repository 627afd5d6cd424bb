"""Whether an optimizer may step on copies of parameters, so that it trains others than it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from sago.integrations.once import warn_once


def may_hold_copies(optimizer: Sequence[Tensor], model: Iterable[Tensor]) -> bool:
    """Whether tensors of the optimizer may be copies of parameters that it does not hold.

    Copies in fp32 or on another device, and flat ones, are no parameters of the model. A tensor with fewer
    elements than each of the parameters is no copy. It may be a learned weight of a loss.

    Args:
        optimizer: The tensors in the optimizer.
        model: The parameters of the model, frozen ones included.
    """
    held, params = {id(t) for t in optimizer}, {id(p): p for p in model}
    others = [t for t in optimizer if id(t) not in params]
    left = [p for key, p in params.items() if p.requires_grad and key not in held]
    if not others or not left:
        return False
    smallest = min(p.numel() for p in left)
    if len(others) < len(optimizer) and all(t.numel() < smallest for t in others):
        return False
    warn_once(
        "copies",
        f"the optimizer has {len(others)} tensors that are no parameters of the model, and does not have "
        f"{len(left)} of the parameters that require grad. The tensors may be copies of these, so all "
        "parameters are treated as trained. Freeze those that are not with requires_grad_(False).",
    )
    return True
