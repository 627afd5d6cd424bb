"""What a step puts on the wire: against rings and trees that count, and what engines communicate."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sago
from benchmarks import shards, wire
from benchmarks.workloads import WORKLOADS, elements
from tests.oracle import rounding_error
from tests.ranks import FSDP2_ON_CPU, NO_FSDP2

RANKS = (1, 2, 3, 7, 8, 16)


class Wire:
    """Counts what ranks send to each other."""

    def __init__(self, ranks):
        self.sent = [0] * ranks
        self.rounds = 0

    def round(self, messages):
        """`messages` are pairs of the sender and what it sends; empty ones are none."""
        self.rounds += 1
        for sender, t in messages:
            self.sent[sender] += t.nbytes

    def mean(self):
        return sum(self.sent) / len(self.sent)


def ring_all_reduce(held, scatter, gather):
    """In place over the tensors of all ranks; the two halves are counted apart."""
    p = len(held)
    size = -(-held[0].numel() // p)
    chunks = [[t.view(-1)[c * size : (c + 1) * size] for c in range(p)] for t in held]
    for step in range(p - 1):
        messages = [(i, (i - step) % p, chunks[i][(i - step) % p].clone()) for i in range(p)]
        scatter.round([(i, t) for i, _, t in messages])
        for i, c, t in messages:
            chunks[(i + 1) % p][c] += t
    for step in range(p - 1):
        messages = [(i, (i + 1 - step) % p, chunks[i][(i + 1 - step) % p].clone()) for i in range(p)]
        gather.round([(i, t) for i, _, t in messages])
        for i, c, t in messages:
            chunks[(i + 1) % p][c].copy_(t)


def tree_all_reduce(held, counted):
    """In place: sums go to rank 0 and come back."""
    p = len(held)
    distances = [1 << k for k in range(math.ceil(math.log2(p)))]
    for d in distances:
        pairs = [(i + d, i) for i in range(0, p, 2 * d) if i + d < p]
        counted.round([(source, held[source]) for source, _ in pairs])
        for source, target in pairs:
            held[target] += held[source]
    for d in reversed(distances):
        pairs = [(i, i + d) for i in range(0, p, 2 * d) if i + d < p]
        counted.round([(source, held[source]) for source, _ in pairs])
        for source, target in pairs:
            held[target].copy_(held[source])


def random_tables(ranks, rows=5, columns=3):
    generator = torch.Generator().manual_seed(ranks)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(ranks)]


def assert_sum(total, tables):
    """In whatever order: each of the two sums is off by a rounding a table, of the magnitudes."""
    allowed = 2 * rounding_error(len(tables), torch.float64) * torch.stack(tables).abs().sum(0)
    assert ((total - torch.stack(tables).sum(0)).abs() <= allowed).all()


@pytest.mark.parametrize("p", RANKS)
def test_a_ring_that_counts(p):
    tables = random_tables(p)
    held = [t.clone() for t in tables]
    scatter, gather = Wire(p), Wire(p)
    ring_all_reduce(held, scatter, gather)
    for t in held:
        assert torch.equal(t, shards.ring(tables))  # also the order of the additions
        assert_sum(t, tables)
    n = tables[0].nbytes
    for counted, cost in ((scatter, wire.reduce_scatter(n, p)), (gather, wire.all_gather(n, p))):
        assert (counted.mean(), counted.rounds) == (pytest.approx(cost.bytes), cost.rounds)
    cost = wire.all_reduce(n, p)
    assert cost.bytes == pytest.approx(scatter.mean() + gather.mean())
    assert cost.rounds == scatter.rounds + gather.rounds
    assert (cost.gathers, cost.reductions) == (0, 1)


@pytest.mark.parametrize("p", RANKS)
def test_a_tree_that_counts(p):
    tables = random_tables(p)
    held = [t.clone() for t in tables]
    counted = Wire(p)
    tree_all_reduce(held, counted)
    for t in held:
        assert torch.equal(t, held[0])
        assert_sum(t, tables)
    cost = wire.all_reduce(tables[0].nbytes, p)
    assert (counted.mean(), counted.rounds) == (pytest.approx(cost.bytes), cost.tree_rounds)


def of(collectives, shard, replicas=1):
    """The cost of collectives that were seen."""
    costs = {
        "_allgather_base_": lambda t: wire.all_gather(t.nbytes, shard),
        "_reduce_scatter_base_": lambda t: wire.reduce_scatter(t.nbytes, shard),
        "allreduce_": lambda t: wire.all_reduce(t.nbytes, replicas),
    }
    return wire.total(wire.Cost(), *(costs[name](t) for name, t in collectives.found))


class Decoder(torch.nn.Module):
    """An embedding, layers, a norm and a head, of sizes that no number of ranks divides."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 6)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(6, 11, bias=False), torch.nn.Linear(11, 6, bias=False))
            for _ in range(layers)
        )
        self.norm = torch.nn.RMSNorm(6)
        self.head = torch.nn.Linear(6, 13, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def one_backward(loss):
    (loss() + loss()).backward()


def alternating(loss):
    for _ in range(2):
        loss().backward()


def forwards_first(loss):
    for x in [loss(), loss()]:
        x.backward()


@pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
@pytest.mark.parametrize("reduce_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("step", "backwards"), [(one_backward, 1), (alternating, 2), (forwards_first, 2)])
@pytest.mark.parametrize(("replicas", "shard"), [(1, 8), (2, 4)])
def test_fsdp2_communicates_what_is_counted(replicas, shard, step, backwards, micro_batches, reduce_dtype):
    layers = 3
    with wire.without_ranks(8):
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, shard), mesh_dim_names=names)
        model = Decoder(layers).bfloat16()
        shapes = [tuple(p.shape) for p in model.parameters()]
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        for module in [*model.layers, model]:
            fully_shard(module, mesh=mesh if replicas > 1 else mesh["shard"], mp_policy=policy)
        tokens = torch.arange(4)[None]

        def loss():
            return model(tokens).sum()

        loss().backward()  # the first lets FSDP see in which order modules come
        with wire.Collectives() as seen:
            for _ in range(micro_batches):
                step(loss)
    cost = wire.fsdp2(
        wire.fsdp_groups(shapes, layers),
        shard,
        replicas,
        reduce_dtype.itemsize,
        2 * micro_batches,
        backwards * micro_batches,
    )
    assert list(of(seen, shard, replicas)) == pytest.approx(list(cost))


def test_groups_are_the_rest_and_the_layers():
    groups = wire.fsdp_groups(WORKLOADS["llama-3-8b"], 32)
    assert [len(group) for group in groups] == [3, *[9] * 32]
    assert sum(map(elements, groups)) == 8_030_261_248
    assert groups[0] == [(128256, 4096), (4096,), (128256, 4096)]


def test_padding():
    # 126 rows of 1,024 ranks hold 128,256; DeepSpeed pads elements, which 1,024 divides.
    assert wire.fsdp_numel([(128256, 4096)], 1024) == 126 * 1024 * 4096
    assert wire.zero3_numel([(128256, 4096)], 1024) == 128256 * 4096
    assert wire.fsdp_numel([(3, 5), (2,)], 4) == 4 * 5 + 4
    assert wire.zero3_numel([(3, 5), (2,)], 4) == 16 + 4


def test_buckets_of_ddp():
    """What DDP itself says of its buckets, once it has rebuilt them."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layers = [torch.nn.Linear(1000, 1000 + 60 * i, bias=i % 2 == 0) for i in range(16)]
        model = torch.nn.ModuleList(layers)
        ddp = DistributedDataParallel(torch.nn.Sequential(*(Narrow(layer) for layer in model)))
        for _ in range(3):
            ddp(torch.ones(1, 1000)).sum().backward()
        said = ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    finally:
        torch.distributed.destroy_process_group()
    shapes = [tuple(p.shape) for p in ddp.parameters()]
    sizes = wire.ddp_buckets(shapes, 4)
    assert len(sizes) > 2
    assert sizes == [int(x) for x in said.split(", ")]
    cost = wire.ddp(shapes, 4, 4, backwards=3)
    assert cost.reductions == 3 * len(sizes)
    assert cost.bytes == pytest.approx(3 * 2 * 3 / 4 * 4 * elements(shapes))


class Narrow(torch.nn.Module):
    """Passes on the first 1000 features."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[:, :1000]


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float32])
def test_sago_reduces_its_accumulators_once_a_window(accumulate_dtype):
    with wire.without_ranks(4):
        ddp = DistributedDataParallel(Decoder(3).bfloat16())
        buckets = sago.GradientBuckets(ddp, accumulate_dtype=accumulate_dtype, bucket_cap_mb=1000 / 2**20)
        tokens = torch.arange(4)[None]
        for _ in range(2):
            with wire.Collectives() as captures:
                for capture in (buckets.forget, buckets.retain, buckets.forget, buckets.retain):
                    with capture():
                        ddp(tokens).sum().backward()
            with wire.Collectives() as seen:
                buckets.synthesize_("pcgrad")
            buckets.zero_()
        shapes = [tuple(p.shape) for p in ddp.parameters()]
    itemsize = 4 if accumulate_dtype else 2
    sizes = wire.sago_buckets(shapes, itemsize, 1000 / 2**20)
    assert len(sizes) > 2
    assert captures.found == []
    assert [(name, t.nbytes) for name, t in seen.found] == [("allreduce_", n) for n in 2 * sizes]


def test_the_take_over_is_of_two_accumulators():
    shapes = [(300, 1000), (7,)]
    (size,) = wire.sago_buckets(shapes, 2)
    assert wire.take_over(shapes, 8, 2) == wire.times(2, wire.all_reduce(size, 8))
    assert size >= 2 * elements(shapes)


def test_zero3(monkeypatch):
    """Two forwards and two backwards of four parameters, one of which stays whole."""
    monkeypatch.setattr(wire, "PERSISTENT", 10)
    monkeypatch.setattr(wire, "REDUCE_BUCKET", 100)
    shapes = [(90,), (9,), (30, 2), (41,)]
    found = wire.zero3(shapes, 4, 2, forwards=2, backwards=2)
    gathers = [wire.all_gather(2 * n, 4) for n in (92, 60, 44)]
    # In the order of backward: 41, 60 would make 101 with it, then 9, and 90 would make 159 with them.
    reductions = [wire.reduce_scatter(2 * n, 4) for n in (44, 60 + 12, 92)]
    expected = wire.total(
        *(wire.times(4, cost) for cost in gathers),
        wire.all_gather(2 * 12, 4),
        *(wire.times(2, cost) for cost in reductions),
    )
    assert found == pytest.approx(expected)


@pytest.fixture(scope="module")
def tables():
    return {n: {(r["rule"], r["statistics"], r["max_norm"]): r for r in wire.tables(n, (8,))} for n in (3, 5)}


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(
    ("rule", "stats", "max_norm", "one_row", "columns"),
    [
        ("sago", False, False, False, 0),
        ("sum", False, False, False, 0),
        ("sago", True, False, False, 9),
        ("sago", False, True, False, 9),
        ("sum", True, False, False, 6),
        ("pcgrad", False, False, False, 3),
        ("pcgrad", True, False, False, 6),
        ("pcgrad_global", False, False, True, 3),
        ("blur", False, True, True, 6),
    ],
)
def test_tables_of_the_library(tables, n, rule, stats, max_norm, one_row, columns):
    row = tables[n][rule, stats, max_norm]
    rows = 0 if columns == 0 else 1 if one_row else n
    assert (row["collectives"], row["rows"], row["columns"]) == (int(columns > 0), rows, columns)
    assert row["bytes"] == 8 * rows * columns
    assert row["bytes_a_rank_of_8"] == pytest.approx(2 * 7 / 8 * row["bytes"])


def test_other_communication_of_a_synthesis_is_refused(monkeypatch):
    def chatty(buckets, *args):
        torch.distributed.all_reduce(torch.zeros(3))

    monkeypatch.setattr(wire, "_synthesize", chatty)
    with pytest.raises(RuntimeError, match="should only sum tables over the ranks"):
        wire.tables(2)


@pytest.fixture(scope="module")
def rows():
    return {
        (r["engine"], r["step"], r["ranks"], r["micro_batches"], r["reduced_in"]): r for r in wire.engines()
    }


@pytest.mark.parametrize("p", wire.RANKS)
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_ddp_on_llama(rows, p, dtype, size):
    once = 2 * (p - 1) / p * size * 8_030_261_248
    found = [
        rows["DDP", step, p, 1, dtype]["bytes"] / once
        for step in (
            "one backward of the sum", "two backwards, each reduced by DDP", "two backwards, reduced by sago",
        )
    ]  # fmt: skip
    assert found == pytest.approx([1, 2, 2], rel=1e-6)  # the buffers have gaps


@pytest.mark.parametrize("p", wire.RANKS)
def test_a_window_costs_sago_no_more_than_a_micro_batch(rows, p):
    step = "two backwards, reduced by sago"
    one, many = (rows["DDP", step, p, n, "bfloat16"] for n in (1, wire.WINDOW))
    assert one["bytes"] == many["bytes"]
    step = "two backwards, each reduced by DDP"
    one, many = (rows["DDP", step, p, n, "bfloat16"] for n in (1, wire.WINDOW))
    assert many["bytes"] == pytest.approx(wire.WINDOW * one["bytes"])


def test_the_second_backward_of_fsdp2_is_a_reduction_and_a_gather_of_the_first_group(rows):
    shapes = WORKLOADS["llama-3-8b"]
    groups = wire.fsdp_groups(shapes, 32)
    one, two = (
        rows["FSDP2", step, 64, 1, "bfloat16"] for step in ("one backward of the sum", "two backwards")
    )
    more = wire.all_gather(2 * wire.fsdp_numel(groups[0], 64), 64).bytes
    more += wire.reduce_scatter(2 * wire.fsdp_numel(shapes, 64), 64).bytes
    assert two["bytes"] - one["bytes"] == pytest.approx(more)
    assert (two["gathers"] - one["gathers"], two["reductions"] - one["reductions"]) == (1, 33)


def test_every_engine_has_rows_for_every_number_of_ranks(rows):
    engines = {p: {e.split(",")[0] for e, _, q, _, _ in rows if q == p} for p in wire.RANKS}
    assert engines == {
        8: {"DDP", "FSDP2", "ZeRO-3"},
        64: {"DDP", "FSDP2", "HSDP", "ZeRO-3"},
        1024: {"DDP", "FSDP2", "HSDP", "ZeRO-3"},
    }
