"""Extraction and rules in plain torch: a correct version, and versions with wrong sums over ranks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.support.backends import GLOBAL


class ByHand:
    """Straightforward extraction and rules in plain torch, with a copy of each gradient.

    Args:
        mesh: Of all ranks, for sums over shards. None: every rank has whole gradients.
        over: How sums are taken. "ranks": over all of them, each part counted once. The others are wrong.
            "nothing": a shard is taken for the whole, as the paper's released code does under ZeRO-3.
            "replicas": parts that several ranks hold are counted as often. The name of a dimension of the
            mesh: the others are forgotten.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None = None, over: str = "ranks") -> None:
        named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
        self.names, self.params = zip(*named, strict=True)
        self.mesh, self.over = mesh, over
        self.zero_()

    def zero_(self) -> None:
        self.sides: dict[str, list[Tensor]] = {}
        for p in self.params:
            p.grad = None

    def forget(self) -> Any:
        return self._capture("forget")

    def retain(self) -> Any:
        return self._capture("retain")

    @contextmanager
    def _capture(self, side: str) -> Any:
        yield
        found = [p.grad.detach().clone() for p in self.params]
        before = self.sides.get(side)
        self.sides[side] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def synthesize_(self, rule: str, gamma: float, alpha: float, max_norm: None = None) -> dict[str, Any]:
        pairs = list(zip(self.sides["forget"], self.sides["retain"], strict=True))
        table = torch.stack([self._products(f, r) for f, r in pairs])
        if self.mesh is not None and self.over != "nothing":
            group = None if self.over in ("ranks", "replicas") else self.mesh[self.over].get_group()
            dist.all_reduce(table, group=group)
        if rule in GLOBAL:
            table = table.sum(0, keepdim=True)
        for row, p, (f, r) in zip(table.expand(len(pairs), 3), self.params, pairs, strict=True):
            ff, fr, rr = row.unbind()
            if rule == "sago":
                p.grad = torch.where(f * r < 0, alpha * r, gamma * f)
            elif rule == "blur":
                p.grad = gamma * f + alpha * (r - fr / ff * f)
            else:
                p.grad = gamma * (f - torch.clamp(fr, max=0.0) / rr * r) + alpha * r
        groups = ["all"] if len(table) == 1 else list(self.names)
        return {"groups": groups, **dict(zip(("ff", "fr", "rr"), table.unbind(1), strict=True))}

    def _products(self, f: Any, r: Any) -> Tensor:
        counted = self.over == "replicas" or self.mesh is None or self._counted(f)
        f, r = (t.to_local() if isinstance(t, DTensor) else t for t in (f, r))
        return torch.stack([(x * y).sum() for x, y in ((f, f), (f, r), (r, r))]) * counted

    def _counted(self, t: Any) -> bool:
        """Whether this rank is the first of those that hold the same part."""
        sharded: set[str] = set()
        if isinstance(t, DTensor):
            named = zip(t.device_mesh.mesh_dim_names, t.placements, strict=True)
            sharded = {name for name, placement in named if not placement.is_replicate()}
        return all(self.mesh.get_local_rank(n) == 0 for n in self.mesh.mesh_dim_names if n not in sharded)
