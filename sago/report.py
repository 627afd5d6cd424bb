"""What a synthesis saw: inner products, conflict and non-finite counts, one row a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

Update = Callable[[], tuple[Tensor, Tensor, Tensor]]

_COUNTS = ("nonfinite_forget", "nonfinite_retain")
_FIELDS = (
    "ff",
    "fr",
    "rr",
    "uu",
    "uf",
    "ur",
    "conflict_fraction",
    *_COUNTS,
    "cos_forget_retain",
    "cos_update_forget",
    "cos_update_retain",
    "norm_forget",
    "norm_retain",
    "norm_update",
)


class SynthesisReport:
    """Statistics of one synthesis as fp64 device tensors of shape `[groups]`.

    With `f` the forget gradient, `r` the retain gradient and `u` the update (before it is rounded to
    the dtype it is stored in), each field is, per group:

    ==================== =========================================================
    `ff, fr, rr`         `(f*f).sum()`, `(f*r).sum()`, `(r*r).sum()`
    `uu, uf, ur`         `(u*u).sum()`, `(u*f).sum()`, `(u*r).sum()`
    `conflict_fraction`  share of elements where `f` and `r` have opposite signs
    `nonfinite_forget`   number of NaN and inf elements of `f`
    `nonfinite_retain`   number of NaN and inf elements of `r`
    `cos_forget_retain`  `fr / (ff*rr).sqrt()`, and so on for `cos_update_forget`
                         and `cos_update_retain`; NaN where a norm is 0
    `norm_forget`        `ff.sqrt()`, and so on for `norm_retain`, `norm_update`
    ==================== =========================================================

    A field that was not computed (`stats=False`) is None and its name stands in `absent`. Reading a
    field enqueues at most a few operations on `[groups]` values; only `summary`, `table` and `to_dict`
    wait for the device.

    Attributes:
        rule: The rule's name.
        groups: One key a row: the tensor's index, the value given in `groups=`, or `"all"`.
        absent: The names of the fields that were not computed.
    """

    def __init__(
        self,
        rule: str,
        groups: Sequence[Hashable],
        sums: Mapping[str, Tensor],
        numel: Tensor | Sequence[int],
        update: Update | None = None,
    ) -> None:
        self.rule = rule
        self.groups = tuple(groups)
        self._sums = dict(sums)
        self._numel = numel
        self._update = update
        self._update_sums: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def ff(self) -> Tensor | None:
        return self._sums.get("ff")

    @property
    def fr(self) -> Tensor | None:
        return self._sums.get("fr")

    @property
    def rr(self) -> Tensor | None:
        return self._sums.get("rr")

    @property
    def uu(self) -> Tensor | None:
        return self._from_update(0)

    @property
    def uf(self) -> Tensor | None:
        return self._from_update(1)

    @property
    def ur(self) -> Tensor | None:
        return self._from_update(2)

    @property
    def conflict_fraction(self) -> Tensor | None:
        conflicts = self._sums.get("conflicts")
        return None if conflicts is None else conflicts / self.numel.clamp(min=1)

    @property
    def nonfinite_forget(self) -> Tensor | None:
        return self._sums.get("nonfinite_forget")

    @property
    def nonfinite_retain(self) -> Tensor | None:
        return self._sums.get("nonfinite_retain")

    @property
    def cos_forget_retain(self) -> Tensor | None:
        return _cosine(self.fr, self.ff, self.rr)

    @property
    def cos_update_forget(self) -> Tensor | None:
        return _cosine(self.uf, self.uu, self.ff)

    @property
    def cos_update_retain(self) -> Tensor | None:
        return _cosine(self.ur, self.uu, self.rr)

    @property
    def norm_forget(self) -> Tensor | None:
        return _root(self.ff)

    @property
    def norm_retain(self) -> Tensor | None:
        return _root(self.rr)

    @property
    def norm_update(self) -> Tensor | None:
        return _root(self.uu)

    @property
    def numel(self) -> Tensor:
        """Elements a group, int64."""
        if not isinstance(self._numel, Tensor):
            device = next((t.device for t in self._sums.values()), torch.device("cpu"))
            self._numel = torch.tensor(self._numel, dtype=torch.int64, device=device)
        return self._numel

    @property
    def absent(self) -> tuple[str, ...]:
        return tuple(name for name in _FIELDS if getattr(self, name) is None)

    def total(self) -> SynthesisReport:
        """The same report with all groups summed into one row."""
        update = self._update

        def summed() -> tuple[Tensor, Tensor, Tensor]:
            uu, uf, ur = (t.sum(0, keepdim=True) for t in (self.uu, self.uf, self.ur) if t is not None)
            return uu, uf, ur

        return SynthesisReport(
            self.rule,
            ("all",),
            {name: values.sum(0, keepdim=True) for name, values in self._sums.items()},
            self.numel.sum(0, keepdim=True),
            None if update is None else summed,
        )

    def to_dict(self) -> dict[str, list[float]]:
        """Every field that was computed, a list with one number a group. Waits for the device."""
        present = {name: values for name in _FIELDS if (values := getattr(self, name)) is not None}
        if not present:
            return {}
        rows = torch.stack([values.double() for values in present.values()]).tolist()  # one transfer
        return {
            name: [int(x) for x in row] if name in _COUNTS else row
            for name, row in zip(present, rows, strict=True)
        }

    def summary(self) -> dict[str, float]:
        """Every field that was computed, for all groups taken together. Waits for the device."""
        return {name: values[0] for name, values in self.total().to_dict().items()}

    def table(self) -> str:
        """An aligned text table: one line a group, the totals below. Waits for the device."""
        columns = [name for name in _FIELDS if name not in ("ff", "fr", "rr", "uu", "uf", "ur")]
        rows, totals = self.to_dict(), self.summary()
        columns = [name for name in columns if name in rows]
        lines = [["group", *columns]]
        for i, group in enumerate(self.groups):
            lines.append([str(group), *(f"{rows[name][i]:.4g}" for name in columns)])
        lines.append(["total", *(f"{totals[name]:.4g}" for name in columns)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )

    def __repr__(self) -> str:
        absent = f", absent={self.absent}" if self.absent else ""
        return f"SynthesisReport(rule={self.rule!r}, groups={len(self.groups)}{absent})"

    def _from_update(self, i: int) -> Tensor | None:
        if self._update is None:
            return None
        if self._update_sums is None:
            self._update_sums = self._update()
        return self._update_sums[i]


def _root(square: Tensor | None) -> Tensor | None:
    return None if square is None else square.sqrt()


def _cosine(product: Tensor | None, square: Tensor | None, other: Tensor | None) -> Tensor | None:
    if product is None or square is None or other is None:
        return None
    # The roots are taken apart: the product of two squares leaves the range before a root does.
    return product / (square.sqrt() * other.sqrt())
