"""Counts the communication of a synthesis, and compares sharded updates with those of one rank.

Ranks are simulated, one after another. Each rank holds a chunk of dim 0 of every gradient, as `fully_shard`
gives it: uneven or empty where the number of ranks does not divide the rows. The library takes the sums of
every rank and gives them to `reduce_gram` as a table. The tables are added up, and the library makes every
update from the total. `local_error` is the error of updates that each rank makes from its own sums.

`table` is the shape of the table, and `wire_bytes` are the bytes that a rank sends in one all-reduce of it: a
ring over p ranks moves `2 * (p - 1) / p` of its bytes. The gradients are those of two texts on a small Llama
with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks.gradients import ALPHA, GAMMA, WrongResult
from benchmarks.measure import dtype_name, origin
from benchmarks.released import RULES as PAPER
from benchmarks.workloads import Decoder, llama
from sago.rules import RULES

SHARDS = (1, 2, 3, 8, 64, 255, 1024)
MODEL = Decoder(hidden=32, layers=2, vocabulary=1003, mlp=112, keys=32, head=32)
TOKENS, SHARED = 96, 24  # of a text, and the number at its start that both texts share
TEXTS = 1  # a seed for which some coefficient is rounded another way in shards
SUMS = 1e-6  # tolerance of the sums
UPDATES = 1e-5  # tolerance of an update, relative to its norm: few elements may round the other way

COLUMNS = (
    "dtype", "rule", "shards", "empty", "table", "wire_bytes", "sums", "differing", "of", "update_error",
    "local_error",
)  # fmt: skip

Tensors = list[Tensor]


def run(
    shards: Sequence[int] = SHARDS,
    rules: Sequence[str] = PAPER,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> dict[str, Any]:
    """Makes the rows of every rule and dtype. Raises `WrongResult` where sums or updates are wrong."""
    rows = []
    for dtype in dtypes:
        forget, retain = gradients(dtype)
        for rule in tqdm(rules, desc=f"shards {dtype_name(dtype)}"):
            rows += compare(forget, retain, rule, shards)
    return {
        **origin("cpu", "sago", "benchmarks/shards.py"),
        **MODEL._asdict(),
        "tensors": len(forget),
        "elements": sum(t.numel() for t in forget),
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


def gradients(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Returns the gradients of the negated loss of a text, and of the loss of a text with the same start."""
    model = llama(MODEL, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(TEXTS)
    texts = torch.randint(MODEL.vocabulary, (2, 1, TOKENS), generator=generator)
    texts[1, :, :SHARED] = texts[0, :, :SHARED]
    losses = [model(input_ids=text, labels=text).loss for text in texts]
    params = list(model.parameters())
    forget, retain = torch.autograd.grad(-losses[0], params), torch.autograd.grad(losses[1], params)
    return [t.to(dtype) for t in forget], [t.to(dtype) for t in retain]


def split(t: Tensor, ranks: int) -> Tensors:
    """Returns the chunk of each rank: `torch.chunk` of dim 0, and an empty one if there are too few rows."""
    chunks = list(t.chunk(ranks))
    return chunks + [t[:0]] * (ranks - len(chunks))


class Ranks:
    """`ranks` ranks with their shards of the gradients, and a plan for `rule` on each of them."""

    def __init__(self, forget: Tensors, retain: Tensors, rule: str, ranks: int) -> None:
        self.forget, self.retain = (
            list(zip(*(split(t, ranks) for t in side), strict=True)) for side in (forget, retain)
        )
        self.out = [[torch.empty_like(t) for t in shards] for shards in self.retain]
        self._reduce: Callable[[Tensor], Tensor | None] = lambda table: None
        self._plans = [
            sago.Plan(f, r, rule, out=o, reduce_gram=lambda table: self._reduce(table))
            for f, r, o in zip(self.forget, self.retain, self.out, strict=True)
        ]

    def alone(self) -> tuple[Tensors, Tensors]:
        """Returns the joined updates that each rank makes from its own sums, and the tables of these sums."""
        tables: Tensors = []
        updates = self._updates(lambda table: tables.append(table.clone()))
        return updates, tables

    def together(self, total: Tensor) -> Tensors:
        """Returns the joined updates if `reduce_gram` returns `total` on every rank."""
        return self._updates(lambda table: total.clone())

    def _updates(self, reduce: Callable[[Tensor], Tensor | None]) -> Tensors:
        self._reduce = reduce
        for plan in self._plans:
            plan.synthesize_(GAMMA, ALPHA)
        return [torch.cat(shards) for shards in zip(*self.out, strict=True)]


def compare(forget: Tensors, retain: Tensors, rule: str, shards: Sequence[int]) -> list[dict[str, Any]]:
    """Compares the gradients in so many shards with the whole gradients, for one rule.

    Each rank makes the updates of an elementwise rule alone.
    """
    dtype = dtype_name(forget[0].dtype)
    right, _ = sago.synthesize(forget, retain, rule, GAMMA, ALPHA)
    elementwise = RULES[rule].scope == "element"
    whole = gram(*Ranks(forget, retain, rule, 1).alone()[1])
    rows = []
    for count in shards:
        ranks = Ranks(forget, retain, rule, count)
        local, tables = ranks.alone()
        total = torch.stack(tables).sum(0)
        updates = local if elementwise else ranks.together(total)
        sums, error = deviation(gram(total), whole), difference(updates, right)
        for name, off, allowed in (("sums", sums, SUMS), ("updates", error, 0.0 if elementwise else UPDATES)):
            if not off <= allowed:  # not `>`: a NaN must fail
                raise WrongResult(
                    f"{rule} ({dtype}) in {count} shards: the relative error of the {name} is {off:.1e}, "
                    f"allowed {allowed:.0e}. Nothing is reported."
                )
        rows.append(
            {
                "dtype": dtype,
                "rule": rule,
                "shards": count,
                "empty": sum(t.numel() == 0 for held in ranks.retain for t in held),
                "table": "x".join(map(str, tables[0].shape)),
                "wire_bytes": 2 * (count - 1) / count * tables[0].nbytes,
                "sums": sums,
                "differing": sum(int((u != e).sum()) for u, e in zip(updates, right, strict=True)),
                "of": sum(t.numel() for t in forget),
                "update_error": error,
                "local_error": difference(local, right),
            }
        )
    return rows


def gram(table: Tensor) -> Tensor:
    """Returns `ff, fr, rr` of every row of a table of `reduce_gram`, whose last column counts elements."""
    sums = table[:, :-1]
    return sums[:, 0:3] + sums[:, 6:9] if sums.shape[1] == 9 else sums[:, 0:3]


def deviation(found: Tensor, right: Tensor) -> float:
    """Returns the largest of `|ff - ff'| / ff'`, `|rr - rr'| / rr'` and `|fr - fr'| / (|f||r|)`."""
    ff, _, rr = right.unbind(1)
    scale = torch.stack([ff, (ff * rr).sqrt(), rr], dim=1)
    return torch.where(found == right, 0.0, (found - right).abs() / scale).max().item()


def difference(updates: Tensors, right: Tensors) -> float:
    """Returns the norm of the difference, relative to the norm of `right`."""
    u, e = (torch.cat([t.flatten() for t in side]).double() for side in (updates, right))
    return 0.0 if torch.equal(u, e) else ((u - e).norm() / e.norm()).item()
