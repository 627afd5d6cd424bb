"""The timed gradients conflict and are restored, and a wrong update is detected."""

import pytest
import torch

import sago
from benchmarks import gradients
from benchmarks.gradients import ALPHA, GAMMA, Gradients, WrongResult
from benchmarks.released import RULES

SHAPES = [(40, 5), (7,), (300, 3), (1,), (64, 64)]
STEP = {torch.bfloat16: 2**-7, torch.float32: 2**-22}


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[256, 1 << 22], ids=["repeating", "whole"])
def pairs(request, dtype, monkeypatch):
    monkeypatch.setattr(gradients, "POOL", request.param)
    return Gradients(SHAPES, dtype, "cpu")


def test_lists_and_buffers_share_the_memory_of_the_buckets(pairs):
    assert [tuple(t.shape) for t in pairs.retain] == SHAPES
    for side, flat in ((pairs.forget, pairs.flat_forget), (pairs.retain, pairs.flat_retain)):
        assert sum(t.numel() for t in flat) >= sum(t.numel() for t in side)
        flat[0].fill_(3.0)
        assert all((t == 3.0).all() for t in side)
    assert all(p.untyped_storage().nbytes() <= 16 for p in pairs.params)


def test_tensors_conflict_and_differ(pairs):
    f, r = (torch.cat([t.view(-1) for t in side]).float() for side in (pairs.forget, pairs.retain))
    assert 0.55 < (f * r < 0).float().mean() < 0.7
    assert -0.4 < torch.nn.functional.cosine_similarity(f, r, dim=0) < -0.2
    assert len({t.view(-1)[0].item() for t in pairs.retain}) == len(SHAPES)


def test_gradients_are_restored(pairs, dtype):
    before = [t.clone() for t in pairs.forget + pairs.retain]
    for t in pairs.retain:
        t.fill_(torch.nan)
    pairs.restore()
    assert all(map(torch.equal, pairs.forget + pairs.retain, before))
    pairs.buckets.synthesize_("sago", GAMMA, ALPHA)
    pairs.restore_buckets()
    assert all(map(torch.equal, pairs.forget + pairs.retain, before))
    other = Gradients(SHAPES, dtype, "cpu")
    assert all(map(torch.equal, other.forget + other.retain, before))


@pytest.mark.parametrize("rule", RULES)
def test_a_right_update_passes(pairs, dtype, rule):
    tolerance = 0.0 if rule in RULES[:3] else STEP[dtype]
    sago.synthesize_(pairs.forget, pairs.retain, rule, GAMMA, ALPHA)
    pairs.check("sago", rule, pairs.retain, tolerance)


@pytest.mark.parametrize("wrong", ["other weights", "not written", "one element", "nan"])
@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_update_is_detected(pairs, dtype, rule, wrong):
    weights = (ALPHA, GAMMA) if wrong == "other weights" else (GAMMA, ALPHA)
    updates, _ = sago.synthesize(pairs.forget, pairs.retain, rule, *weights)
    if wrong == "not written":
        updates[2] = pairs.retain[2]
    elif wrong in ("one element", "nan"):
        updates[-1].view(-1)[-1] = 20.0 if wrong == "one element" else torch.nan
    with pytest.raises(WrongResult, match=rf"made wrong .*is not `{rule}`"):
        pairs.check("made wrong", rule, updates, STEP[dtype])


def test_the_sum_of_torch_add(pairs):
    pairs.check("add", "add", [f + r for f, r in zip(pairs.forget, pairs.retain, strict=True)], 0.0)
    with pytest.raises(WrongResult):
        pairs.check("add", "add", pairs.retain, 0.0)
