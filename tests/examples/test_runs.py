"""The runs of a grid: files, processes, resumption, and the same numbers again."""

import json
from dataclasses import replace

import pytest
import torch

from examples.grid import Cell, Grid
from examples.record import write
from examples.runs import STEP, completed, described, run
from examples.worlds import choose
from examples.worlds.invented import Invented

# Raised inside of torch when torch.compile is first used.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

TINY = Invented(people=10, islands=4, digits=3, vocab=400, hidden=32, layers=1, train_steps=20)
GRID = Grid(
    objectives=("NPO",),
    rules=("sum", "sago"),
    rates=(1e-3,),
    gammas=(1.0, 3.0),
    measured=(1, 2, 4),
    batch_size=4,
    enough=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (GRID.trial_seed, *GRID.seeds):
        TINY.prepare(folder, seed)
    return folder


def test_the_experiment_is_that_of_the_paper():
    grid = Grid()
    assert grid.objectives == ("GradDiff", "NPO", "SimNPO")
    assert grid.rules == ("sum", "pcgrad", "pcgrad_global", "sago")
    assert len(grid.seeds) >= 2
    assert len(grid.rates) >= grid.kept >= 2
    assert grid.trial_seed not in grid.seeds


def test_every_cell_once():
    grid = Grid()
    trials = grid.trials()
    assert len(trials) == len(set(trials)) == 3 * 4 * len(grid.rates) * len(grid.gammas)
    assert {cell.seed for cell in trials} == {grid.trial_seed}
    gammas = {(cell.objective, cell.rule, cell.rate): 2.0 for cell in trials}
    cells = grid.final(gammas)
    assert len(cells) == len(set(cells)) == len(gammas) * len(grid.seeds)
    assert {(cell.gamma, cell.seed) for cell in cells} == {(2.0, seed) for seed in grid.seeds}


def a_trial(rule, gamma, forget, right, rate=1e-3):
    known = {"forget": {"probability": forget}, "retain": {"answers": right}}
    return {
        "objective": "NPO",
        "rule": rule,
        "rate": rate,
        "gamma": gamma,
        "known": known,
        "measured": [0, 1],
        "seconds": [1.0],
    }


def test_the_weight_that_keeps_most_at_the_level_is_chosen():
    trials = [
        a_trial("sum", 1.0, [0.5, 0.0], [1.0, 0.2]),
        a_trial("sum", 3.0, [0.5, 0.0], [1.0, 0.6]),
        a_trial("sago", 1.0, [0.5, 0.4], [1.0, 1.0]),  # keeps everything, and forgets nothing
        a_trial("sago", 3.0, [0.5, 0.0], [1.0, 0.9]),
    ]
    assert GRID.chosen(trials) == {("NPO", "sum", 1e-3): 3.0, ("NPO", "sago", 1e-3): 3.0}


def test_the_best_learning_rates_of_each_rule_are_kept():
    """Here the best two of three, in the order of the grid. A rate that does not reach the level is last."""
    grid = replace(GRID, rules=("sago",), rates=(1e-3, 2e-3, 3e-3))
    trials = [
        a_trial("sago", gamma, [0.5, forget], [1.0, right], rate)
        for rate, gamma, forget, right in (
            (1e-3, 1.0, 0.0, 0.7),
            (1e-3, 3.0, 0.0, 0.2),
            (2e-3, 1.0, 0.3, 1.0),
            (2e-3, 3.0, 0.4, 1.0),
            (3e-3, 1.0, 0.0, 0.3),
            (3e-3, 3.0, 0.0, 0.9),
        )
    ]
    assert list(grid.chosen(trials).items()) == [(("NPO", "sago", 1e-3), 1.0), (("NPO", "sago", 3e-3), 3.0)]


def test_the_weight_that_forgets_most_is_chosen_if_none_reaches_the_level():
    trials = [
        a_trial(rule, gamma, [0.5, forget], [1.0, 1.0])
        for rule in GRID.rules
        for gamma, forget in ((1.0, 0.4), (3.0, 0.3))
    ]
    assert set(GRID.chosen(trials).values()) == {3.0}


def test_a_world_depends_on_its_seed_only():
    first, again, other = (TINY.untrained(seed) for seed in (0, 0, 1))
    assert first.facts == again.facts != other.facts
    for p, same in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, same)


def test_all_cells_of_a_seed_see_the_same_batches():
    def drawn(seed):
        batches = TINY.untrained(0).batches(4, 4, seed)
        return [side["input_ids"].tolist() for pair in batches for side in pair]

    assert drawn(0) == drawn(0) != drawn(1)


def test_what_is_saved_is_what_was_learned(folder):
    world = TINY.untrained(1)
    TINY.teach(world, 1, quiet=True)
    opened = TINY.open(folder, 1)
    assert opened.known(opened.model) == world.known(world.model)
    untrained = TINY.untrained(1)
    assert opened.known(opened.model) != untrained.known(untrained.model)


def test_a_run_again_gives_the_same_numbers(folder):
    cell = Cell("NPO", "sago", 1e-3, 1.0, seed=1)
    first, again = (run(TINY, folder, GRID, cell, ["Question:"]) for _ in range(2))
    assert first.pop("seconds") != again.pop("seconds")
    assert first == again
    assert set(first["steps"]) == set(STEP)
    assert all(len(values) == GRID.steps for values in first["steps"].values())
    assert all(len(values) == 4 for values in first["known"]["general"].values())
    assert len(first["completions"]) == 1


def test_a_run_ends_when_the_model_has_forgotten(folder):
    found = run(TINY, folder, replace(GRID, enough=1.0), Cell("NPO", "sum", 1e-3, 1.0, seed=1))
    assert len(found["seconds"]) == GRID.measured[0]


def test_finished_runs_are_read_and_missing_ones_are_made(folder):
    cells = GRID.trials()
    first = completed(TINY, folder, GRID, cells, 0, "runs")
    paths = sorted((folder / "runs").iterdir())
    assert [path.name for path in paths] == sorted(f"{cell}.json" for cell in cells)
    paths[0].unlink()
    marked = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps({**marked, "marked": True}))
    again = completed(TINY, folder, GRID, cells, 0, "runs")
    assert paths[0].exists()
    assert sum("marked" in found for found in again) == 1
    for found, same in zip(first, again, strict=True):
        assert found["known"] == same["known"]


def test_processes_give_the_same_numbers(folder, tmp_path):
    cells = GRID.trials()[:2]
    here = completed(TINY, folder, GRID, cells, 0, "runs")
    (tmp_path / "runs").mkdir()
    for path in folder.glob("*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    there = completed(TINY, tmp_path, GRID, cells, 1, "runs")
    for found, same in zip(here, there, strict=True):
        assert {**found, "seconds": None} == {**same, "seconds": None}


def test_a_description_of_the_worlds(folder):
    (row,) = described(TINY, folder, [1])
    assert row["facts"] == {"forget": 8, "retain": 72, "general": 21}
    assert row["known"]["retain"]["probability"] > 0
    assert row["choices"] == row["random"] == {}  # made-up facts have no wrong answers


def test_every_world_has_a_name():
    assert choose.kind_of("people")[0] == Invented()


def test_a_record_has_a_line_a_run(tmp_path):
    record = {"grid": {"steps": 3}, "worlds": [{"seed": 0}], "runs": [{"a": [1, 2]}, {"b": 0.5}], "x": None}
    path = tmp_path / "record.json"
    write(record, path)
    assert json.loads(path.read_text()) == record
    lines = path.read_text().splitlines()
    assert lines.count('  {"a":[1,2]},') == 1
    assert len(lines) == 11
