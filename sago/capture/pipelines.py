"""The pipelines of captured gradients. Windows in which the same parameters were reached share one."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from sago.backends.streams import Cache
from sago.capture.fresh import FreshGradients
from sago.capture.side import Side
from sago.core.checks import check_groups
from sago.core.pairs import Call, Pairs
from sago.core.pipeline import Pipeline
from sago.ranks.dtensor import Shards
from sago.rules import Rule

_PATTERNS = 8  # pipelines that are kept for each buffer


class Pipelines:
    """Makes and keeps the pipelines that write the updates.

    Args:
        keys: The group of each parameter.
        grouped: Whether the user gave these groups. Otherwise a rule of global scope has one row.
        forget, retain: The two sides.
        updates: The memory of each update.
        written: The side over whose gradients the updates are written.
        in_place: Whether the buffers of that side hold the updates and nothing else.
        sizes: The number of elements of each whole gradient.
        shards: How the gradients are sharded over ranks. None if they are not sharded.
        backends: The backend of each device.

    Attributes:
        positions: For each buffer, the positions of its parameters. The key None has those of all buffers.
    """

    def __init__(
        self,
        *,
        keys: Sequence[Hashable],
        grouped: bool,
        forget: Side,
        retain: Side,
        updates: Sequence[Tensor],
        written: Side,
        in_place: bool,
        sizes: Sequence[int],
        shards: Shards | None,
        backends: dict[torch.device, str],
    ) -> None:
        self._keys, self._grouped = keys, grouped
        self._forget, self._retain = forget, retain
        self._updates, self._written, self._in_place = updates, written, in_place
        self._shards, self._backends = shards, backends
        self._before = [0, *itertools.accumulate(sizes)]
        owner = forget.owner
        buffers: list[int | None] = [None, *range(len(forget.buffers))]
        self.positions = {b: [i for i, o in enumerate(owner) if b is None or o == b] for b in buffers}
        self._kept = {b: Cache(_PATTERNS) for b in buffers}

    def rows(self, rule: Rule) -> tuple[list[int], list[Hashable]]:
        """For each parameter its row in the table of sums, and the key of each row."""
        grouped = self._grouped or rule.scope != "global"
        return check_groups(self._keys if grouped else None, len(self._keys), rule)

    def of(self, call: Call, bucket: int | None = None) -> Pipeline:
        """The pipeline for the gradients that are present in this window, of all buffers or of one.

        Args:
            call: The synthesis.
            bucket: The number of the buffer. None stands for all.
        """
        positions = self.positions[bucket]
        forget = self._forget.touched
        retain = self._retain.reached if self._retain.keeps else self._retain.touched
        if bucket is not None:
            forget, retain = [forget[i] for i in positions], [retain[i] for i in positions]
        one_row = call.rule.scope == "global" and not self._grouped
        no_rows = call.rule.scope == "element" and call.sums == 0 and not call.by_row
        # If parameters need no rows of their own, their whole buffer is synthesized as one tensor.
        whole = (one_row or no_rows) and self._in_place and all(forget) and all(retain)
        # The zeros between parameters would count as elements, and shift the positions of the others.
        whole = whole and not call.rule.by_class and call.draw is None
        whole = whole and (one_row or call.state is None)
        if self._shards is not None and not no_rows:
            whole = whole and all(self._shards.counted)
        key = one_row, whole, tuple(forget), tuple(retain)
        return self._kept[bucket].get(key, self._backends, lambda: self._new(call.rule, positions, whole))

    def of_buffer(self, call: Call, buffers: Sequence[int]) -> Pipeline:
        """The pipeline of the only one of `buffers`, for `sago.capture.streamed.InBackward`."""
        (bucket,) = buffers
        return self.of(call, bucket)

    def of_fresh(
        self,
        of_rows: tuple[list[int], list[Hashable]],
        views: Sequence[Tensor | None],
        retain: FreshGradients,
        members: Mapping[int, list[int]],
        units: Sequence[int],
    ) -> Pipeline:
        """A new pipeline of gradients that a backward has just made.

        Args:
            of_rows: The result of `rows`.
            views: The forget gradient of each parameter.
            retain: The side with the new gradients, which it does not keep any longer.
            members: For each unit, the positions of its parameters. A unit is synthesized at once.
            units: The units whose gradients are complete.
        """
        positions = [i for u in units for i in members[u]]
        rows, keys = of_rows
        own = {row: k for k, row in enumerate(dict.fromkeys(rows[i] for i in positions))}
        forget, fresh = [views[i] for i in positions], retain.take(positions)
        neither = [f is None and r is None for f, r in zip(forget, fresh, strict=True)]
        updates = [None if n else self._updates[i] for i, n in zip(positions, neither, strict=True)]
        spread = self._shards
        pairs = Pairs(
            forget,
            fresh,
            updates,
            updates,
            rows=[own[rows[i]] for i in positions],
            keys=[keys[row] for row in own],
            backends=self._backends,
            spread=None if spread is None else spread.of(positions),
            before=[self._before[i] for i in positions],
        )
        return Pipeline(pairs, pairs.numel(), pairs.numel(everywhere=False))

    def _new(self, rule: Rule, positions: Sequence[int], whole: bool) -> Pipeline:
        rows, keys = self.rows(rule)
        forget, retain = (
            [side.present(side.views)[i] for i in positions] for side in (self._forget, self._retain)
        )
        neither = [f is None and r is None for f, r in zip(forget, retain, strict=True)]
        updates = [None if n else self._updates[i] for i, n in zip(positions, neither, strict=True)]
        devices = {self._retain.views[i].device for i in positions}
        pairs = Pairs(
            forget,
            retain,
            updates,
            updates,
            rows=[rows[i] for i in positions],
            keys=keys,
            backends={d: b for d, b in self._backends.items() if d in devices},
            spread=self._shards,
            before=[self._before[i] for i in positions],
        )
        numel, own = pairs.numel(), pairs.numel(everywhere=False)
        if whole:
            owners = list(dict.fromkeys(self._retain.owner[i] for i in positions))
            pairs.forget = [self._forget.buffers[b] for b in owners]
            pairs.retain = [self._retain.buffers[b] for b in owners]
            pairs.out, pairs.rows = [self._written.buffers[b] for b in owners], [0] * len(owners)
            pairs.before = [0] * len(owners)
            if self._shards is not None:
                counted, offsets = [True] * len(owners), [0] * len(owners)
                pairs.spread = self._shards._replace(counted=counted, offsets=offsets)
        return Pipeline(pairs, numel, own)
