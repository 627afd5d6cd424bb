"""`synthesize_`, `synthesize` and `Plan`: compute the updates of lists of gradients."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sago.backends.choose import check_backend
from sago.backends.streams import is_capturing
from sago.core.checks import NEW, Gradients, ReduceGram, check_call, check_pairs, check_weight
from sago.core.pairs import Weight
from sago.core.pipeline import Pipeline, count_versions
from sago.core.report import SynthesisReport
from sago.core.seen import find
from sago.core.transforms import refuse_transforms
from sago.in_graph import InGraph
from sago.ranks import dtensor
from sago.rules import Rule, resolve


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
    retain_floor: float = 0.0,
) -> SynthesisReport:
    """`retain = where(forget * retain < 0, alpha * retain, gamma * forget)` for the rule "sago".

    For every rule `out_i = a_c*f_i + b_c*r_i` where `f_i` and `r_i` have strictly opposite signs, and
    `a*f_i + b*r_i` elsewhere, with the coefficients of the rule. Nothing is read back from the device. With
    the backends "triton" and "compiled" no memory of the gradients' size is allocated, except for copies of
    tensors that are not dense in memory.

    Args:
        forget: Gradients of the forget loss as minimised: a tensor or a sequence of tensors, bf16, fp16,
            fp32 or fp64, of any shape. None is a zero gradient. For DTensors each rank works on its shards,
            and inner products take one all-reduce of a small table over the mesh.
        retain: Gradients of the retain loss, pairwise of the same shape and device as `forget`; the dtype
            may differ. The update overwrites them, unless `out` is given.
        rule: A name or a `sago.Rule`.
        gamma, alpha: Weights of forget and retain: floats, or 0-d tensors on the gradients' device.
        out: None to write into `retain`, `"forget"` to write into `forget`, or tensors to write to. An output
            may be the forget or retain gradient of the same index. It must not share memory with any other
            tensor.
        groups: One hashable key for each tensor. Tensors with equal keys form one group for rules of tensor
            scope, and one row of the report.
        eps: Added to `<f,f>` and `<r,r>` before the rule sees them. 1e-10 repeats the paper's released code.
        stats: Whether to count conflicts and non-finite elements, and to compute the inner products even if
            the rule does not need them.
        reduce_gram: A function that sums an fp64 tensor `[groups, k]` over the ranks that hold the other
            shards of the gradients. It works in place or returns the result; see `sago.distributed.SumOver`.
            It is called once, if any sums are computed, and before that once for `retain_floor`. DTensors do
            not need it. If it is given, it replaces their all-reduce.
        backend: "triton" (the default on CUDA and ROCm), "compiled" (the default on the CPU) or "reference".
        retain_floor: A dead zone of the gate, for retain gradients with elements that are rounding noise. An
            element `r_i` counts as 0 in the gate, so that it does not conflict, if `|r_i| < retain_floor *
            (r * r).mean().sqrt()`, with the mean over the group. If `|r| < 2**-16 * |f|` in a group, the
            whole retain gradient of the group is noise, and no element conflicts. The coefficients still
            apply to `r_i`. The gradients are read once more for the norms, which are right for magnitudes
            from 1e-18 to 1e18. 0 is no dead zone.

    Returns:
        The report, whose statistics are on the device. Only reading it waits for the device.

    Raises:
        ValueError, TypeError: For invalid input, before anything is written.

    Source: arXiv 2604.14808 (SAGO and the retain-first use of PCGrad); rules in `sago.reference`.
    """
    rule = resolve(rule)
    if torch.compiler.is_compiling():
        *_, report = _in_graph(
            forget, retain, rule, gamma, alpha, out, groups, eps, stats, reduce_gram, backend, retain_floor
        )
        return report
    refuse_transforms()  # TorchDynamo cannot trace it
    check_backend(backend)
    pipeline, updates, lists = find(forget, retain, rule, out, groups, reduce_gram, backend, dtensor)
    devices = [there.device for there in pipeline.devices]
    call = check_call(rule, gamma, alpha, eps, stats, reduce_gram, devices, retain_floor=retain_floor)
    if lists is not None:
        pipeline.bind(*lists)
    try:
        report = pipeline.synthesize(call)
    finally:
        if lists is not None:
            pipeline.release()
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
    retain_floor: float = 0.0,
) -> tuple[Any, SynthesisReport]:
    """Like `synthesize_`, but returns new tensors. `forget` and `retain` are not modified.

    Returns:
        The updates and the report. The updates are a tensor if `forget` and `retain` are tensors, and a list
        otherwise. An update has the dtype of retain, or of forget if retain is None. It is None if both are
        None.
    """
    rule = resolve(rule)
    if torch.compiler.is_compiling():
        updates, report = _in_graph(
            forget, retain, rule, gamma, alpha, NEW, groups, eps, stats, reduce_gram, backend, retain_floor
        )
    else:
        refuse_transforms()
        pairs = check_pairs(forget, retain, rule, NEW, groups, reduce_gram, backend, dtensor)
        devices = pairs.backends
        call = check_call(rule, gamma, alpha, eps, stats, reduce_gram, devices, retain_floor=retain_floor)
        updates, report = pairs.updates, Pipeline(pairs, pairs.numel()).synthesize(call)
    single = isinstance(forget, Tensor) and isinstance(retain, Tensor)
    return (updates[0] if single else updates), report


_in_graph = InGraph(synthesize_, dtensor)


class Plan:
    """Synthesizes the same tensors many times, but checks them and makes their layout only once.

        plan = sago.Plan(forget_grads, retain_grads, rule="pcgrad")
        for batch in batches:
            ...  # write new gradients into the same tensors
            report = plan.synthesize_(gamma=1.0, alpha=1.0)

    A call can be captured in a CUDA graph. A replay reads the current values of the gradients, and of `gamma`
    and `alpha` if they are tensors on the device. Keep the plan alive as long as the graph. The first read of
    a report gives the numbers of the latest replay, and the report keeps them.

    Args:
        forget, retain, rule, out, groups, eps, stats, reduce_gram, backend, retain_floor: As in
            `sago.synthesize_`. The plan keeps the memory that the tensors have now. It does not notice when a
            tensor is resized or its `data` is replaced: make a new plan then.

    Use a plan in one thread at a time. A call does not increment the version counters of the outputs, so
    autograd does not notice that a saved tensor was overwritten. `sago.synthesize_` has neither limit. Any
    stream may run a plan. At its first call, a stream waits for the one that the plan was made on. The
    caller orders the streams with respect to the gradients. A plan cannot be copied or pickled.

    Raises:
        ValueError, TypeError: As `sago.synthesize_`, when the plan is made. ValueError if it is made while a
            CUDA graph is captured.
    """

    def __init__(
        self,
        forget: Gradients,
        retain: Gradients,
        rule: str | Rule = "sago",
        out: Gradients | str | None = None,
        groups: Sequence[Hashable] | None = None,
        eps: float = 0.0,
        stats: bool = True,
        reduce_gram: ReduceGram | None = None,
        backend: str | None = None,
        retain_floor: float = 0.0,
    ) -> None:
        refuse_transforms()
        rule = resolve(rule)
        self._pairs = check_pairs(forget, retain, rule, out, groups, reduce_gram, backend, dtensor)
        devices = self._pairs.backends
        self._call = check_call(rule, 1.0, 1.0, eps, stats, reduce_gram, devices, retain_floor=retain_floor)
        if rule.seed is not None:
            raise ValueError(
                "Parameter `rule` should have no random gate for a plan, whose calls would all draw the same "
                f"numbers. Found {rule.name!r}. Use sago.GradientBuckets, which counts the steps."
            )
        if is_capturing(self._pairs.backends):
            raise ValueError(
                "A plan should be made before the capture of a CUDA graph. Found that a capture has begun. "
                "Make the plan outside of the capture, and call its `synthesize_` inside."
            )
        # Views keep the memory even if the data of a tensor is replaced.
        pairs = self._pairs
        pairs.forget, pairs.retain, pairs.out = map(_views, (pairs.forget, pairs.retain, pairs.out))
        self._pipeline = Pipeline(self._pairs, self._pairs.numel())

    def synthesize_(self, gamma: Weight = 1.0, alpha: Weight = 1.0) -> SynthesisReport:
        """Writes the update of the current gradients. `gamma` and `alpha` are as in `sago.synthesize_`."""
        refuse_transforms()
        self._call.rule.check_helpers()
        devices = self._pairs.backends
        call = self._call._replace(
            gamma=check_weight("gamma", gamma, devices), alpha=check_weight("alpha", alpha, devices)
        )
        return self._pipeline.synthesize(call)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A sago.Plan should not be copied or pickled, because it works on the memory of the tensors that "
            "it was made for: keep it outside of what is copied, and make a new plan for other tensors."
        )

    def __repr__(self) -> str:
        count = sum(o is not None for o in self._pairs.out)
        return f"Plan({count} tensors, rule {self._call.rule.name!r})"


def _views(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]
