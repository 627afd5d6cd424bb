"""The cases, rows and targets of the speed benchmark, and what becomes of the wrong and the failing."""

import json

import pytest
import torch

from benchmarks import speed, timing
from benchmarks.__main__ import main
from benchmarks.contenders import EXACT, ceiling, ours, peer
from benchmarks.gradients import Prepared
from benchmarks.peers import where
from benchmarks.released import RULES
from benchmarks.workloads import SWEEP, WORKLOADS

LIST, FEW = "llama-3.2-1b", "rmu"
SMALL = ["speed", "--workload", LIST, FEW, "--rule", "sago", "pcgrad", "--dtype", "bfloat16"]
SMALL += ["--elements=50000", "--repeats=5"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases():
    return {(c.workload, c.dtype): c.contenders for c in speed.cases("quick", cuda=True)}


def test_quick_has_every_list_and_some_of_the_sweep(cases):
    assert {name for name, _ in cases} >= set(WORKLOADS)
    assert {"2^14", "2^30"} <= {name for name, _ in cases} < {*WORKLOADS, *SWEEP}
    for found in cases.values():
        assert {("sago", True), ("sago", False), ("pcgrad", True)} <= {(c.rule, c.stats) for c in found}
        assert [c.name for c in found[:2]] == [c.name for c in ceiling()]
        assert len({c.label for c in found}) == len(found)


def test_quick_has_peers_on_three_lists_and_every_rule_on_one(cases):
    for (name, _), found in cases.items():
        assert ("released" in {c.name for c in found}) == (name in speed.WITH_PEERS)
    assert {c.rule for c in cases["llama-3.2-1b", "bfloat16"]} == {"add", *RULES}
    assert "torch.compile, list" in {c.name for c in cases["lora", "bfloat16"]}


def test_full_has_everything():
    full = {(c.workload, c.dtype): c.contenders for c in speed.cases("full", cuda=True)}
    assert list(full) == [(w, d) for w in (*WORKLOADS, *SWEEP) for d in speed.DTYPES]
    for (name, _), found in full.items():
        assert {c.rule for c in found} == {"add", *RULES}
        assert {(c.stats, c.mode) for c in found if c.name.startswith("sago.")} == {
            (stats, mode) for stats in (True, False) for mode in ("eager", "graph")
        }
        assert ("released" in {c.name for c in found}) == (name in WORKLOADS)


def test_names_select():
    found = list(speed.cases("quick", False, ["rmu", "2^16"], ["blur"], ["float32"]))
    assert [(c.workload, c.dtype) for c in found] == [("rmu", "float32"), ("2^16", "float32")]
    assert {c.rule for case in found for c in case.contenders} == {"add", "blur"}
    assert {c.mode for case in found for c in case.contenders} == {"eager"}


@pytest.fixture(scope="module")
def record(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        assert main([*SMALL, "--json", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert file.name == "cpu.json"
    return json.loads(file.read_text())


def test_rows_hold_what_the_table_shows(record):
    for row in record["rows"]:
        assert set(speed.COLUMNS) <= set(row)
        assert row["note"] is None
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        numel = record["workloads"][row["workload"]]["elements"]
        passes = 5 if row["rule"] == "pcgrad" else 3
        assert row["gb_s"] * 1e9 * row["ms"] / 1e3 == pytest.approx(passes * 2 * numel)
        assert row["rounds"] == 5
    triads = [row for row in record["rows"] if row["contender"] == "torch.add, flat"]
    assert [(row["workload"], row["of_triad"]) for row in triads] == [(LIST, 1.0), (FEW, 1.0)]


def test_the_record_says_where_it_comes_from(record):
    origin = ("device", "cpu", "threads", "torch", "python", "date", "sources", "source", "suite")
    assert all(record[key] for key in origin)
    assert record["targets"] == [], "they are for a GPU and whole lists"
    assert record["workloads"][LIST]["tensors"] == 146
    assert record["workloads"][LIST]["elements"] <= 50_000


def oom(forget, retain, gamma, alpha):
    raise torch.OutOfMemoryError("no room for 1 TiB")


def broken(forget, retain, gamma, alpha):
    raise RuntimeError("no such kernel\nmore")


def wrong(forget, retain, gamma, alpha):
    return where(forget, retain, alpha, gamma)


@pytest.mark.parametrize(
    ("update", "note", "status"),
    [
        (oom, "out of memory", 0),
        (broken, "RuntimeError: no such kernel", 1),
        (wrong, "wrong: made up sago (bfloat16) is not `sago` of sago.reference", 1),
    ],
)
def test_what_fails_has_a_note_and_no_time(update, note, status, monkeypatch, tmp_path, capsys):
    made_up = peer("made up", "sago", update, EXACT, in_place=False)
    case = speed.Case(FEW, "bfloat16", [*ceiling(), made_up, ours("sago", False)])
    monkeypatch.setattr(speed, "cases", lambda *arguments: [case])
    assert main([*SMALL, "--json", str(tmp_path)]) == status
    rows = {row["contender"]: row for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]}
    assert rows["made up"]["note"].startswith(note)
    for field in ("ms", "gb_s", "of_triad", "rounds"):
        assert rows["made up"][field] is None
        assert rows["sago.synthesize_"][field] > 0
    assert note in capsys.readouterr().out


def test_who_fails_in_a_round_is_called_no_more():
    calls = []

    def fail():
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("later")
        return []

    everyone = [Prepared(fail, lambda: None), Prepared(list, lambda: None)]
    clock = timing.Clock(torch.device("cpu"))
    samples, errors = timing.rounds(everyone, clock, 4, 1.0, "test")
    assert (len(calls), len(samples[1])) == (2, 4)
    assert list(errors) == [0]


def test_who_has_spent_its_time_has_five_samples():
    prepared = Prepared(list, lambda: None)
    clock = timing.Clock(torch.device("cpu"))
    samples, _ = timing.rounds([prepared], clock, 9, 0.0, "test")
    assert len(samples[0]) == 5
    samples, _ = timing.rounds([prepared], clock, 9, 1e9, "test")
    assert len(samples[0]) == 9


def test_what_was_timed_is_kept_when_a_run_is_cut_off(monkeypatch, tmp_path):
    def cut(case, *arguments):
        if case.workload == FEW:
            raise KeyboardInterrupt
        return [{"workload": case.workload, "dtype": "float32"}]

    monkeypatch.setattr(speed, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--json", str(tmp_path / "record.json")])
    assert [row["workload"] for row in json.loads((tmp_path / "record.json").read_text())["rows"]] == [LIST]


def test_percentiles():
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def made_up_row(contender, rule, stats, ms, workload="llama-3-8b", **fields):
    row = dict.fromkeys((*speed.COLUMNS, "in_place"))
    return {
        **row,
        "workload": workload,
        "dtype": "bfloat16",
        "contender": contender,
        "rule": rule,
        "stats": stats,
        "mode": "eager",
        "ms": ms,
        **fields,
    }


def test_targets_are_told_from_the_rows():
    rows = [
        made_up_row("sago.synthesize_", "sago", True, 10.0, of_triad=0.9, host_us=40.0),
        made_up_row("sago.synthesize_", "pcgrad", True, 16.0),
        made_up_row("released", "sago", None, 300.0),
        made_up_row("released", "pcgrad", None, 64.0),
        made_up_row("sago.Plan", "sago", True, 10.0, host_us=15.5),
        made_up_row("sago.synthesize_", "sago", False, 0.09, "lora", wall_ms=0.05),
        made_up_row("torch.compile, list", "sago", None, 0.9, "lora"),
        made_up_row("torch.compile, flat", "sago", None, 5.0, "2^30"),
        made_up_row("sago.synthesize_", "sago", False, None, "2^30"),
    ]
    found = {row["target"]: (row["found"], row["met"]) for row in speed.targets(rows)}
    assert found == {
        "sago: of the triad": (0.9, False),
        "pcgrad over sago": (1.6, True),
        "released over sago": (30.0, True),
        "released over pcgrad": (4.0, False),
        "torch.compile over sago, lora": (pytest.approx(10.0), True),
        "sago, lora: wall_ms": (0.05, True),
        "sago: host_us": (40.0, True),
        "sago.Plan: host_us": (15.5, False),
    }


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    file = tmp_path / "record.json"
    assert main([*SMALL, "--device=cuda", "--elements=1000000", "--json", str(file)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["wall_ms"] > 0
        assert row["host_us"] > 0
