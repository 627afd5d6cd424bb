"""Plots of made-up records: what they show, and that there is none without rows."""

import json
from itertools import product

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from benchmarks import plot
from benchmarks.__main__ import main

CONTENDERS = [
    ("torch.add, flat", "add", None, 1.0),
    ("sago.synthesize_", "sago", True, 2.0),
    ("torch.compile, flat", "sago", None, 4.0),
    ("released", "sago", None, 60.0),
]


def rows():
    return [
        {
            "workload": workload, "dtype": dtype, "contender": contender, "rule": rule, "stats": stats,
            "mode": "eager", "ms": ms * scale, "of_triad": 1 / ms,
        }
        for (workload, scale), dtype, (contender, rule, stats, ms) in product(
            [("2^18", 4), ("2^14", 1), ("lora", 9)], ["bfloat16", "float32"], CONTENDERS
        )
    ]  # fmt: skip


@pytest.fixture
def record(tmp_path):
    found = {
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.13.0",
        "workloads": {
            "2^18": {"elements": 2**18},
            "2^14": {"elements": 2**14},
            "lora": {"elements": 41_943_040},
        },
        "rows": [*rows(), {**rows()[0], "contender": "foreach", "ms": None, "of_triad": None}],
    }
    file = tmp_path / "record.json"
    file.write_text(json.dumps(found))
    return file


@pytest.fixture
def memory(tmp_path):
    row = {"contender": "released", "rule": "sago", "dtype": "bfloat16", "copies": 3.7}
    found = {"device": "cpu", "elements": 31e6, "rows": [row, {**row, "rule": "blur", "copies": None}]}
    file = tmp_path / "memory.json"
    file.write_text(json.dumps(found))
    return file


def test_a_file_for_each_dtype_and_one_of_memory(record, memory, tmp_path, capsys):
    assert main(["plot", str(record), "--memory", str(memory), "--out", str(tmp_path / "plots")]) == 0
    kinds = [
        f"{kind}-{dtype}.png" for dtype in ("bfloat16", "float32") for kind in ("time", "triad", "peers")
    ]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted([*kinds, "memory.png"])
    assert capsys.readouterr().out.count("\n") == 7
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_drawn_of_nothing(record, tmp_path):
    found = json.loads(record.read_text())
    found["rows"] = [
        row for row in found["rows"] if row["workload"] == "lora" and "compile" in row["contender"]
    ]
    record.write_text(json.dumps(found))
    assert [path.name for path in plot.draw(record, None, tmp_path)] == [
        "triad-bfloat16.png",
        "triad-float32.png",
    ]


def axes_of(figure, shown):
    axes = Figure().subplots()
    assert figure(axes, shown)
    return axes


def test_time_against_elements():
    shown = [{**row, "elements": 2 ** int(row["workload"][2:])} for row in rows()[:16]]
    axes = axes_of(plot._time, [row for row in shown if row["dtype"] == "float32"])
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["released, sago"] == [[2**14, 60.0], [2**18, 240.0]]
    assert list(lines)[:2] == ["torch.add, flat", "sago.synthesize_, sago, statistics"]
    assert len({line.get_marker() for line in axes.lines}) == len(lines)
    assert axes.get_xlabel() == "elements of one tensor"
    assert axes.get_ylabel() == "time of a call (ms)"


def test_ratios_are_to_the_synthesis_with_statistics():
    assert plot.ratios(rows()) == {
        "torch.compile, flat": {"lora\nsago": 2.0},
        "released": {"lora\nsago": 30.0},
    }


def test_the_fraction_of_the_triad_is_of_lists():
    axes = axes_of(plot._triad, rows()[16:20])
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes.containers}
    assert heights["torch.compile, flat, sago"] == [0.25]
    assert "released, sago" not in heights
    assert [text.get_text() for text in axes.get_xticklabels()] == ["lora"]


def test_bars_can_be_told_apart_in_grey():
    bars = {f"series {i}": {"place": 1.0} for i in range(20)}
    axes = axes_of(lambda a, shown: plot._bars(a, shown), bars)
    looks = {(c[0].get_facecolor(), c[0].get_hatch()) for c in axes.containers}
    assert len(looks) == 20
    assert all(red == green == blue for (red, green, blue, _), _ in looks)
