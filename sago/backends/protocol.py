"""The protocol of a backend: a module with `Batch`, `gram` and `combine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sago.backends.sums import Sums
from sago.rules import Coefficients, Gate, Rule


class Batch(NamedTuple):
    """Gradient pairs on one device and the tensors that their updates go to.

    Attributes:
        device: The device of all tensors.
        forget, retain: Tensors, or None for a zero gradient. The two tensors of a pair have the same shape
            and strides and are dense in memory. At most one of a pair is None.
        out: The tensors that `combine` writes. They may be those of forget or retain.
        rows: The row of the table of sums that each pair belongs to.
        row_count: The number of rows of the table. A row without elements is zero.
        origins: For each pair, the position of its first element in the list, for random gates.
    """

    device: torch.device
    forget: Sequence[Tensor | None]
    retain: Sequence[Tensor | None]
    out: Sequence[Tensor]
    rows: Sequence[int]
    row_count: int
    origins: Sequence[int] = ()

    def release(self) -> bool:
        """Drops the references to the tensors if the layout works without them. Returns whether it did."""
        return False

    def bind(
        self, forget: Sequence[Tensor | None], retain: Sequence[Tensor | None], out: Sequence[Tensor]
    ) -> None:
        """After `release`, uses these tensors, which have the addresses and the metadata of the earlier ones.

        A batch that works by addresses needs no call of it.
        """


class Backend(Protocol):
    """The two operations of a synthesis on one device. Only "reference" waits for the device."""

    def Batch(
        self,
        device: torch.device,
        forget: Sequence[Tensor | None],
        retain: Sequence[Tensor | None],
        out: Sequence[Tensor],
        rows: Sequence[int],
        row_count: int,
        origins: Sequence[int] = (),
    ) -> Any:
        """Lays the pairs out for `gram` and `combine`; see `Batch` above."""

    def gram(
        self,
        batch: Any,
        sums: Sums,
        gate: Gate | None = None,
        draw: Tensor | None = None,
        floors: Tensor | None = None,
    ) -> Tensor:
        """The table of these sums, fp64 `[rows, sums]`; see `sago.backends.sums`.

        `gate` is for CLASSES. `draw` is the seed and the step of a random gate, int64 `[2]`. `floors` is fp64
        `[rows]`: where the magnitude of a retain element is below the number of its row, gates and the
        number of conflicts take the element as 0.
        """

    def combine(
        self,
        batch: Any,
        rule: Rule,
        gamma: float | Tensor,
        alpha: float | Tensor,
        eps: float,
        gram: Tensor | None,
        sums: Sums,
        coefficients: Coefficients | None = None,
        propagate: bool = False,
        draw: Tensor | None = None,
        floors: Tensor | None = None,
    ) -> Tensor | None:
        """Writes the update of every pair to `out`. Returns the table of `sums`, or None if `sums` is 0.

        Args:
            batch: The pairs.
            rule: The rule, which computes the coefficients of each row.
            gamma, alpha: Floats, or 0-d fp64 tensors on the batch's device.
            eps: Added to `<f,f>` and `<r,r>`.
            gram: An fp64 table with one row for each row of the batch. Its first three columns are `<f,f>`,
                `<f,r>` and `<r,r>`. None for rules that read no inner products.
            sums: The sums of the gradients to compute in the same call.
            coefficients: Used instead of the rule's function of `gram`, `gamma`, `alpha` and `eps`.
            propagate: Whether NaN or inf in either gradient makes the element of the update NaN.
            draw, floors: As in `gram`.
        """
