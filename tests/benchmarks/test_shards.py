"""The simulated shards: updates do not drift with their number, and a wrong sum or update is detected."""

import json

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

import sago
from benchmarks import shards
from benchmarks.__main__ import main
from benchmarks.gradients import WrongResult
from benchmarks.shards import Ranks

SHARDS = (1, 3, 8, 71)
SMALL = shards.MODEL._replace(layers=1, vocabulary=67)
GRAM = ("pcgrad", "pcgrad_global", "blur")
ELEMENTWISE = ("sum", "sago", "sago_prefer_retain")


@pytest.fixture(autouse=True, scope="module")
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MODEL", SMALL)
        yield


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def gradients(request):
    return shards.gradients(request.param)


@pytest.mark.parametrize("rows", [1, 5, 8, 67, 112])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_shards_are_those_of_fsdp2(rows, ranks):
    t = torch.arange(3 * rows).view(rows, 3)
    found = shards.split(t, ranks)
    assert [part.numel() for part in found] == [c.numel() for c in _chunk_with_empty(t, ranks, 0)]
    assert torch.equal(torch.cat(found), t)


@pytest.mark.parametrize("rule", [*GRAM, *ELEMENTWISE])
def test_updates_do_not_drift_with_the_number_of_shards(gradients, rule):
    rows = shards.compare(*gradients, rule, SHARDS)
    assert [row["shards"] for row in rows] == list(SHARDS)
    assert rows[0]["sums"] == rows[0]["differing"] == rows[0]["wire_bytes"] == 0
    sums = {"sago": 9, "sago_prefer_retain": 9}.get(rule, 6)
    table = 1 if rule in ("pcgrad_global", "blur") else len(gradients[0]), sums + 1  # with the elements
    for row in rows:
        assert tuple(row) == shards.COLUMNS
        assert row["sums"] < 1e-6  # the promise of every backend
        assert row["update_error"] < 1e-6
        assert row["table"] == f"{table[0]}x{table[1]}"
        assert row["of"] == sum(t.numel() for t in gradients[0])
        if rule in ELEMENTWISE:
            assert (row["differing"], row["local_error"]) == (0, 0)
    assert rows[-1]["empty"] > 0
    assert rows[1]["wire_bytes"] == pytest.approx(4 / 3 * 8 * table[0] * table[1])


@pytest.mark.parametrize(
    ("rule", "columns"), [("sum", None), ("sago", None), ("pcgrad", 3), ("pcgrad_global", 3), ("blur", 3)]
)
def test_tables_without_statistics(gradients, rule, columns):
    tables = []
    out = [torch.empty_like(t) for t in gradients[1]]
    sago.synthesize_(*gradients, rule, out=out, stats=False, reduce_gram=lambda t: tables.append(t.shape[1]))
    assert tables == ([] if columns is None else [columns + 1])


@pytest.mark.parametrize("rule", GRAM)
def test_updates_of_local_inner_products_drift(gradients, rule):
    errors = [row["local_error"] for row in shards.compare(*gradients, rule, (1, 2, 67))]
    assert errors[0] == 0
    assert 1e-3 < errors[1] < errors[2]
    assert errors[2] > 0.05


WRONG = {
    "without the last rank": lambda tables: tables[:-1],
    "one rank twice": lambda tables: [*tables, tables[2]],
    "its own": lambda tables: tables[:1],
    "NaN": lambda tables: [*tables, tables[0] * torch.nan],
    "off by a part in 100,000": lambda tables: [t * (1 + 1e-5) for t in tables],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rule", ["pcgrad", "blur", "sago"])
def test_a_wrong_sum_is_detected(gradients, rule, wrong, monkeypatch):
    alone = Ranks.alone

    def spoilt(self):
        updates, tables = alone(self)
        return updates, tables if len(tables) == 1 else WRONG[wrong](tables)

    monkeypatch.setattr(Ranks, "alone", spoilt)
    with pytest.raises(WrongResult, match=f"{rule} .* in 3 shards: the relative error of the sums"):
        shards.compare(*gradients, rule, (3,))


@pytest.mark.parametrize("rule", GRAM)
def test_an_update_from_other_sums_is_detected(gradients, rule, monkeypatch):
    monkeypatch.setattr(Ranks, "together", lambda self, total: self.alone()[0])
    with pytest.raises(WrongResult, match=f"{rule} .* in 3 shards: the relative error of the updates"):
        shards.compare(*gradients, rule, (3,))


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_one_element_of_an_elementwise_update_is_detected(gradients, rule, monkeypatch):
    alone = Ranks.alone

    def wrong(self):
        updates, tables = alone(self)
        bits = updates[-1].view(torch.int16 if updates[-1].element_size() == 2 else torch.int32)
        bits[-1, -1] += 1
        return updates, tables

    monkeypatch.setattr(Ranks, "alone", wrong)
    with pytest.raises(WrongResult, match="relative error of the updates"):
        shards.compare(*gradients, rule, (3,))


def test_deviations():
    right = torch.tensor([[4.0, 0.0, 9.0], [0.0, 0.0, 1.0]])
    assert shards.deviation(right, right) == 0
    assert shards.deviation(torch.tensor([[4.0, 0.6, 9.0], [0.0, 0.0, 1.0]]), right) == pytest.approx(0.1)
    assert shards.deviation(torch.tensor([[5.0, 0.0, 9.0], [0.0, 0.0, 1.0]]), right) == pytest.approx(0.25)


def test_the_command(capsys, tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    command = ["shards", "--shards", "1", "3", "--rule", "pcgrad", "--dtype", "float32", "--json", str(file)]
    assert main(command) == 0
    record = json.loads(file.read_text())
    assert [(row["rule"], row["dtype"], row["shards"]) for row in record["rows"]] == [
        ("pcgrad", "float32", 1),
        ("pcgrad", "float32", 3),
    ]
    assert record["sources"] == ["sago", "benchmarks/shards.py"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 2

    file.unlink()
    monkeypatch.setattr(Ranks, "together", lambda self, total: self.alone()[0])
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "in 3 shards: the relative error of the updates" in printed.err
    assert not file.exists()
