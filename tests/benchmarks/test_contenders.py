"""Every contender has the update of the reference. Formulas run as they are, without torch.compile."""

import pytest
import torch

from benchmarks import contenders, speed
from benchmarks.gradients import Gradients
from benchmarks.released import RULES
from benchmarks.workloads import WORKLOADS, shrink

SHAPES = [(33, 5), (300,), (1,), (64, 64)]
ALL = [
    *contenders.ceiling(),
    *(c for rule in RULES for c in contenders.others(rule, compile_lists=True)),
    *(
        contenders.ours(rule, stats, entry)
        for rule in RULES
        for stats in (True, False)
        for entry in contenders.ENTRIES
    ),
]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def pairs(request):
    return Gradients(SHAPES, request.param, "cpu")


@pytest.mark.parametrize("contender", ALL, ids=lambda c: c.label)
def test_the_update_is_that_of_the_reference(contender, pairs, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    prepared, seconds = speed.first(contender, pairs)
    assert seconds > 0
    prepared.restore()
    updates = prepared.run()
    in_place = [u.data_ptr() == r.data_ptr() for u, r in zip(updates, pairs.retain, strict=True)]
    assert all(in_place) if contender.in_place else not any(in_place)
    assert contender.passes == (3 if contender.rule in ("add", *RULES[:3]) else 5)


def test_the_peers_of_a_rule():
    names = {rule: [c.name for c in contenders.others(rule, True)] for rule in ("sago", "pcgrad", "blur")}
    compiled = ["torch.compile, flat", "torch.compile, list"]
    assert names == {
        "sago": ["released", "torch.where", "foreach", *compiled],
        "pcgrad": ["released", "foreach", "torch.compile, list"],
        "blur": ["released"],
    }


@pytest.mark.gpu
@pytest.mark.parametrize("entry", contenders.ENTRIES)
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_in_a_cuda_graph(rule, entry):
    pairs = Gradients(shrink(WORKLOADS["lora"], 1 << 20), torch.bfloat16, "cuda")
    prepared, _ = speed.first(contenders.ours(rule, True, entry, "graph"), pairs)
    prepared.restore()
    prepared.run()
