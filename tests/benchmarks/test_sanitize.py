"""The small case for compute-sanitizer: that it runs, and that it sees a wrong update."""

import pytest

import sago
from benchmarks import sanitize
from benchmarks.__main__ import main

SIZES = (1, 7, 300)


def test_all_syntheses_are_right():
    assert sanitize.run("cpu", SIZES) == 24


def test_unaligned_tensors_and_absent_sides_are_among_them(monkeypatch):
    seen = []
    real = sago.synthesize_

    def watch(forget, retain, *arguments, **options):
        seen.append((forget[1] is None, retain[2].data_ptr() % 16 == 0))
        return real(forget, retain, *arguments, **options)

    monkeypatch.setattr(sago, "synthesize_", watch)
    sanitize.run("cpu", SIZES)
    assert set(seen) == {(True, True), (True, False)}


def test_a_wrong_update_ends_the_command(monkeypatch, capsys):
    def idle(forget, retain, *arguments, **options):
        pass

    monkeypatch.setattr(sago, "synthesize_", idle)
    with pytest.raises(RuntimeError, match=r"sago of \(1,\) torch.bfloat16 is not"):
        main(["sanitize", "--device", "cpu"])
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_on_the_gpu():
    assert sanitize.run() == 24
