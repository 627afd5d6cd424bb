"""The report of a synthesis: inner products, conflicts and non-finite counts, one row for each group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sago.backends.upload import upload
from sago.core.checks import check_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# A retain gradient with a norm below this share of the forget gradient's norm is regarded as rounding noise.
# One rounding of fp32 is 2 ** -24. In a language model with a KL divergence to itself, 2 ** -20 was found.
NOISE = 2.0**-16

_COUNTS = ("nonfinite_forget", "nonfinite_retain")
# The fields that can be read, and the columns that each is computed from.
FIELDS = {
    **{name: (name,) for name in ("ff", "fr", "rr", "uu", "uf", "ur")},
    "conflict_fraction": ("conflicts",),
    **{name: (name,) for name in _COUNTS},
    "cos_forget_retain": ("fr", "ff", "rr"),
    "cos_update_forget": ("uf", "uu", "ff"),
    "cos_update_retain": ("ur", "uu", "rr"),
    "norm_forget": ("ff",),
    "norm_retain": ("rr",),
    "norm_update": ("uu",),
}
_PLOTS = "sago.monitor.plots"  # imported when a report is drawn, because it needs matplotlib


class SynthesisReport:
    """Statistics of one synthesis as fp64 device tensors of shape `[groups]`.

    With `f` the forget gradient, `r` the retain gradient and `u` the update (before it is rounded to
    the dtype it is stored in), each field is, per group:

    ==================== =========================================================
    `ff, fr, rr`         `(f*f).sum()`, `(f*r).sum()`, `(r*r).sum()`
    `uu, uf, ur`         `(u*u).sum()`, `(u*f).sum()`, `(u*r).sum()`
    `conflict_fraction`  share of elements where `f` and `r` have opposite signs,
                         without those in the dead zone of `retain_floor`
    `nonfinite_forget`   number of NaN and inf elements of `f`
    `nonfinite_retain`   number of NaN and inf elements of `r`
    `cos_forget_retain`  `fr / (ff*rr).sqrt()`, and so on for `cos_update_forget`
                         and `cos_update_retain`; NaN where a norm is 0 or
                         not finite
    `norm_forget`        `ff.sqrt()`, and so on for `norm_retain`, `norm_update`
    ==================== =========================================================

    A field that was not computed (`stats=False`) is None, and `absent` has its name. Reading a field enqueues
    at most a few operations on `[groups]` values. Only `summary`, `table`, `to_dict` and `warnings` wait for
    the device. The first read fixes the values. For DTensors, and where the synthesis was given
    `reduce_gram`, they are the values of whole gradients. For other shards they are the values of the shard
    of this rank.

    A report can be copied and pickled. Both count as a first read, and the copy holds the values.

    Attributes:
        rule: The rule's name.
        groups: One key a row: the tensor's index, the value given in `groups=`, or `"all"`.
        absent: The names of the fields that were not computed.
    """

    def __init__(
        self,
        rule: str,
        groups: Sequence[Hashable],
        numel: Tensor | Sequence[int],
        columns: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self.rule = rule
        self.groups = tuple(groups)
        self._numel = numel
        self._columns = columns
        self._values: Mapping[str, Tensor] | None = None

    @property
    def ff(self) -> Tensor | None:
        return self._column("ff")

    @property
    def fr(self) -> Tensor | None:
        return self._column("fr")

    @property
    def rr(self) -> Tensor | None:
        return self._column("rr")

    @property
    def uu(self) -> Tensor | None:
        return self._column("uu")

    @property
    def uf(self) -> Tensor | None:
        return self._column("uf")

    @property
    def ur(self) -> Tensor | None:
        return self._column("ur")

    @property
    def conflict_fraction(self) -> Tensor | None:
        conflicts = self._column("conflicts")
        return None if conflicts is None else conflicts / self.numel.clamp(min=1)

    @property
    def nonfinite_forget(self) -> Tensor | None:
        return self._column("nonfinite_forget")

    @property
    def nonfinite_retain(self) -> Tensor | None:
        return self._column("nonfinite_retain")

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
    def total_norm(self) -> Tensor | None:
        """The norm of the whole update before it was clipped, `uu.sum().sqrt()`, 0-d."""
        uu = self._column("uu")
        return None if uu is None else uu.sum().sqrt()

    @property
    def numel(self) -> Tensor:
        """The number of elements of each group, int64."""
        if not isinstance(self._numel, Tensor):
            device = next((t.device for t in self._read().values()), torch.device("cpu"))
            self._numel = upload(self._numel, torch.int64, device)
        return self._numel.to(torch.int64)

    @property
    def absent(self) -> tuple[str, ...]:
        present = self._read()
        return tuple(name for name, columns in FIELDS.items() if any(c not in present for c in columns))

    def total(self) -> SynthesisReport:
        """The report with all groups summed into one row."""
        sums = {name: values.sum(0, keepdim=True) for name, values in self._read().items()}
        return SynthesisReport(self.rule, ("all",), self.numel.sum(0, keepdim=True), lambda: sums)

    def regroup(self, groups: Sequence[Hashable]) -> SynthesisReport:
        """The report with one row for each key, in which its groups are summed. Waits for the device.

        Args:
            groups: One key for each group. The rows are in the order in which the keys first appear.

        Returns:
            A report on the CPU.
        """
        rows, keys = check_keys(groups, len(self.groups), "group of the report")
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(len(keys), device="cpu").index_add_(0, index, values.cpu())

        sums = {name: summed(values) for name, values in self._read().items()}
        return SynthesisReport(self.rule, keys, summed(self.numel), lambda: sums)

    def to_dict(self) -> dict[str, list[float]]:
        """Every field that was computed, as a list with one number for each group. Waits for the device."""
        present = {name: values for name in FIELDS if (values := getattr(self, name)) is not None}
        if not present:
            return {}
        rows = torch.stack([values.double() for values in present.values()]).tolist()  # one transfer
        return {
            name: [int(x) for x in row] if name in _COUNTS else row
            for name, row in zip(present, rows, strict=True)
        }

    def summary(self) -> dict[str, float]:
        """Every field that was computed, over all groups together. Waits for the device."""
        return {name: values[0] for name, values in self.total().to_dict().items()}

    def warnings(self) -> list[str]:
        """Sentences that say what is wrong with the gradients. Waits for the device.

        A warning counts the groups whose retain gradient is rounding noise, so that its signs are random. Its
        norm is then not 0, and less than `2**-16` times the norm of the forget gradient.
        """
        ff, rr = self.ff, self.rr
        if ff is None or rr is None:
            return []
        noise = int(((rr > 0) & is_noise(ff, rr)).sum())
        if noise == 0:
            return []
        return [
            f"The retain gradient is rounding noise in {noise} of {len(self.groups)} groups: its norm is "
            "below 2**-16 of that of the forget gradient. Its signs are random. With `retain_floor` above 0, "
            "a gate does not read them."
        ]

    def table(self) -> str:
        """An aligned text table with one line for each group and a line of totals, and the warnings.

        Waits for the device. `rich.print(report)` prints the same table with colours.
        """
        lines = self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        aligned = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        return "\n".join([*aligned, *self.warnings()])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the share of conflicts and the cosines by layer and kind of parameter. Waits for the device.

        The groups should be names of parameters, as those of `GradientBuckets(model)` are: the first number
        in a name is the layer, and the part after it is the kind. Groups of the same layer and kind, such as
        those of experts, are summed. Needs matplotlib (`pip install 'sago-kernels[plot]'`).

        Args:
            path: Where the picture is written; the suffix is its format. None writes nothing.

        Raises:
            ValueError: If the report has neither the share of conflicts nor a cosine.
        """
        plots = import_module(_PLOTS)
        figure: Figure = plots.save(plots.heat_maps(self), path)
        return figure

    def __rich__(self) -> Table:
        """The table that rich prints."""
        from rich.table import Table
        from rich.text import Text

        # Brackets in the name of a group are not markup.
        head, *rows, totals = [[Text(cell) for cell in line] for line in self._lines()]
        caption = "\n".join(self.warnings()) or None
        table = Table(
            title=f"rule {self.rule}", caption=caption, caption_style="yellow", title_justify="left"
        )
        for i, name in enumerate(head):
            table.add_column(Text(name.plain.replace("_", " ")), justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*totals)
        return table

    def _lines(self) -> list[list[str]]:
        """The cells of the table: the names of its columns, one line for each group, and the totals."""
        columns = [name for name in FIELDS if name not in ("ff", "fr", "rr", "uu", "uf", "ur")]
        values, totals = self.to_dict(), self.summary()
        columns = [name for name in columns if name in values]
        return [
            ["group", *columns],
            *([str(g), *(f"{values[name][i]:.4g}" for name in columns)] for i, g in enumerate(self.groups)),
            ["total", *(f"{totals[name]:.4g}" for name in columns)],
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, in which the values replace the function that computes them."""
        values = {name: t.detach().clone() for name, t in self._read().items()}
        # A list of numbers is not uploaded for this.
        numel = self._numel.clone() if isinstance(self._numel, Tensor) else tuple(self._numel)
        return {**vars(self), "_numel": numel, "_columns": dict, "_values": values}

    def __repr__(self) -> str:
        absent = f", absent={self.absent}" if self.absent else ""
        return f"SynthesisReport(rule={self.rule!r}, groups={len(self.groups)}{absent})"

    def _read(self) -> Mapping[str, Tensor]:
        if self._values is None:
            self._values = self._columns()
        return self._values

    def _column(self, name: str) -> Tensor | None:
        return self._read().get(name)


def is_noise(ff: Tensor, rr: Tensor) -> Tensor:
    """Whether the retain gradient of each group is rounding noise beside the forget gradient."""
    return (rr < NOISE * NOISE * ff) & ff.isfinite()


def _root(square: Tensor | None) -> Tensor | None:
    return None if square is None else square.sqrt()


def _cosine(product: Tensor | None, square: Tensor | None, other: Tensor | None) -> Tensor | None:
    if product is None or square is None or other is None:
        return None
    # A squared norm that underflowed or overflowed gives no cosine.
    known = (square > 0) & (other > 0) & square.isfinite() & other.isfinite()
    # The roots are multiplied, because the product of the two squares could overflow or underflow.
    return torch.where(known, product / (square.sqrt() * other.sqrt()), torch.nan)
