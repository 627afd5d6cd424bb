"""Reports over steps: what a monitor keeps, writes and draws."""

import csv
import gc
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sago
from sago.core.report import FIELDS
from sago.monitor import ConflictMonitor, plots
from sago.monitor.plots import COSINES, NORMS

NAMES = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("attn.weight", "mlp.weight")]
NAMES = ["embed.weight", *NAMES]


def gradients(seed=0, sizes=(7, 5, 4, 3, 8, 6, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator) for n in sizes] for _ in range(2)]


def report_of(seed=0, rule="sago", names=tuple(NAMES), **options):
    return sago.synthesize(*gradients(seed), rule=rule, groups=names, **options)[1]


@pytest.fixture
def monitor():
    monitor = ConflictMonitor()
    for seed in range(3):
        monitor.add(report_of(seed), 10 * seed)
    return monitor


class NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")
        assert name != "_to_copy", "a copy between devices may wait"
        return func(*args, **(kwargs or {}))


def test_adding_a_report_reads_nothing_and_keeps_no_gradient():
    forget, retain = gradients()
    refs = [weakref.ref(t) for t in (*forget, *retain)]
    report = sago.synthesize_(forget, retain, groups=NAMES)
    monitor = ConflictMonitor()
    with NoReading():
        monitor.add(report)
    del forget, retain, report
    gc.collect()
    assert all(ref() is None for ref in refs)
    assert len(monitor) == 1


def test_a_kept_report_does_not_change_with_the_tensors_it_came_from():
    report = report_of()
    expected = report.to_dict()
    monitor = ConflictMonitor()
    monitor.add(report)
    for name in ("ff", "fr", "rr"):
        getattr(report, name).zero_()
    assert monitor.reports[0].to_dict() == expected


def test_rows_and_totals(monitor):
    rows, totals = monitor.rows(), monitor.totals()
    assert [(row["step"], row["group"]) for row in rows] == [(s, g) for s in (0, 10, 20) for g in NAMES]
    for seed in range(3):
        report = report_of(seed)
        of_step = [row for row in rows if row["step"] == 10 * seed]
        for name, expected in report.to_dict().items():
            assert [row[name] for row in of_step] == expected
        assert totals[seed] == {"step": 10 * seed, **report.summary()}


def test_a_file_has_every_row(monitor, tmp_path):
    path = tmp_path / "conflicts.csv"
    for _ in range(2):  # the second replaces the first
        monitor.to_csv(path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["step", "group", *FIELDS]
    assert found == [{name: str(value) for name, value in row.items()} for row in monitor.rows()]
    monitor.clear()
    monitor.add(report_of(rule="pcgrad", stats=False))
    monitor.to_csv(path)
    with path.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert row["conflict_fraction"] == row["nonfinite_retain"] == ""
    assert float(row["norm_retain"]) > 0


class Recorder:
    """In the place of a writer of TensorBoard, or of a run of W&B."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))


def test_scalars_for_tensorboard_leave_out_what_is_not_a_number(monitor):
    monitor.add(sago.synthesize(torch.zeros(3), torch.ones(3))[1])
    writer = Recorder()
    monitor.to_tensorboard(writer, prefix="run")
    totals = monitor.totals()
    assert math.isnan(totals[-1]["cos_forget_retain"])
    expected = [
        ("add_scalar", (f"run/{name}", value, row["step"]), {})
        for row in totals
        for name, value in row.items()
        if name != "step" and not math.isnan(value)
    ]
    assert writer.calls == expected
    assert totals[-1]["step"] == 21


def test_metrics_of_wandb_have_an_axis_of_their_own(monitor):
    run = Recorder()
    monitor.to_wandb(run)
    assert run.calls[0] == ("define_metric", ("sago/step",), {})
    assert run.calls[1] == ("define_metric", ("sago/*",), {"step_metric": "sago/step"})
    logged = [args[0] for name, args, options in run.calls[2:] if (name, options) == ("log", {})]
    assert logged == [{f"sago/{name}": value for name, value in row.items()} for row in monitor.totals()]


def test_the_oldest_steps_are_dropped_and_later_ones_on_request():
    monitor = ConflictMonitor(keep=2)
    for step in range(4):
        monitor.add(report_of(step))
    assert list(monitor.reports) == [2, 3]
    monitor.clear(after=2)
    assert list(monitor.reports) == [2]
    monitor.add(report_of(), 3)
    monitor.clear()
    assert len(monitor) == 0
    assert monitor.rows() == monitor.totals() == []


def test_what_is_refused(monitor):
    with pytest.raises(
        ValueError, match=r"`step` should be larger.*last report, 20\. Found 20.*clear\(after=19\)"
    ):
        monitor.add(report_of(), 20)
    with pytest.raises(TypeError, match=r"`report` should be a SynthesisReport\. Found tuple"):
        monitor.add(sago.synthesize(*gradients()))
    with pytest.raises(ValueError, match=r"`report` should have statistics.*stats=True"):
        monitor.add(report_of(stats=False))
    assert list(monitor.reports) == [0, 10, 20]
    for keep in (0, -1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="`keep` should be a positive integer"):
            ConflictMonitor(keep)
    with pytest.raises(ValueError, match="needs a report"):
        ConflictMonitor().plot()
    with pytest.raises(ValueError, match=r"`report` should have the share of conflicts or a cosine"):
        report_of(stats=False).plot()


def images(figure):
    """The values of each heat map, and the labels of its rows and columns, by its title.

    A map on the right has the rows of its neighbour and no labels of its own.
    """
    return {
        axes.get_title(loc="left"): (
            axes.images[0].get_array(),
            [label.get_text() for label in axes.get_yticklabels()],
            [label.get_text() for label in axes.get_xticklabels()],
        )
        for axes in figure.axes
        if axes.images
    }


def test_a_heat_map_shows_the_values_of_the_report(tmp_path):
    report = report_of()
    figure = report.plot(tmp_path / "conflicts.png")
    assert (tmp_path / "conflicts.png").read_bytes().startswith(b"\x89PNG")
    values, found = report.to_dict(), images(figure)
    titles = {"share of conflicts": "conflict_fraction", **{title: name for name, title in COSINES.items()}}
    assert found.keys() == titles.keys()
    kinds = ["embed.weight", "attn.weight", "mlp.weight"]
    for title, (cells, rows, columns) in found.items():
        assert (rows, columns) in ((kinds, ["-", "0", "1", "2"]), ([], ["-", "0", "1", "2"]))
        expected = torch.full((3, 4), math.nan)
        expected[0, 0] = values[titles[title]][0]
        expected[1:, 1:] = torch.tensor(values[titles[title]][1:]).reshape(3, 2).T
        shown = torch.from_numpy(cells.filled(math.nan)).float()
        torch.testing.assert_close(shown, expected, equal_nan=True, rtol=0, atol=0)


def test_a_heat_map_of_what_the_report_has():
    assert list(images(report_of(rule="pcgrad", stats=False).plot())) == list(COSINES.values())
    (cells, _, columns) = images(report_of(names=["all"] * 7).plot())["cos(f, r)"]
    assert (cells.shape, columns) == ((1, 1), ["-"])


def test_the_row_of_whole_layers_has_a_label():
    report = report_of(names=["embed", *(f"layers.{i}" for i in (0, 0, 1, 1, 2, 2))])
    _, rows, columns = images(report.plot())["share of conflicts"]
    assert (rows, columns) == (["embed", "all kinds"], ["-", "0", "1", "2"])


@pytest.mark.parametrize(("size", "scale"), [(1.0, "linear"), (1e-3, "log"), (0.0, "linear")])
def test_norms_of_similar_size_have_a_linear_axis(size, scale):
    """On a logarithmic axis of less than a decade, the labels between powers of ten overlap."""
    forget, retain = gradients()
    monitor = ConflictMonitor()
    for _ in range(3):
        monitor.add(sago.synthesize(forget, [size * r for r in retain], "sum")[1])
    (axes,) = (
        a for a in monitor.plot().axes if [line.get_label() for line in a.lines] == list(NORMS.values())
    )
    assert axes.get_yscale() == scale


def test_trajectories_show_the_totals(monitor, tmp_path):
    figure = monitor.plot(tmp_path / "steps.pdf")
    assert (tmp_path / "steps.pdf").read_bytes().startswith(b"%PDF")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    totals = monitor.totals()
    for name, title in {**COSINES, "conflict_fraction": "share of conflicts", **NORMS}.items():
        assert list(lines[title].get_xdata()) == [0, 10, 20]
        assert list(lines[title].get_ydata()) == [row[name] for row in totals]
    cells, rows, columns = images(figure)["cos(f, r) by layer"]
    assert (rows, columns) == (["0", "1", "2"], ["0", "10", "20"])
    for step, report in enumerate(monitor.reports.values()):
        layers = report.regroup([None, 0, 0, 1, 1, 2, 2]).to_dict()["cos_forget_retain"][1:]
        assert list(cells[:, step]) == layers


def test_trajectories_of_a_report_without_layers():
    monitor = ConflictMonitor()
    monitor.add(report_of(names=["a"] * 7))
    assert images(monitor.plot()) == {}


def test_a_long_axis_has_few_labels():
    names = [f"layers.{i}.w" for i in range(100)]
    report = sago.synthesize(*[[torch.randn(2) for _ in names] for _ in range(2)], groups=names)[1]
    cells, _, columns = images(report.plot())["cos(f, r)"]
    assert cells.shape == (1, 100)
    assert columns == [str(i) for i in range(0, 100, 7)]


def test_pictures_without_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, plots.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sago-kernels\[plot\]'"):
        report_of().plot()
