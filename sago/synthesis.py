"""The two public functions: checks, then gram, coefficients, combine, and the report."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sago import compiled, reference
from sago.arguments import NEW, Arguments, Gradients, Weight, check, is_dense
from sago.report import SynthesisReport
from sago.rules import RULES, Rule, evaluate

ReduceGram = Callable[[Tensor], Tensor | None]


def synthesize_(
    forget: Gradients,
    retain: Gradients,
    rule: str | Rule = "sago",
    gamma: Weight = 1.0,
    alpha: Weight = 1.0,
    out: Gradients | str | None = None,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
    stats: bool = True,
    reduce_gram: ReduceGram | None = None,
    backend: str | None = None,
) -> SynthesisReport:
    """`retain = where(forget * retain < 0, alpha * retain, gamma * forget)`, or as another rule has it.

    In general `out_i = a_c*f_i + b_c*r_i` where `f_i` and `r_i` have strictly opposite signs and
    `a*f_i + b*r_i` elsewhere, with the coefficients of the rule (`sago.list_rules()`, README). Nothing
    is read back from the device, and on the CPU and on GPUs with Triton nothing of the gradients' size is
    allocated, except copies of tensors that are not dense in memory.

    Args:
        forget: Gradients of the forget loss as minimised: a tensor or a sequence of tensors, bf16, fp16,
            fp32 or fp64, of any shape. None is a zero gradient.
        retain: Gradients of the retain loss, pairwise of the same shape and device as `forget`; the dtype
            may differ. Overwritten unless `out` says otherwise.
        rule: A name or a `sago.Rule`.
        gamma, alpha: Weights of forget and retain: floats, or 0-d tensors on the gradients' device.
        out: None to write into `retain`, `"forget"` to write there, or tensors to write to. An output may
            be exactly the forget or retain gradient of its index and may share no other memory.
        groups: One hashable a tensor. Tensors with equal keys form one group for rules of tensor scope
            and one row of the report.
        eps: Added to `<f,f>` and `<r,r>` before the rule sees them. 1e-10 repeats the paper's released code.
        stats: Whether to count conflicts and non-finite elements, and to take the inner products where the
            rule itself does not need them.
        reduce_gram: Sums an fp64 tensor `[groups, k]` over the ranks that hold the other shards of the
            gradients, in place or as its result. Called once, if any sums are taken.
        backend: "triton" (the default on CUDA and ROCm), "compiled" (the default on the CPU) or "reference".

    Returns:
        The statistics, on the device. Reading them is the only thing that waits.

    Raises:
        ValueError, TypeError: For input that cannot be right; nothing has been written then.

    Source: arXiv 2604.14808 (SAGO and the retain-first use of PCGrad); rules in `sago.reference`.
    """
    call = check(forget, retain, rule, gamma, alpha, out, groups, eps, reduce_gram, backend)
    return _synthesize(call, stats, reduce_gram)


def synthesize(
    forget: Gradients,
    retain: Gradients,
    rule: str | Rule = "sago",
    gamma: Weight = 1.0,
    alpha: Weight = 1.0,
    groups: Sequence[Hashable] | None = None,
    eps: float = 0.0,
    stats: bool = True,
    reduce_gram: ReduceGram | None = None,
    backend: str | None = None,
) -> tuple[Any, SynthesisReport]:
    """`synthesize_` into new tensors: `forget` and `retain` are left as they are.

    Returns:
        The updates, each of retain's dtype (forget's where retain is None; None where both are): a tensor
        if `forget` and `retain` are tensors, else a list. And the report.
    """
    call = check(forget, retain, rule, gamma, alpha, NEW, groups, eps, reduce_gram, backend)
    report = _synthesize(call, stats, reduce_gram)
    single = isinstance(forget, Tensor) and isinstance(retain, Tensor)
    return (call.updates[0] if single else call.updates), report


class _Part(NamedTuple):
    """The pairs on one device, and the module whose `gram` and `combine` run there."""

    module: ModuleType
    batch: Any
    device: torch.device
    copies: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def _synthesize(call: Arguments, stats: bool, reduction: ReduceGram | None) -> SynthesisReport:
    rule = call.rule
    reduce_gram = None if reduction is None else _checked(reduction)
    if "reference" in call.backends.values():
        return reference.synthesize_(
            call.forget,
            call.retain,
            rule.name if RULES.get(rule.name) is rule else rule,
            call.gamma,
            call.alpha,
            call.out,
            [call.keys[row] for row in call.rows],
            call.eps,
            stats,
            reduce_gram,
        )
    parts = [_part(call, device, backend) for device, backend in call.backends.items()]
    numel = [0] * len(call.keys)
    for row, o in zip(call.rows, call.out, strict=True):
        numel[row] += 0 if o is None else o.numel()

    from_gram = rule.scope != "element"
    sums = (9 if rule.gated else 6) if stats else 3 if from_gram else 0
    table: Tensor | None = None
    gram: Tensor | None = None
    elements: Tensor | list[int] = numel
    # Sums that go through `reduce_gram` are taken ahead of the update: it may raise.
    ahead = from_gram or (sums > 0 and reduce_gram is not None)
    if ahead:
        table, elements = _reduced([part.module.gram(part.batch, sums) for part in parts], numel, reduce_gram)
    if from_gram and table is not None:
        gram = table[:, 0:3] + table[:, 6:9] if sums == 9 else table
        if rule.scope == "global" and len(call.keys) > 1:
            gram = gram.sum(0, keepdim=True).expand(len(call.keys), -1)
    taken = []
    for part in parts:
        gamma, alpha, local_gram = (
            x.to(part.device) if isinstance(x, Tensor) else x for x in (call.gamma, call.alpha, gram)
        )
        taken.append(
            part.module.combine(part.batch, rule, gamma, alpha, call.eps, local_gram, 0 if ahead else sums)
        )
        for target, copy in part.copies:
            target.copy_(copy)
    if sums and not ahead:
        table, elements = _reduced(taken, numel, None)
    for o in call.updates:
        if o is not None and not o.is_inference():
            torch.autograd.graph.increment_version(o)
    if table is None:
        return SynthesisReport(rule.name, call.keys, elements, dict)
    sums_of_inputs = table
    # A weight on the device may have another value by the time the report is read.
    gamma, alpha = (w.clone() if isinstance(w, Tensor) else w for w in (call.gamma, call.alpha))
    return SynthesisReport(
        rule.name, call.keys, elements, lambda: _columns(rule, sums_of_inputs, gram, gamma, alpha, call.eps)
    )


def _part(call: Arguments, device: torch.device, backend: str) -> _Part:
    module = import_module("sago.kernels") if backend == "triton" else compiled
    forget, retain, out, rows, copies = [], [], [], [], []
    for f, r, o, row in zip(call.forget, call.retain, call.out, call.rows, strict=True):
        if o is None or o.device != device or o.numel() == 0:
            continue
        tensors = [t for t in (f, r, o) if t is not None]
        if any(t.stride() != o.stride() or t.is_neg() or not is_dense(t) for t in tensors):
            target = o
            f, r = (t if t is None else t.resolve_neg().contiguous() for t in (f, r))
            o = torch.empty_like(o, memory_format=torch.contiguous_format)
            copies.append((target, o))
        forget.append(f)
        retain.append(r)
        out.append(o)
        rows.append(row)
    return _Part(module, module.Batch(device, forget, retain, out, rows, len(call.keys)), device, copies)


def _reduced(
    tables: list[Tensor], numel: list[int], reduce_gram: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | list[int]]:
    """The tables of all devices and, through `reduce_gram`, of all ranks added up; elements a row."""
    table = tables[0]
    for other in tables[1:]:
        table = table + other.to(table.device)
    if reduce_gram is None:
        return table, numel
    elements = torch.tensor(numel, dtype=table.dtype, device=table.device)
    table = reduce_gram(torch.cat([table, elements[:, None]], dim=1))
    return table[:, :-1], table[:, -1]


def _checked(reduce_gram: ReduceGram) -> Callable[[Tensor], Tensor]:
    """`reduce_gram`, returning its table also where it works in place."""

    def reduce(table: Tensor) -> Tensor:
        reduced = reduce_gram(table)
        if reduced is None:
            return table
        if not isinstance(reduced, Tensor) or reduced.shape != table.shape:
            found = tuple(reduced.shape) if isinstance(reduced, Tensor) else type(reduced).__name__
            raise ValueError(
                f"Parameter `reduce_gram` should return None or a tensor of shape {tuple(table.shape)}. "
                f"Found {found}."
            )
        return reduced.to(table).contiguous()

    return reduce


def _columns(
    rule: Rule, table: Tensor, gram: Tensor | None, gamma: Weight, alpha: Weight, eps: float
) -> dict[str, Tensor]:
    """The report's sums from the table; those of the update follow from the coefficients."""
    outside = table[:, 0:3]
    inside = table[:, 6:9] if table.shape[1] >= 9 else torch.zeros_like(outside)
    columns = dict(zip(("ff", "fr", "rr"), (outside + inside).unbind(1), strict=True))
    if table.shape[1] >= 6:
        columns.update(
            zip(("conflicts", "nonfinite_forget", "nonfinite_retain"), table[:, 3:6].unbind(1), strict=True)
        )
    if not rule.gated or table.shape[1] >= 9:
        coefficients, _ = evaluate(rule, gram, gamma, alpha, eps, table.device)
        a, b = coefficients[:, -2:].unbind(1)
        a_c, b_c = coefficients[:, :2].unbind(1)
        products = [x + y for x, y in zip(_products(a, b, outside), _products(a_c, b_c, inside), strict=True)]
        columns.update(zip(("uu", "uf", "ur"), products, strict=True))
    return columns


def _products(a: Tensor, b: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`<u,u>, <u,f>, <u,r>` of `u = a*f + b*r`, a gradient whose coefficient is 0 left out."""
    ff, fr, rr = gram.unbind(1)

    def times(coefficient: Tensor, product: Tensor) -> Tensor:
        return torch.where(coefficient == 0, 0.0, coefficient * product)

    uu = times(a * a, ff) + times(2 * a * b, fr) + times(b * b, rr)
    return uu, times(a, ff) + times(b, fr), times(a, fr) + times(b, rr)
