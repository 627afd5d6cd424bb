"""The simulation of shards: what it splits, adds up and compares; it sees what is wrong. No timings."""

import json

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

from benchmarks import memory, shards
from benchmarks.__main__ import main
from benchmarks.gradients import WrongResult
from benchmarks.shards import Ranks, difference
from tests.oracle import rounding_error

SHARDS = (1, 3, 8, 71)
SMALL = memory.Shape(hidden=32, layers=1, vocabulary=67)
GRAM = ("pcgrad", "pcgrad_global", "blur")
ELEMENTWISE = ("sum", "sago", "sago_prefer_retain")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(shards, "MODEL", SMALL)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def gradients(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MODEL", SMALL)
        return shards.gradients(request.param)


@pytest.mark.parametrize("rows", [1, 5, 8, 67, 112])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_shards_are_those_of_fsdp2(rows, ranks):
    t = torch.arange(3 * rows).view(rows, 3)
    found = shards.split(t, ranks)
    assert [part.numel() for part in found] == [c.numel() for c in _chunk_with_empty(t, ranks, 0)]
    assert torch.equal(torch.cat(found), t)
    assert all(part.shape[1] == 3 for part in found)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_orders_add_up_every_table_once(count):
    tables = [torch.arange(14.0, dtype=torch.float64).view(7, 2) * 3**i for i in range(count)]
    for name, order in shards.ORDERS.items():
        assert torch.equal(order(tables), sum(tables)), name


def test_orders_are_different_ones():
    generator = torch.Generator().manual_seed(0)
    tables = list(torch.randn(64, 7, 2, generator=generator, dtype=torch.float64))
    totals = [order(tables) for order in shards.ORDERS.values()]
    for i, total in enumerate(totals):
        allowed = 2 * rounding_error(len(tables), torch.float64) * torch.stack(tables).abs().sum(0)
        assert ((total - totals[0]).abs() <= allowed).all()
        assert not any(torch.equal(total, other) for other in totals[:i])


@pytest.mark.parametrize("rule", [*GRAM, *ELEMENTWISE])
def test_updates_do_not_drift_with_the_number_of_shards(gradients, rule):
    rows = shards.compare(*gradients, rule, SHARDS)
    assert [row["shards"] for row in rows] == list(SHARDS)
    assert rows[0]["sums"] == rows[0]["coefficients"] == rows[0]["differing"] == 0
    for row in rows:
        assert tuple(row) == shards.COLUMNS
        assert max(row["sums"], row["from_exact"], row["coefficients"]) < 1e-7
        assert row["of"] == sum(t.numel() for t in gradients[0])
        assert row["update_error"] < 1e-7
        if rule in ELEMENTWISE:
            assert (row["differing"], row["ulps"], row["local_error"]) == (0, 0, 0)
    assert rows[-1]["empty"] > 0


@pytest.mark.parametrize("rule", GRAM)
def test_updates_of_local_inner_products_drift(gradients, rule):
    rows = shards.compare(*gradients, rule, (1, 2, 67))
    errors = [row["local_error"] for row in rows]
    assert errors[0] == 0
    assert 1e-3 < errors[1] < errors[2]
    assert errors[2] > 0.05


WRONG = {
    "without the last rank": lambda tables: shards.ring(tables[:-1]),
    "without the first rank": lambda tables: shards.in_order(tables[1:]),
    "one rank twice": lambda tables: shards.ring([*tables, tables[2]]),
    "the rank's own": lambda tables: tables[0],
    "NaN": lambda tables: shards.ring(tables) * torch.nan,
    "off by a part in 100,000": lambda tables: shards.ring(tables) * (1 + 1e-5),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rule", ["pcgrad", "blur", "sago"])
def test_a_wrong_sum_is_seen(gradients, rule, wrong, monkeypatch):
    monkeypatch.setattr(shards, "ORDERS", {"ring": shards.ring, "wrong": WRONG[wrong]})
    with pytest.raises(WrongResult, match=f"{rule} .* in 3 shards, order wrong: sums are off"):
        shards.compare(*gradients, rule, (3,))


@pytest.mark.parametrize("rule", GRAM)
def test_an_update_from_other_sums_is_seen(gradients, rule, monkeypatch):
    monkeypatch.setattr(Ranks, "updates", lambda self, table: self.local_updates())
    with pytest.raises(WrongResult, match=f"{rule} .* in 3 shards: the update is off"):
        shards.compare(*gradients, rule, (3,))


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_one_element_of_an_elementwise_update_is_seen(gradients, rule, monkeypatch):
    right = Ranks.local_updates

    def wrong(self):
        updates = right(self)
        bits = updates[-1].view(torch.int16 if updates[-1].element_size() == 2 else torch.int32)
        bits[-1, -1] += 1
        return updates

    monkeypatch.setattr(Ranks, "local_updates", wrong)
    with pytest.raises(WrongResult, match="in 1 elements"):
        shards.compare(*gradients, rule, (3,))


def test_differences_are_counted_in_representable_numbers():
    right = torch.tensor([1.0, -1.0, 0.0, 3.0])
    up = torch.nextafter(right, torch.tensor(torch.inf))
    assert difference([right], [right.clone()]) == (0, 0, 0.0)
    assert difference([torch.tensor([1.0, -1.0, -0.0, 3.0])], [right]).differing == 0
    assert difference([up], [right])[:2] == (4, 1)
    across = torch.tensor([1e-45, -1e-45])
    assert difference([across], [across.flip(0)])[:2] == (2, 2)
    found = difference([torch.tensor([1.0, 2.0]).bfloat16()], [torch.tensor([1.0, 1.984375]).bfloat16()])
    assert found[:2] == (1, 2)
    assert found.norm == pytest.approx(0.015625 / (1 + 1.984375**2) ** 0.5)


def test_deviations():
    right = torch.tensor([[4.0, 0.0, 9.0], [0.0, 0.0, 1.0]])
    assert shards.deviation(right, right) == 0
    assert shards.deviation(torch.tensor([[4.0, 0.6, 9.0], [0.0, 0.0, 1.0]]), right) == pytest.approx(0.1)
    assert shards.deviation(torch.tensor([[5.0, 0.0, 9.0], [0.0, 0.0, 1.0]]), right) == pytest.approx(0.25)


@pytest.fixture
def quick(monkeypatch):
    """The command without the tables of 291 tensors, which `test_wire` has."""
    monkeypatch.setattr(
        shards.wire, "tables", lambda tensors, ranks: [{"rule": "pcgrad", "tensors": tensors}]
    )
    return ["shards", "--shards", "1", "3", "--rule", "pcgrad", "--dtype", "float32"]


def test_the_command(quick, capsys, tmp_path):
    file = tmp_path / "record.json"
    assert main([*quick, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [(row["rule"], row["dtype"], row["shards"]) for row in record["rows"]] == [
        ("pcgrad", "float32", 1),
        ("pcgrad", "float32", 3),
    ]
    assert record["sources"] == ["sago", "benchmarks/shards.py", "benchmarks/wire.py"]
    assert (record["vocabulary"], record["tables"]) == (67, [{"rule": "pcgrad", "tensors": 291}])
    assert [row["ranks"] for row in record["latencies"]] == [8, 64, 1024]
    printed = capsys.readouterr().out.split("\n\n")
    heads = [part.split()[0] for part in printed]
    assert heads == ["device", "engine", "rule", "ranks", "dtype"]
    assert len(printed[1].splitlines()) == 1 + len(record["engines"])


def test_a_wrong_result_ends_the_command_without_a_table(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ORDERS", {"wrong": WRONG["the rank's own"]})
    assert main([*quick, "--json", str(tmp_path / "record.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "in 3 shards, order wrong: sums are off" in printed.err
    assert not list(tmp_path.iterdir())
