"""Records name their sources, and a record that was taken with other sources makes a warning."""

import json
import warnings

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import ROOT, StaleRecord, origin, warn_if_stale, write_json

RECORDS = sorted(
    path for part in ("benchmarks", "examples") for path in (ROOT / part / "results").glob("*.json")
)


@pytest.mark.filterwarnings("default::benchmarks.measure.StaleRecord")
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_belongs_to_the_sources(path):
    """A warning and no failure, because a record can only be taken where its device is."""
    warn_if_stale(path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two sources, and a record of a GPU that was taken with them."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "kernels/triton").mkdir(parents=True)
    (tmp_path / "kernels/triton/gram.py").write_text("x = 1\n")
    (tmp_path / "rules.py").write_text("y = 1\n")
    record = {**origin("cpu", "kernels", "rules.py"), "device": "NVIDIA H100 80GB HBM3"}
    write_json(tmp_path, record)
    assert (tmp_path / "nvidia-h100-80gb-hbm3.json").exists()
    return tmp_path


def stale(folder):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_if_stale(folder / "nvidia-h100-80gb-hbm3.json")
    assert all(w.category is StaleRecord for w in found)
    return [str(w.message) for w in found]


def test_the_same_sources(repository):
    (repository / "kernels/triton/notes.txt").write_text("no source")
    (repository / "other.py").write_text("z = 1\n")
    assert stale(repository) == []


@pytest.mark.parametrize("change", ["text", "name", "more", "the single file", "deleted"])
def test_other_sources(repository, change):
    file = repository / "kernels/triton/gram.py"
    if change == "text":
        file.write_text("x = 2\n")
    elif change == "name":
        file.rename(repository / "kernels/triton/other.py")
    elif change == "more":
        (repository / "kernels/triton/combine.py").write_text("")
    elif change == "deleted":
        (repository / "rules.py").unlink()
    else:
        (repository / "rules.py").write_text("y = 2\n")
    (message,) = stale(repository)
    assert message.startswith("nvidia-h100-80gb-hbm3.json was taken with other sources (kernels, rules.py)")


def test_a_record_that_does_not_name_its_sources(repository):
    file = repository / "nvidia-h100-80gb-hbm3.json"
    record = json.loads(file.read_text())
    del record["sources"]
    write_json(file, record)
    assert len(stale(repository)) == 1


def test_the_origin_is_the_same_block_in_every_record():
    block = origin("cpu", "kernels")
    assert list(block) == [
        "device", "driver", "cpu", "threads", "python", "torch", "triton", "date", "sources", "source",
    ]  # fmt: skip
    assert (block["device"], block["driver"], block["sources"]) == ("cpu", None, ["kernels"])
    assert block["torch"] == torch.__version__
    assert len(block["date"]) == len("2026-01-01")


def test_names_of_records(tmp_path):
    for device, suffix, name in (
        ("cpu", "", "cpu.json"),
        ("AMD  MI300X (1)", "-memory", "amd-mi300x-1-memory.json"),
    ):
        write_json(tmp_path, {"device": device}, suffix)
        assert json.loads((tmp_path / name).read_text()) == {"device": device}
    assert len(list(tmp_path.iterdir())) == 2
