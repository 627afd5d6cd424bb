"""`Plan`: a synthesis that is checked and laid out once, and run as often as its gradients are renewed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from sago.arguments import Gradients, ReduceGram, Weight, check_call, check_pairs, check_weight
from sago.cache import is_capturing
from sago.pipeline import Pipeline
from sago.report import SynthesisReport
from sago.rules import Rule, resolve


class Plan:
    """`sago.synthesize_` of the same tensors, again and again: nothing is checked or rebuilt between calls.

        plan = sago.Plan(forget_grads, retain_grads, rule="pcgrad")
        for batch in batches:
            ...  # writes new gradients into the same tensors
            report = plan.synthesize_(gamma=1.0, alpha=1.0)

    A call can be captured in a CUDA graph. A replay works on what is then in the gradients, and in `gamma`
    and `alpha` if they are tensors on the device. It needs the plan alive. A report has the numbers of the
    replay before it was first read.

    Args:
        forget, retain, rule, out, groups, eps, stats, reduce_gram, backend: As in `sago.synthesize_`. The
            memory that the tensors have now is kept alive and worked on: make a new plan when one is resized
            or its `data` replaced.

    Calls are for one thread and one stream at a time. They do not count as a version of the outputs, so
    autograd does not notice that a tensor it saved was overwritten. `sago.synthesize_` takes care of both.
    A plan cannot be copied or pickled.

    Raises:
        ValueError, TypeError: As `sago.synthesize_`, when the plan is made; also if it is made in the capture
            of a CUDA graph.
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
    ) -> None:
        rule = resolve(rule)
        self._pairs = check_pairs(forget, retain, rule, out, groups, reduce_gram, backend)
        self._call = check_call(rule, 1.0, 1.0, eps, stats, reduce_gram, self._pairs.backends)
        if is_capturing(self._pairs.backends):
            raise ValueError("A plan should be made before the capture of a CUDA graph. Found a capture.")
        # Views keep the memory, also when somebody replaces the data of a tensor.
        pairs = self._pairs
        pairs.forget, pairs.retain, pairs.out = map(_views, (pairs.forget, pairs.retain, pairs.out))
        self._pipeline = Pipeline(self._pairs, self._pairs.numel())

    def synthesize_(self, gamma: Weight = 1.0, alpha: Weight = 1.0) -> SynthesisReport:
        """Writes the update of what is in the gradients now; `gamma` and `alpha` as in `sago.synthesize_`."""
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
