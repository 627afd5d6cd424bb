"""The small case for compute-sanitizer runs, and detects a wrong update."""

import pytest

import sago
from benchmarks import sanitize
from benchmarks.__main__ import main

SIZES = (1, 7, 300)


def test_all_syntheses_are_right_with_unaligned_tensors_and_missing_gradients(monkeypatch):
    seen = []
    real = sago.synthesize_

    def watch(forget, retain, *arguments, **options):
        seen.append((forget[1] is None, retain[2].data_ptr() % 16 == 0))
        return real(forget, retain, *arguments, **options)

    monkeypatch.setattr(sago, "synthesize_", watch)
    assert sanitize.run("cpu", SIZES) == len(seen) == 24
    assert set(seen) == {(True, True), (True, False)}


def test_a_wrong_update_ends_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sago, "synthesize_", lambda forget, retain, *arguments, **options: None)
    assert main(["sanitize", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sago of (1,) torch.bfloat16 is not" in printed.err


@pytest.mark.gpu
def test_on_the_gpu():
    assert sanitize.run() == 24
