"""The cases, rows and targets of the speed benchmark, and its notes for wrong and failing contenders."""

import json

import pytest
import torch

from benchmarks import speed, timing
from benchmarks.__main__ import main
from benchmarks.contenders import ceiling, ours, peer
from benchmarks.gradients import Prepared
from benchmarks.peers import where
from benchmarks.released import RULES
from benchmarks.workloads import SIZES, WORKLOADS

LIST, FEW = "llama-3.2-1b", "rmu"
SMALL = ["speed", "--workload", LIST, FEW, "--rule", "sago", "pcgrad", "--dtype", "bfloat16"]
SMALL += ["--elements=50000", "--repeats=5"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases():
    return {(c.workload, c.dtype): c.contenders for c in speed.cases(cuda=True)}


def test_every_list_is_timed(cases):
    assert {name for name, _ in cases} == {*WORKLOADS, *SIZES}
    for found in cases.values():
        assert {("sago", True), ("sago", False), ("pcgrad", True)} <= {(c.rule, c.stats) for c in found}
        assert [c.name for c in found[:2]] == [c.name for c in ceiling()]
        assert len({c.label for c in found}) == len(found)


def test_three_lists_have_peers_and_one_has_every_rule(cases):
    for (name, _), found in cases.items():
        assert ("released" in {c.name for c in found}) == (name in speed.WITH_PEERS)
    assert {c.rule for c in cases["llama-3.2-1b", "bfloat16"]} == {"add", *RULES}
    assert "torch.compile, list" in {c.name for c in cases["lora", "bfloat16"]}


def test_names_select():
    found = list(speed.cases(False, ["rmu", "2^18"], ["blur"], ["float32"]))
    assert [(c.workload, c.dtype) for c in found] == [("rmu", "float32"), ("2^18", "float32")]
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


def test_lists_are_shrunk_and_have_no_targets_then(record):
    assert record["targets"] == []
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
def test_a_failure_has_a_note_and_no_time(update, note, status, monkeypatch, tmp_path, capsys):
    made_up = peer("made up", "sago", update, in_place=False)
    case = speed.Case(FEW, "bfloat16", [*ceiling(), made_up, ours("sago", False)])
    monkeypatch.setattr(speed, "cases", lambda *arguments: [case])
    assert main([*SMALL, "--json", str(tmp_path)]) == status
    rows = {row["contender"]: row for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]}
    assert rows["made up"]["note"].startswith(note)
    for field in ("ms", "gb_s", "of_triad", "rounds"):
        assert rows["made up"][field] is None
        assert rows["sago.synthesize_"][field] > 0
    assert note in capsys.readouterr().out


def test_a_contender_that_fails_in_a_round_is_not_called_again():
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


def test_a_contender_that_has_spent_its_time_has_five_samples():
    prepared = Prepared(list, lambda: None)
    clock = timing.Clock(torch.device("cpu"))
    samples, _ = timing.rounds([prepared], clock, 9, 0.0, "test")
    assert len(samples[0]) == 5
    samples, _ = timing.rounds([prepared], clock, 9, 1e9, "test")
    assert len(samples[0]) == 9


def test_rows_are_kept_when_a_run_is_interrupted(monkeypatch, tmp_path):
    def cut(case, *arguments):
        if case.workload == FEW:
            raise KeyboardInterrupt
        return [{"workload": case.workload, "dtype": "float32"}]

    monkeypatch.setattr(speed, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--json", str(tmp_path / "record.json")])
    assert [row["workload"] for row in json.loads((tmp_path / "record.json").read_text())["rows"]] == [LIST]


def test_targets_are_computed_from_the_rows():
    rows = [
        ("llama-3-8b", "sago.synthesize_ sago, statistics", {"ms": 10.0, "of_triad": 0.9, "host_us": 40.0}),
        ("llama-3-8b", "sago.synthesize_ pcgrad, statistics", {"ms": 16.0}),
        ("llama-3-8b", "released sago", {"ms": 300.0}),
        ("llama-3-8b", "sago.Plan sago, statistics", {"ms": 10.0, "host_us": 15.5}),
        ("lora", "sago.synthesize_ sago, no statistics", {"ms": 0.08, "wall_ms": 0.12}),
        ("lora", "torch.add, flat add", {"ms": 0.1}),
        ("2^30", "sago.synthesize_ sago, no statistics", {"ms": None}),
        ("2^30", "torch.compile, flat sago", {"ms": 5.0}),
    ]
    rows = [{"workload": w, "label": x, "dtype": "bfloat16", **fields} for w, x, fields in rows]
    other = {**rows[0], "dtype": "float32", "of_triad": 0.1}
    found = [
        (row["target"].split()[0], row["field"], row["found"], row["met"])
        for row in speed.targets([*rows, other])
    ]
    assert found == [
        ("llama-3-8b", "of_triad", 0.9, False),
        ("llama-3-8b", "ms", 1.6, True),
        ("llama-3-8b", "ms", pytest.approx(1 / 30), True),
        ("lora", "wall_ms", pytest.approx(0.9), True),
        ("llama-3-8b", "host_us", 40.0, True),
        ("llama-3-8b", "host_us", 15.5, False),
    ]


def test_every_target_names_rows_that_are_timed(cases):
    names = {f"{w} {c.label}" for (w, dtype), found in cases.items() if dtype == "bfloat16" for c in found}
    for name, field, _, over, _, _ in speed.TARGETS:
        assert {name, over or name} <= names
        assert field in speed.COLUMNS


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    file = tmp_path / "record.json"
    assert main([*SMALL, "--device=cuda", "--elements=1000000", "--json", str(file)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["wall_ms"] > 0
        assert row["host_us"] > 0
