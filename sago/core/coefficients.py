"""The coefficients of an update: those of the rule, changed by clipping, scales and NaN or inf.

The floors of `retain_floor` are here, too, because they follow from the same sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sago.backends import sums
from sago.core.pairs import Call
from sago.core.report import is_noise
from sago.rules import Coefficients, Rule, evaluate


def gram(rule: Rule, table: Tensor) -> Tensor | None:
    """The sums that `evaluate` takes, fp64 `[rows, >= 3]`; None if the rule reads none."""
    if rule.scope == "element":
        return None
    found = sums.products(table)
    if rule.by_class:
        found = torch.cat([found, sums.class_rows(table, rule.classes)], dim=1)
    if rule.scope == "global" and len(found) > 1:
        found = found.sum(0, keepdim=True).expand(len(found), -1)
    return found


def limited(call: Call, table: Tensor | None, gram: Tensor | None, device: torch.device) -> Coefficients:
    """The coefficients that multiply the gradients in memory, after `max_norm`, "zero_update" and
    `call.scales`, and the new state of the rule.

    Clipping equals `torch.nn.utils.clip_grad_norm_`, except that a norm that is not finite gives NaN.
    """
    values, terms, state = evaluate(call.rule, gram, call.gamma, call.alpha, call.eps, device, call.state)
    finite = values.isfinite().all()
    if table is not None and call.max_norm is not None:
        norm = of_update(call.nonfinite, table, values)[0].sum().sqrt()
        clip = (call.max_norm / (norm + 1e-6)).clamp(max=1.0)
        # An infinite norm would make the clip 0, and coefficients of 0 would hide the inf. So it becomes NaN.
        values = values * torch.where(norm.isfinite(), clip, torch.nan)
        finite = finite & norm.isfinite()
    if table is not None and call.nonfinite == "zero_update":
        values = torch.where(finite & ~sums.nonfinite(table).any(), values, 0.0)
    forget, retain = call.scales
    values = torch.stack([values[:, 0::2] * forget, values[:, 1::2] * retain], dim=2).flatten(1)
    # A clip of NaN also reaches coefficients that are literal zeros in the rule.
    kept = "zero" if call.max_norm is None else None
    return Coefficients(values, tuple(term if term == kept else "any" for term in terms), state)


def floors(call: Call, table: Tensor, elements: Tensor) -> Tensor:
    """The magnitude of each row below which an element of retain, as it lies in memory, does not conflict.

    It is `retain_floor` times the root mean square of the retain gradient, and inf if that gradient is
    rounding noise. It is 0 if the root mean square is not finite.
    """
    ff, _, rr = sums.products(table).unbind(1)
    if call.rule.scope == "global":
        ff, rr, elements = (x.sum().expand_as(x) for x in (ff, rr, elements))
    found = call.retain_floor * (rr / elements).sqrt()
    found = torch.where(found.isfinite(), found / call.scales[1], 0.0)
    return torch.where(is_noise(ff, rr), torch.inf, found)


def of_update(nonfinite: str | None, table: Tensor, values: Tensor) -> list[Tensor]:
    """`<u,u>, <u,f>, <u,r>` of every row; NaN where a NaN or inf in a gradient propagates."""
    found = sums.of_update(table, values)
    if nonfinite == "propagate":
        lost = sums.nonfinite(table)
        found = [torch.where(lost, torch.nan, x) for x in found]
    return found
