"""The experiment at a size that takes seconds, and the record that README and docs show."""

import io
import itertools
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sago
from benchmarks.measure import ROOT
from benchmarks.released import RULES
from examples import demo, tell
from examples.draw import STYLES
from examples.grid import QUICK, Setup
from examples.recovery import LEVELS, entries
from examples.sweep import COSINES
from examples.world import SETS

# Raised inside of torch when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

RECORD = ROOT / "examples" / "results" / "demo.json"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run prints, where it writes, and its record."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        assert demo.main(["--quick", "--workers=0", f"--out={out}"]) == 0
    return printed.getvalue(), out, json.loads((out / "demo.json").read_text())


def check_record(record, setup):
    """Every model and every cell is there, whole and within bounds."""
    assert record["setup"] == json.loads(json.dumps(vars(setup)))
    assert all(record[name] for name in ("cpu", "torch", "transformers", "sago", "seconds"))
    assert record["threads"] == 1
    assert [model["seed"] for model in record["models"]] == list(setup.seeds)
    for model in record["models"]:
        assert model["steps"] < setup.train_steps  # it stopped because it knew
        assert all(model["known"][name]["answers"] >= 0.75 for name in SETS)
    grid = list(itertools.product(setup.objectives, setup.rules, setup.rates, setup.seeds))
    cells = [(run["objective"], run["rule"], run["rate"], run["seed"]) for run in record["runs"]]
    assert sorted(cells) == sorted(grid)
    measurements = setup.steps // setup.every + 1
    for run in record["runs"]:
        for name in SETS:
            known = run["known"][name]
            assert {len(series) for series in known.values()} == {measurements}
            assert all(value >= 0 for value in known["loss"])
            assert all(
                0 <= value <= 1 for key in ("probability", "tokens", "answers") for value in known[key]
            )
        for name in COSINES:
            assert len(run["cosines"][name]) == setup.steps
            assert all(-1.001 <= value <= 1.001 for value in run["cosines"][name])


def check_results(record):
    """What should hold at any scale: forgetting, and the promise at every step."""
    for run in record["runs"]:
        forget = run["known"]["forget"]
        assert forget["probability"][-1] < forget["probability"][0] - 0.1
        assert forget["answers"][-1] < forget["answers"][0]
        if run["rule"] != "sum":
            assert min(run["cosines"]["cos_update_retain"]) >= 0
    # The first gradients are taken at the same model: what differs is the update.
    starts = {}
    for run in record["runs"]:
        starts.setdefault((run["objective"], run["seed"]), set()).add(run["cosines"]["cos_forget_retain"][0])
    assert all(len(values) == 1 for values in starts.values())


def test_the_record_of_a_quick_run_has_every_cell(quick):
    _, _, record = quick
    check_record(record, QUICK)
    assert record["workers"] == 0
    assert record["torch"] == torch.__version__


def test_a_quick_run_forgets_and_keeps_its_promises(quick):
    check_results(quick[2])


def test_the_output_tells_the_story(quick):
    printed, out, record = quick
    headings = re.findall(r"^(\d)\. ", printed, re.MULTILINE)
    assert headings == ["1", "2", "3", "4", "5"]
    for rule in RULES:
        assert re.search(rf"^{rule} +(bitwise|[0-9.]+e-\d+) ", printed, re.MULTILINE)
    assert "BROKEN" not in printed
    assert tell.tell(record) in printed
    assert str(out / "pareto.png") in printed


def test_plots_only_from_a_record(quick, tmp_path, capsys):
    _, out, record = quick
    assert demo.main([f"--plot-only={out / 'demo.json'}", f"--out={tmp_path}"]) == 0
    assert tell.tell(record) in capsys.readouterr().out
    for name in ("pareto.png", "losses.png", "cosines.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert not (tmp_path / "demo.json").exists()


def test_a_wrong_update_ends_the_run(monkeypatch, tmp_path, capsys):
    right = sago.synthesize_

    def synthesize_(forget, retain, rule="sago", **options):
        report = right(forget, retain, rule=rule, **options)
        if rule == "blur":
            retain[-1].neg_()
        return report

    monkeypatch.setattr(sago, "synthesize_", synthesize_)
    monkeypatch.setattr(demo, "QUICK", replace(QUICK, train_steps=2))
    assert demo.main(["--quick", "--seeds=1", "--workers=0", f"--out={tmp_path / 'out'}"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "Different from the reference: blur"
    assert "3. " not in printed.out
    assert not (tmp_path / "out").exists()


def test_a_broken_promise_is_told_and_exits_non_zero(quick, tmp_path, capsys):
    record = json.loads(json.dumps(quick[2]))
    run = next(run for run in record["runs"] if run["rule"] == "pcgrad")
    run["cosines"]["cos_update_retain"][3] = -1e-6
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(record))
    assert demo.main([f"--plot-only={path}", f"--out={tmp_path}"]) == 1
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[3:7]}
    assert lines == {"sum": "none", "pcgrad": "BROKEN", "pcgrad_global": "kept", "sago": "kept"}


def test_options_reach_the_setup():
    args = demo.parse(["--seeds=5", "--rates", "2e-3", "1e-3", "--gamma=2", "--retain=KL"])
    setup = demo.setup_of(args)
    assert (setup.seeds, setup.rates, setup.gamma, setup.retain) == ((0, 1, 2, 3, 4), (1e-3, 2e-3), 2.0, "KL")
    assert demo.setup_of(demo.parse([])) == Setup()


def test_the_committed_record_is_that_of_make_demo():
    record = json.loads(RECORD.read_text())
    check_record(record, Setup())
    check_results(record)
    assert set(STYLES) == set(Setup().rules)


def test_the_readme_shows_the_committed_record():
    record = json.loads(RECORD.read_text())
    rows = {}
    for entry in entries(record, LEVELS[0]):
        mean, deviation = entry.recovery["retain"]
        rows.setdefault(entry.objective, []).append(f"{100 * mean:.1f} ± {100 * deviation:.1f} %")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for objective, cells in rows.items():
        assert f"| {objective} | {' | '.join(cells)} |\n" in readme


def test_the_docs_show_the_committed_record_of_a_smaller_weight():
    record = json.loads(RECORD.with_name("demo_gamma_0.3.json").read_text())
    assert record["setup"] == {**json.loads(RECORD.read_text())["setup"], "gamma": 0.3}
    docs = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    for text in (tell.recovery_told(record, LEVELS[0]), tell.rates_told(record, LEVELS[0])):
        assert f"```\n{text}\n```" in docs, f"docs/experiment.md should hold\n{text}"


@pytest.mark.parametrize("level", LEVELS)
def test_the_docs_show_the_committed_record(level):
    record = json.loads(RECORD.read_text())
    docs = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    for text in (
        tell.models_told(record["models"]),
        tell.cosines_told(record),
        tell.recovery_told(record, level),
        tell.rates_told(record, LEVELS[0]),
        tell.last_told(record),
    ):
        assert f"```\n{text}\n```" in docs, f"docs/experiment.md should hold\n{text}"
    for name in re.findall(r"\]\((images/[^)]*)\)", docs):
        assert (Path(ROOT, "docs", name)).stat().st_size > 10_000
