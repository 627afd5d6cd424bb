"""The sums that a synthesis computed, and the report that is made from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from sago.backends import sums
from sago.backends.sums import Sums
from sago.core.coefficients import gram, of_update
from sago.core.pairs import Call
from sago.core.report import SynthesisReport
from sago.rules import Rule, evaluate

_PRODUCTS = ("ff", "fr", "rr")
_OF_UPDATE = ("uu", "uf", "ur")
# The sums from which those over the update follow, for each number of classes.
_NEEDED = {1: Sums.PRODUCTS, 2: Sums.SPLIT, 3: Sums.CLASSES}


def nothing() -> None:
    pass


class Statistics(NamedTuple):
    """The sums over the gradients of every row.

    Attributes:
        table: The table of sums; see `sago.backends.sums`. It includes the sums of other ranks after `wait`.
        elements: The number of elements of each row.
        wait: Waits for the other ranks, on the current stream.
    """

    table: Tensor
    elements: Tensor | Sequence[int]
    wait: Callable[[], object] = nothing


def report(
    call: Call, keys: Sequence[Hashable], numel: Sequence[int], taken: Statistics | None
) -> SynthesisReport:
    """The report of a synthesis; the sums over the update are derived from those over the gradients."""
    if taken is None:
        return SynthesisReport(call.rule.name, keys, numel, dict)
    # A weight on the device may change before the report is read.
    gamma, alpha = (w.clone() if isinstance(w, Tensor) else w for w in (call.gamma, call.alpha))
    then = call._replace(gamma=gamma, alpha=alpha)
    # The function of a user may read variables that change before the report is read.
    at_once = not call.rule.built_in and _derives(call.rule, taken.table)
    values = _values(then, taken.table) if at_once else None

    def columns() -> dict[str, Tensor]:
        taken.wait()
        return _columns(then, taken.table, values)

    return SynthesisReport(call.rule.name, keys, taken.elements, columns)


def computed(rule: Rule, stats: bool) -> list[str]:
    """The names of the columns that a report of the rule has, in their order."""
    wanted = Call(rule, 1.0, 1.0, 0.0, stats, None).sums
    names = [*_PRODUCTS] if wanted >= Sums.PRODUCTS else []
    if wanted >= Sums.COUNTED:
        names += sums.COUNTS
    if wanted >= _NEEDED[rule.classes]:
        names += _OF_UPDATE
    return names


def _derives(rule: Rule, table: Tensor) -> bool:
    """Whether the sums over the update follow from the table."""
    return len(sums.by_class(table)) >= rule.classes


def _values(call: Call, table: Tensor) -> Tensor:
    """The coefficients of every row. Only rules that read no sums may be called before `Statistics.wait`."""
    read = gram(call.rule, table)
    return evaluate(call.rule, read, call.gamma, call.alpha, call.eps, table.device, call.state).values


def _columns(call: Call, table: Tensor, values: Tensor | None) -> dict[str, Tensor]:
    columns = dict(zip(_PRODUCTS, sums.products(table).unbind(1), strict=True))
    counts = sums.counts(table)
    if counts is not None:
        columns.update(zip(sums.COUNTS, counts.unbind(1), strict=True))
    if _derives(call.rule, table):
        values = _values(call, table) if values is None else values
        columns.update(zip(_OF_UPDATE, of_update(call.nonfinite, table, values), strict=True))
    return columns
