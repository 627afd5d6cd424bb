"""The rules as an aggregator and as a weighting of TorchJD (0.18 or newer).

    from torchjd.autojac import backward, jac_to_grad

    aggregator = SynthesisAggregator("sago")
    backward([forget_loss, retain_loss])  # rows in this order
    jac_to_grad(model.parameters(), aggregator)

TorchJD holds the Jacobian of all parameters and, for an aggregator, a concatenated copy of it.
`sago.GradientBuckets` holds two gradients. The adapters are for code that already uses TorchJD, and for
comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchjd.aggregation import Aggregator, Weighting

from sago.core.pairs import Weight
from sago.core.report import SynthesisReport
from sago.rules import Rule, evaluate, resolve
from sago.synthesis import synthesize_


class SynthesisAggregator(Aggregator):
    """`sago.synthesize(matrix[0], matrix[1], rule, gamma, alpha)[0]`: an aggregator of two rows.

    Row 0 of the matrix is the forget gradient as minimised, row 1 the retain gradient. Pass the losses to
    `torchjd.autojac.backward` or `mtl_backward` in this order. The matrix is bf16, fp16, fp32 or fp64 and is
    not modified. The result is a new vector of its dtype, without a graph.

    Args:
        rule: A name or a `sago.Rule`.
        gamma, alpha: Weights of forget and retain: floats, or 0-d tensors on the device of the matrix.
        numels: The number of elements of each tensor, in the order of the tensors in `jac_to_grad`. TorchJD
            passes all tensors as one row. Without `numels` a rule with inner products over each tensor
            (`pcgrad`) takes them over the whole row, as `pcgrad_global` does.
        stats: Whether `report` has statistics that the rule itself does not need.

    Attributes:
        report: The `sago.SynthesisReport` of the last call, or None before the first call.

    Raises:
        ValueError: For a matrix without exactly two rows, or whose columns are not those of `numels`.

    Source: arXiv 2604.14808; TorchJD is arXiv 2406.16232.
    """

    def __init__(
        self,
        rule: str | Rule = "sago",
        gamma: Weight = 1.0,
        alpha: Weight = 1.0,
        numels: Iterable[int] | None = None,
        stats: bool = False,
    ) -> None:
        super().__init__()
        self.rule = resolve(rule)
        self.gamma = gamma
        self.alpha = alpha
        self.numels = None if numels is None else list(numels)
        self.stats = stats
        self.report: SynthesisReport | None = None

    def forward(self, matrix: Tensor, /) -> Tensor:
        if matrix.shape[0] != 2:
            raise ValueError(
                "Parameter `matrix` should have two rows, the forget and the retain gradient. "
                f"Found {matrix.shape[0]}."
            )
        columns = matrix.shape[1]
        numels = [columns] if self.numels is None else self.numels
        if sum(numels) != columns:
            raise ValueError(
                f"Parameter `matrix` should have {sum(numels)} columns, the sum of `numels`. Found {columns}."
            )
        update = torch.empty_like(matrix[0], requires_grad=False)
        forget, retain, out = (row.split(numels) for row in (*matrix.detach(), update))
        self.report = synthesize_(
            forget, retain, self.rule, self.gamma, self.alpha, out=out, stats=self.stats
        )
        return update

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rule={self.rule.name!r}, gamma={self.gamma}, alpha={self.alpha})"


class SynthesisWeighting(Weighting):
    """The coefficients `(a, b)` of an ungated rule, `[2]`, from a Gramian `[2, 2]` in fp32 or fp64.

    Use it with `torchjd.autogram`, which never holds the Jacobian, or as
    `GramianWeightedAggregator(SynthesisWeighting("blur"))`, which `jac_to_grad` applies without concatenating
    the Jacobians. The Gramian is that of all parameters together, so a rule of tensor scope treats them as
    one tensor. The coefficients are computed in fp64.

    Args:
        rule: A name or a `sago.Rule` that is not gated: a gated rule decides for each element.
        gamma, alpha: Weights of forget and retain, as in `SynthesisAggregator`.

    Raises:
        ValueError: For a gated rule, and for a Gramian of another shape.
    """

    def __init__(self, rule: str | Rule = "pcgrad_global", gamma: Weight = 1.0, alpha: Weight = 1.0) -> None:
        super().__init__()
        self.rule = resolve(rule)
        if self.rule.classes > 1:
            raise ValueError(
                "Parameter `rule` should be a rule that is not gated, because weights are the same for all "
                f"elements. Found {self.rule.name!r}. Use SynthesisAggregator."
            )
        self.gamma = gamma
        self.alpha = alpha

    def forward(self, gramian: Tensor, /) -> Tensor:
        if gramian.shape != (2, 2):
            raise ValueError(f"Parameter `gramian` should have shape [2, 2]. Found {list(gramian.shape)}.")
        products = torch.stack([gramian[0, 0], gramian[0, 1], gramian[1, 1]]).detach().double()
        found = evaluate(self.rule, products[None], self.gamma, self.alpha, 0.0, gramian.device)
        return found.values[0].to(gramian.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rule={self.rule.name!r}, gamma={self.gamma}, alpha={self.alpha})"
