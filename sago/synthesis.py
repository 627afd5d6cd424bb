"""Synthesis of lists: what is given is checked, laid out and synthesized."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from sago.arguments import NEW, Gradients, ReduceGram, Weight, check_backend, check_call, check_pairs
from sago.pipeline import Pipeline, count_versions
from sago.report import SynthesisReport
from sago.rules import Rule, resolve
from sago.seen import find


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
            fp32 or fp64, of any shape. None is a zero gradient. Of DTensors each rank works on its shards; a
            rule or report with inner products takes one all-reduce of a small table over their mesh.
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
            gradients, in place or as its result; see `sago.distributed.SumOver`. Called once, if any sums
            are taken. Not needed for DTensors, where it takes the place of the all-reduce.
        backend: "triton" (the default on CUDA and ROCm), "compiled" (the default on the CPU) or "reference".

    Returns:
        The statistics, on the device. Reading them is the only thing that waits.

    Raises:
        ValueError, TypeError: For input that cannot be right; nothing has been written then.

    Source: arXiv 2604.14808 (SAGO and the retain-first use of PCGrad); rules in `sago.reference`.
    """
    rule = resolve(rule)
    check_backend(backend)
    pipeline, updates = find(forget, retain, rule, out, groups, reduce_gram, backend)
    devices = [part.device for part in pipeline.parts]
    report = pipeline.synthesize(check_call(rule, gamma, alpha, eps, stats, reduce_gram, devices))
    count_versions(updates)
    return report


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
    rule = resolve(rule)
    pairs = check_pairs(forget, retain, rule, NEW, groups, reduce_gram, backend)
    call = check_call(rule, gamma, alpha, eps, stats, reduce_gram, pairs.backends)
    report = Pipeline(pairs, pairs.numel()).synthesize(call)
    single = isinstance(forget, Tensor) and isinstance(retain, Tensor)
    return (pairs.updates[0] if single else pairs.updates), report
