"""How far a synthesis moves with the number of shards that the gradients are split into.

Ranks are simulated, one after another. Each has what `fully_shard` would give it of every gradient: a chunk
of dim 0, uneven or empty where it does not divide. The library itself takes the sums of every rank, the table
that it gives to `reduce_gram`; the tables are added up in the order of a ring, its reverse, a tree or at
random; and the library makes the update of every rank from the total. The contrast is a rank that projects
with the inner products of its own shards.

The gradients are those of two texts on a small Llama, untrained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks import memory, wire
from benchmarks.gradients import ALPHA, GAMMA, WrongResult
from benchmarks.measure import origin
from benchmarks.workloads import WORKLOADS
from sago.rules import RULES, evaluate

SHARDS = (1, 2, 3, 8, 64, 255, 1024)
DTYPES = (torch.bfloat16, torch.float32)
MODEL = memory.Shape(hidden=32, layers=2, vocabulary=1003)
TOKENS, SHARED = 96, 24  # of a text, and how many at its start both have
TEXTS = 1  # a seed with which updates differ at all: with some, no coefficient is rounded another way
SUMS = 1e-6  # what they may be off by
UPDATES = 1e-5  # of the norm: a few elements in a million that round the other way

COLUMNS = (
    "dtype", "rule", "shards", "empty", "sums", "from_exact", "coefficients",
    "differing", "of", "ulps", "update_error", "local_error",
)  # fmt: skip

Tensors = list[Tensor]
Tables = Sequence[Tensor]


def run(
    shards: Sequence[int] = SHARDS,
    rules: Sequence[str] = tuple(RULES),
    dtypes: Sequence[torch.dtype] = DTYPES,
    ranks: Sequence[int] = wire.RANKS,
) -> dict[str, Any]:
    """The cost model and the simulation; raises `WrongResult` where sums or updates are off."""
    rows = []
    for dtype in dtypes:
        forget, retain = gradients(dtype)
        for rule in tqdm(rules, desc=f"shards {_name(dtype)}"):
            rows += compare(forget, retain, rule, shards)
    tensors = len(WORKLOADS["llama-3-8b"])
    return {
        **origin("cpu", "sago", "benchmarks/shards.py", "benchmarks/wire.py"),
        **MODEL._asdict(),
        "tensors": len(forget),
        "elements": sum(t.numel() for t in forget),
        "gamma": GAMMA,
        "alpha": ALPHA,
        "orders": list(ORDERS),
        "rows": rows,
        "engines": wire.engines(ranks),
        "tables": wire.tables(tensors, ranks),
        "latencies": wire.latencies(ranks),
    }


def gradients(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Of a text to forget, by its negated loss, and of one to retain, which begins as the first does."""
    model = memory.make_model(MODEL, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(TEXTS)
    texts = torch.randint(MODEL.vocabulary, (2, 1, TOKENS), generator=generator)
    texts[1, :, :SHARED] = texts[0, :, :SHARED]
    losses = [model(input_ids=text, labels=text).loss for text in texts]
    params = list(model.parameters())
    forget, retain = torch.autograd.grad(-losses[0], params), torch.autograd.grad(losses[1], params)
    return [t.to(dtype) for t in forget], [t.to(dtype) for t in retain]


def split(t: Tensor, ranks: int) -> Tensors:
    """What each rank has of `t`: `torch.chunk` of dim 0, and nothing where there are too few rows."""
    chunks = list(t.chunk(ranks))
    return chunks + [t[:0]] * (ranks - len(chunks))


class _Taken(Exception):
    pass


class Ranks:
    """So many ranks, each with its shards of the gradients, and a synthesis by `rule` on each of them."""

    def __init__(self, forget: Tensors, retain: Tensors, rule: str, ranks: int) -> None:
        self.reduce: Callable[[Tensor], Tensor] = torch.clone
        self.forget = list(zip(*(split(t, ranks) for t in forget), strict=True))
        self.retain = list(zip(*(split(t, ranks) for t in retain), strict=True))
        self.out = [[torch.empty_like(t) for t in shards] for shards in self.retain]
        self.rule = rule
        self.plans = [
            sago.Plan(f, r, rule, out=o, reduce_gram=lambda table: self.reduce(table))
            for f, r, o in zip(self.forget, self.retain, self.out, strict=True)
        ]

    def tables(self) -> Tensors:
        """What each rank gives to `reduce_gram`."""
        taken: Tensors = []

        def take(table: Tensor) -> Tensor:
            taken.append(table.clone())
            raise _Taken

        self.reduce = take
        for plan in self.plans:
            try:
                plan.synthesize_(GAMMA, ALPHA)
            except _Taken:
                continue
            raise WrongResult(f"{self.rule} took no sums for `reduce_gram`.")
        return taken

    def updates(self, table: Tensor) -> Tensors:
        """The update of every gradient, whole again, where `reduce_gram` returns `table` on every rank."""
        self.reduce = lambda own: table.clone()
        for plan in self.plans:
            plan.synthesize_(GAMMA, ALPHA)
        return self._whole()

    def local_updates(self) -> Tensors:
        """The same from the sums of each rank's own shards."""
        self.reduce = torch.clone
        for plan in self.plans:
            plan.synthesize_(GAMMA, ALPHA)
        return self._whole()

    def _whole(self) -> Tensors:
        return [torch.cat(shards) for shards in zip(*self.out, strict=True)]


def ring(tables: Tables) -> Tensor:
    """Their sum as a ring has it: each of `len(tables)` chunks begins at another rank and goes around."""
    count, stacked = len(tables), torch.stack([table.flatten() for table in tables])
    numel = stacked.shape[1]
    columns = torch.arange(numel)
    # Of `numel` elements chunks have ceil(numel / count), the last ones fewer or none.
    first = columns // -(-numel // count)
    total = stacked[first % count, columns]
    for step in range(1, count):
        total = total + stacked[(first + step) % count, columns]
    return total.view_as(tables[0])


def tree(tables: Tables) -> Tensor:
    """Their sum in pairs of neighbours, then pairs of pairs."""
    found = list(tables)
    while len(found) > 1:
        pairs = [a + b for a, b in zip(found[0::2], found[1::2], strict=False)]
        found = pairs + found[2 * len(pairs) :]
    return found[0]


def shuffled(seed: int) -> Callable[[Tables], Tensor]:
    def order(tables: Tables) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return in_order([tables[i] for i in torch.randperm(len(tables), generator=generator).tolist()])

    return order


def in_order(tables: Tables) -> Tensor:
    total = tables[0].clone()
    for table in tables[1:]:
        total += table
    return total


ORDERS: dict[str, Callable[[Tables], Tensor]] = {
    "ring": ring,
    "reverse ring": lambda tables: ring(tables[::-1]),
    "tree": tree,
    "random": shuffled(0),
}


class Difference(NamedTuple):
    """Of updates from those that are right.

    Attributes:
        differing: Elements whose bits are not the same.
        ulps: By how many representable numbers, at most.
        norm: Of the difference, relative to the norm of what is right.
    """

    differing: int
    ulps: int
    norm: float


def difference(updates: Tensors, right: Tensors) -> Difference:
    u, e = (torch.cat([t.flatten() for t in side]) for side in (updates, right))
    steps = (_ordinals(u) - _ordinals(e)).abs()
    u, e = u.double(), e.double()
    norm = ((u - e).norm() / e.norm()).item()
    return Difference(int((steps > 0).sum()), int(steps.max()), norm)


def _ordinals(t: Tensor) -> Tensor:
    """Integers that count the representable numbers from 0; -0 is 0, too."""
    integers = {2: torch.int16, 4: torch.int32}[t.element_size()]
    bits = t.view(integers).long()
    least = torch.iinfo(integers).min
    return torch.where(bits < 0, least - bits, bits)


def compare(forget: Tensors, retain: Tensors, rule: str, shards: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of one rule: the gradients in so many shards against the gradients whole, without `reduce_gram`.

    Sums, coefficients and updates are those of the worst order. An elementwise rule needs no order: each rank
    makes its updates alone.
    """
    dtype = forget[0].dtype
    right, _ = sago.synthesize(forget, retain, rule, GAMMA, ALPHA)
    whole = _gram(*Ranks(forget, retain, rule, 1).tables())
    exact = _exact(forget, retain, len(whole))
    alone = RULES[rule].scope == "element"
    rows = []
    for count in shards:
        ranks = Ranks(forget, retain, rule, count)
        tables = ranks.tables()
        found = [difference(ranks.local_updates(), right)]
        local = found[0].norm
        reduced = [order(tables) for order in ORDERS.values()]
        grams = [_gram(table) for table in reduced]
        sums = [deviation(gram, whole) for gram in grams]
        for name, off in zip(ORDERS, sums, strict=True):
            if not off <= SUMS:  # not `>`: a NaN is wrong
                raise WrongResult(
                    f"{rule} ({_name(dtype)}) in {count} shards, order {name}: sums are off by {off:.1e}, "
                    f"allowed {SUMS:.0e}. Nothing is reported."
                )
        if not alone:
            distinct = [t for i, t in enumerate(reduced) if not any(torch.equal(t, u) for u in reduced[:i])]
            found = [difference(ranks.updates(table), right) for table in distinct]
        worst = Difference(*map(max, zip(*found, strict=True)))
        if not worst.norm <= (0.0 if alone else UPDATES):
            raise WrongResult(
                f"{rule} ({_name(dtype)}) in {count} shards: the update is off by {worst.norm:.1e} of its "
                f"norm, in {worst.differing} elements. Nothing is reported."
            )
        rows.append(
            {
                "dtype": _name(dtype),
                "rule": rule,
                "shards": count,
                "empty": sum(t.numel() == 0 for held in ranks.retain for t in held),
                "sums": max(sums),
                "from_exact": max(deviation(gram, exact) for gram in grams),
                "coefficients": max(_distance(rule, gram, whole) for gram in grams),
                "differing": worst.differing,
                "of": sum(t.numel() for t in forget),
                "ulps": worst.ulps,
                "update_error": worst.norm,
                "local_error": local,
            }
        )
    return rows


def _gram(table: Tensor) -> Tensor:
    """`ff, fr, rr` of every row of what `reduce_gram` is given: the last column counts elements."""
    sums = table[:, :-1]
    return sums[:, 0:3] + sums[:, 6:9] if sums.shape[1] == 9 else sums[:, 0:3]


def _exact(forget: Tensors, retain: Tensors, rows: int) -> Tensor:
    """`ff, fr, rr` of every tensor, or of all in one row, in float64 and rounded once."""
    products: list[list[float]] = []
    for pair in zip(forget, retain, strict=True):
        f, r = (t.flatten().double() for t in pair)
        # The products of bf16 and fp32 numbers are exact in float64.
        products.append([math.fsum((x * y).tolist()) for x, y in ((f, f), (f, r), (r, r))])
    if rows == 1:
        products = [[math.fsum(column) for column in zip(*products, strict=True)]]
    return torch.tensor(products, dtype=torch.float64)


def deviation(gram: Tensor, right: Tensor) -> float:
    """The largest of `|ff - ff'| / ff'`, `|rr - rr'| / rr'` and `|fr - fr'| / (|f||r|)`."""
    ff, _, rr = right.unbind(1)
    scale = torch.stack([ff, (ff * rr).sqrt(), rr], dim=1)
    return torch.where(gram == right, 0.0, (gram - right).abs() / scale).max().item()


def _distance(rule: str, gram: Tensor, right: Tensor) -> float:
    """The largest relative difference between the coefficients of two tables."""
    values, expected = (evaluate(RULES[rule], g, GAMMA, ALPHA, 0.0, g.device).values for g in (gram, right))
    return torch.where(values == expected, 0.0, (values / expected - 1).abs()).max().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
