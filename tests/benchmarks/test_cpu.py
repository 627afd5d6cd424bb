"""The CPU benchmark has every row, and refuses to report a wrong result."""

import pytest
import torch

from benchmarks import cpu, peers
from benchmarks.__main__ import main
from benchmarks.contenders import EXACT, ROUNDING, STEPWISE, peer
from benchmarks.gradients import WrongResult

# torch raises these when torch.compile is first used, the second one in torch 2.6.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning"),
]

ELEMENTS = 4096 * 3


def test_every_contender_has_a_row_for_each_dtype(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    record = cpu.run(ELEMENTS, tensors=3, repeats=3)
    assert (record["elements"], record["shape"]) == (ELEMENTS, [4096, 1])
    names = [(row["dtype"], row["contender"], row["in_place"]) for row in record["rows"]]
    assert names == [(d, c.name, c.in_place) for d in ("bfloat16", "float32") for c in cpu.CONTENDERS]
    for row in record["rows"]:
        assert tuple(row) == cpu.COLUMNS
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert (row["target"] is None) == (row["met"] is None)
    by_name = {(row["dtype"], row["contender"]): row for row in record["rows"]}
    assert by_name["float32", "torch.add(f, r, out=r)"]["ratio_to_add"] == 1
    assert by_name["float32", "released pcgrad"]["faster_than_released"] == 1
    assert by_name["bfloat16", "sago"]["target"] == "ratio_to_add <= 1.5; faster_than_released >= 50"


def test_other_elements_are_flat():
    assert cpu.run(100, 2, 1, [torch.float32], cpu.CONTENDERS[:1])["shape"] == [50]


def sloppy(forget, retain, gamma, alpha):
    return [u.mul_(1.01) for u in peers.where(forget, retain, gamma, alpha)]


def swapped(forget, retain, gamma, alpha):
    return peers.where(forget, retain, alpha, gamma)


def without_the_last(forget, retain, gamma, alpha):
    updates = peers.where(forget, retain, gamma, alpha)
    updates[-1].view(-1)[-1] = float("nan")
    return updates


@pytest.mark.parametrize("wrong", [sloppy, swapped, without_the_last])
@pytest.mark.parametrize("tolerance", [EXACT, ROUNDING])
def test_a_wrong_contender_is_refused(wrong, tolerance):
    contenders = (peer("made up", "sago", wrong, in_place=False)._replace(tolerance=tolerance),)
    with pytest.raises(WrongResult, match=r"made up sago \(bfloat16\) is not `sago`"):
        cpu.run(ELEMENTS, 3, 1, contenders=contenders)


def test_an_update_that_was_not_written_is_refused():
    idle = peer("idle", "pcgrad", lambda f, r, gamma, alpha: r)
    assert idle.tolerance == STEPWISE
    with pytest.raises(WrongResult, match="idle pcgrad"):
        cpu.run(ELEMENTS, 1, 1, contenders=(idle,))


def test_a_wrong_contender_ends_the_command_without_a_table(monkeypatch, capsys, tmp_path):
    wrong = peer("made up", "sago", swapped, in_place=False)
    monkeypatch.setattr(cpu.run, "__defaults__", (*cpu.run.__defaults__[:-1], (wrong,)))
    assert main(["cpu", "--elements", "100", "--json", str(tmp_path / "record.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is not `sago`" in printed.err
    assert not list(tmp_path.iterdir())
