"""The rows and fields of the CPU benchmark, and that it refuses to report a wrong result. No timings."""

import json

import pytest
import torch

from benchmarks import cpu, peers
from benchmarks.__main__ import main
from benchmarks.contenders import EXACT, ROUNDING, STEPWISE, peer
from benchmarks.gradients import WrongResult

# Raised inside of torch when torch.compile is first used, the second one by torch 2.6.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning"),
]

ELEMENTS = 4096 * 3


@pytest.fixture(scope="module")
def record():
    return cpu.run(ELEMENTS, tensors=3, repeats=3)


def test_every_contender_has_a_row_for_each_dtype(record):
    for dtype in ("bfloat16", "float32"):
        names = [(row["contender"], row["in_place"]) for row in record["rows"] if row["dtype"] == dtype]
        assert names == [(c.name, c.in_place) for c in cpu.CONTENDERS]
    assert len(record["rows"]) == 2 * len(cpu.CONTENDERS)


def test_rows_hold_what_the_table_shows(record):
    for row in record["rows"]:
        assert tuple(row) == cpu.COLUMNS
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["ratio_to_add"] > 0
        assert (row["target"] is None) == (row["met"] is None)
    by_name = {(row["dtype"], row["contender"]): row for row in record["rows"]}
    assert by_name["float32", "torch.add(f, r, out=r)"]["ratio_to_add"] == 1
    assert by_name["float32", "torch.add(f, r, out=r)"]["faster_than_released"] is None
    assert by_name["float32", "released pcgrad"]["faster_than_released"] == 1
    assert by_name["float32", "sago"]["target"] == "ratio_to_add <= 1.5"
    assert by_name["bfloat16", "sago"]["target"] == "ratio_to_add <= 1.5; faster_than_released >= 50"
    assert by_name["bfloat16", "sago"]["met"].count(";") == 1


def test_the_record_says_where_it_comes_from(record):
    assert record["elements"] == ELEMENTS
    assert record["shape"] == [4096, 1]
    origin = ("device", "cpu", "threads", "torch", "python", "date", "sources", "source")
    assert all(record[key] for key in origin)
    json.dumps(record)


def test_the_shape_has_4096_rows_or_is_flat():
    run = {"tensors": 2, "repeats": 1, "dtypes": [torch.float32], "contenders": cpu.CONTENDERS[:1]}
    assert cpu.run(4096 * 4, **run)["shape"] == [4096, 2]
    assert cpu.run(100, **run)["shape"] == [50]


def sloppy(forget, retain, gamma, alpha):
    return [
        torch.where(f * r <= 0, alpha * r, gamma * f).mul_(1.01) for f, r in zip(forget, retain, strict=True)
    ]


def swapped(forget, retain, gamma, alpha):
    return peers.where(forget, retain, alpha, gamma)


def without_the_last(forget, retain, gamma, alpha):
    updates = peers.where(forget, retain, gamma, alpha)
    updates[-1].view(-1)[-1] = float("nan")
    return updates


@pytest.mark.parametrize("wrong", [sloppy, swapped, without_the_last])
@pytest.mark.parametrize("tolerance", [EXACT, ROUNDING])
def test_a_wrong_contender_is_refused(wrong, tolerance):
    contenders = (peer("wrong", "sago", wrong, tolerance, in_place=False),)
    with pytest.raises(WrongResult, match=r"wrong sago \(bfloat16\) is not `sago`"):
        cpu.run(ELEMENTS, 3, 1, contenders=contenders)


def test_an_update_that_was_not_written_is_refused():
    contenders = (peer("idle", "pcgrad", lambda f, r, gamma, alpha: r, STEPWISE),)
    with pytest.raises(WrongResult, match="idle pcgrad"):
        cpu.run(ELEMENTS, 1, 1, contenders=contenders)


def test_a_wrong_contender_ends_the_command_without_a_table(monkeypatch, capsys, tmp_path):
    wrong = peer("wrong", "sago", swapped, EXACT, in_place=False)
    monkeypatch.setattr(cpu.run, "__defaults__", (*cpu.run.__defaults__[:-1], (wrong,)))
    assert main(["cpu", "--elements", "100", "--json", str(tmp_path / "record.json")]) == 1
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_accuracy_command(capsys, tmp_path):
    file = tmp_path / "record.json"
    assert main(["cpu", "--accuracy", "--elements", "100000", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32", "float64"}
    assert {row["backend"] for row in rows} == {"compiled", "compiled, no compiler", "reference"}
    for row in rows:
        assert row["met"], row
        assert max(row["ff"], row["fr"], row["rr"]) <= 1e-6
    assert "compiled, no compiler" in capsys.readouterr().out
