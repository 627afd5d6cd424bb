"""The grid, the worlds and the record of the experiment."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from examples.grid import QUICK, Setup
from examples.record import write
from examples.sweep import workers
from examples.world import ASKED, SETS, learn, learned, make_world, pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_cell_once():
    setup = Setup()
    cells = setup.cells()
    grid = itertools.product(setup.objectives, setup.rules, setup.rates, setup.seeds)
    assert len(cells) == 108
    assert set(cells) == set(grid)
    assert len(set(cells)) == len(cells)
    assert "= 108 runs" in str(setup)


def test_the_experiment_is_that_of_the_paper():
    setup = Setup()
    assert setup.objectives == ("GradDiff", "NPO", "SimNPO")
    assert setup.rules == ("sum", "pcgrad", "pcgrad_global", "sago")
    assert len(setup.seeds) >= 3
    assert len(setup.rates) >= 3
    world = make_world(setup, 0)
    assert [len(world.facts[name]) for name in SETS] == [48, 432, 141]  # 10 % to forget


def test_a_world_depends_on_its_seed_only():
    first, again, other = (make_world(QUICK, seed) for seed in (0, 0, 1))
    assert first.facts == again.facts != other.facts
    for p, same in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, same)


def test_every_kind_of_fact_is_asked():
    retain = list(range(8 * 9))
    assert {i % 8 for i in retain[::ASKED]} == set(range(8))


def test_all_cells_of_a_seed_see_the_same_batches():
    def drawn(seed, **changes):
        setup = replace(QUICK, **changes)
        batches = [b["input_ids"].tolist() for pair in pairs(setup, make_world(setup, 0), seed) for b in pair]
        assert len(batches) == 2 * setup.steps
        return batches

    assert drawn(0) == drawn(0, rates=(1.0,), objectives=("NPO",)) != drawn(1)


def test_what_is_saved_is_what_was_learned(tmp_path):
    setup = replace(QUICK, train_steps=3)
    said = learn(setup, 0, tmp_path / "model.pt")
    world, known = learned(setup, 0, tmp_path / "model.pt")
    assert said["steps"] == 3
    assert said["parameters"] == sum(p.numel() for p in world.model.parameters())
    assert said["known"] == known == world.known(world.model)
    assert said["known"] != make_world(setup, 0).known(make_world(setup, 0).model)


def test_a_record_has_a_line_a_run(tmp_path):
    record = {"setup": {"steps": 3}, "models": [{"seed": 0}], "runs": [{"a": [1, 2]}, {"b": 0.5}], "x": None}
    path = tmp_path / "record.json"
    write(record, path)
    assert json.loads(path.read_text()) == record
    lines = path.read_text().splitlines()
    assert lines.count('  {"a":[1,2]},') == 1
    assert len(lines) == 11


def threads(_):
    return torch.get_num_threads()


def test_a_worker_has_one_thread():
    with workers(1) as apply:
        assert list(apply(threads, [None, None])) == [1, 1]


def test_without_workers_all_is_done_here():
    with workers(0) as apply:
        assert apply is map
