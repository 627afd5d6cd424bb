"""Plans: checked once, run as often as the gradients are renewed."""

import gc
import pickle
from copy import deepcopy

import pytest
import torch

import sago
from tests.support import inputs, properties
from tests.support.backends import DTYPES, RULES, on_device
from tests.support.sync import no_sync

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ANY = ["sago", "pcgrad", "blur"]


def pairs(backend, dtype=FP32, seed=0):
    """Two tensors a side, the second not dense in memory."""
    sides = zip(inputs.pair(50, seed), inputs.pair(24, seed + 1), strict=True)
    return tuple(
        [on_device(a.to(dtype), backend.device), on_device(b.to(dtype).view(6, 4)[:, ::2], backend.device)]
        for a, b in sides
    )


def renew(lists, seed, backend, dtype=FP32):
    for side, new in zip(lists, pairs(backend, dtype, seed), strict=True):
        for t, n in zip(side, new, strict=True):
            t.copy_(n)


def expected(backend, lists, rule, **options):
    copies = [[t.clone() for t in side] for side in lists]
    report = sago.synthesize_(*copies, rule, backend=backend.name, **options)
    return copies[1], report


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_as_a_call(backend, rule, stats):
    lists = pairs(backend)
    plan = sago.Plan(*lists, rule, eps=0.25, stats=stats, backend=backend.name)
    for seed, weights in ((0, (1.0, 1.0)), (10, (0.5, 2.0)), (20, (0.0, 1.5)), (30, (1.0, 1.0))):
        renew(lists, seed, backend)
        gamma, alpha = weights
        updates, report = expected(backend, lists, rule, gamma=gamma, alpha=alpha, eps=0.25, stats=stats)
        found = plan.synthesize_(gamma, alpha) if seed else plan.synthesize_()
        properties.assert_equal_bits(lists[1], updates)
        assert found.absent == report.absent
        assert found.groups == report.groups
        for name in {"ff", "fr", "rr", "uu", "uf", "ur", "conflict_fraction"} - set(found.absent):
            properties.assert_equal_bits([getattr(found, name)], [getattr(report, name)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ANY)
def test_weights_on_the_device(backend, rule, dtype):
    lists = pairs(backend, dtype)
    plan = sago.Plan(*lists, rule, backend=backend.name)
    gamma = torch.full((), 1.0, dtype=FP64, device=backend.device)
    for seed, weight in ((0, 0.5), (10, 2.0)):
        renew(lists, seed, backend, dtype)
        gamma.fill_(weight)
        updates, _ = expected(backend, lists, rule, gamma=weight, alpha=1.5)
        report = plan.synthesize_(gamma, 1.5)
        properties.assert_equal_bits(lists[1], updates)
        assert report.total_norm.isfinite()


def test_where_it_writes(backend):
    forget, retain = pairs(backend)
    out = [torch.full_like(t, torch.nan) for t in retain]
    before = [[t.clone() for t in side] for side in (forget, retain)]
    plan = sago.Plan(forget, retain, "pcgrad", out=out, backend=backend.name)
    plan.synthesize_()
    plan.synthesize_()
    for side, copy in zip((forget, retain), before, strict=True):
        properties.assert_equal_bits(side, copy)
    updates, _ = expected(backend, (forget, retain), "pcgrad")
    properties.assert_equal_bits(out, updates)
    sago.Plan(forget, retain, "pcgrad", out="forget", backend=backend.name).synthesize_()
    properties.assert_equal_bits(forget, updates)


def test_groups_missing_gradients_and_a_reduction(backend):
    (f, _), (r, s) = pairs(backend)
    calls = []
    plan = sago.Plan(
        [f, None, None], [r, s, None], "pcgrad", groups=["a", "b", "b"], backend=backend.name,
        reduce_gram=lambda table: calls.append(tuple(table.shape)),
    )  # fmt: skip
    copy = s.clone()
    for count in (1, 2):
        assert plan.synthesize_(alpha=2.0).groups == ("a", "b")
        assert len(calls) == count
    properties.assert_equal_bits([s], [4.0 * copy])


def test_single_tensors(backend):
    f, r = (on_device(t.float(), backend.device) for t in inputs.pair(20))
    updates, _ = expected(backend, ([f], [r]), "sago")
    plan = sago.Plan(f, r, backend=backend.name)
    plan.synthesize_()
    properties.assert_equal_bits([r], updates)
    assert repr(plan) == "Plan(1 tensors, rule 'sago')"


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"rule": "sugo"}, ValueError, "rule"),
        ({"out": [None]}, ValueError, "out"),
        ({"groups": []}, ValueError, "groups"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"reduce_gram": 1}, TypeError, "reduce_gram"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=str,
)
def test_bad_input_when_it_is_made(wrong, error, match):
    f, r = inputs.pair(20)
    with pytest.raises(error, match=match):
        sago.Plan(f, r, **wrong)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"gamma": "1"}, TypeError),
        ({"alpha": torch.ones(1)}, ValueError),
        ({"gamma": torch.ones((), dtype=torch.complex64)}, TypeError),
        ({"alpha": torch.ones((), device="meta")}, TypeError),
    ],
    ids=str,
)
def test_bad_weights(backend, weights, error):
    lists = pairs(backend)
    before = [t.clone() for t in lists[1]]
    plan = sago.Plan(*lists, backend=backend.name)
    with pytest.raises(error, match=next(iter(weights))):
        plan.synthesize_(**weights)
    properties.assert_equal_bits(lists[1], before)
    plan.synthesize_()


def test_the_memory_is_kept(backend):
    lists = pairs(backend)
    updates, _ = expected(backend, lists, "sago")
    plan = sago.Plan(*lists, backend=backend.name)
    left = [t.detach() for t in lists[1]]
    del lists
    gc.collect()
    plan.synthesize_()
    properties.assert_equal_bits(left, updates)


def test_the_memory_is_kept_when_data_is_replaced(backend):
    """It works on what it was made for, and not on memory that was freed."""
    f, r = (on_device(t.float(), backend.device) for t in inputs.pair(1 << 20))
    plan = sago.Plan([f], [r], stats=False, backend=backend.name)
    f.data, r.data = torch.ones(3, device=backend.device), torch.ones(3, device=backend.device)
    plan.synthesize_(2.0)
    assert torch.equal(r.cpu(), torch.ones(3))


def test_none_is_made_in_a_capture(monkeypatch):
    monkeypatch.setattr("sago.synthesis.is_capturing", lambda devices: True)
    with pytest.raises(ValueError, match="before the capture"):
        sago.Plan(*inputs.pair(20))


def test_what_a_capture_uploads_is_not_used_outside(monkeypatch):
    """It has no values before the first replay."""
    f, r = inputs.pair(20)
    plan = sago.Plan(f, r, reduce_gram=lambda table: None)
    with monkeypatch.context() as capturing:
        capturing.setattr("sago.backends.streams.is_capturing", lambda devices: True)
        plan.synthesize_()
    assert plan._pipeline._uploaded.find("elements", [torch.device("cpu")]) is None
    plan.synthesize_()
    assert plan._pipeline._uploaded.find("elements", [torch.device("cpu")]).tolist() == [20.0]


def test_a_weight_with_a_negative_bit(backend):
    f, r = (on_device(t.float(), backend.device) for t in inputs.pair(20))
    gamma = torch.tensor(1 + 2j, dtype=torch.complex128, device=backend.device).conj().imag
    assert gamma.is_neg()
    updates, _ = expected(backend, ([f], [r]), "sum", gamma=-2.0)
    plan = sago.Plan(f, r, "sum", backend=backend.name)
    plan.synthesize_(gamma)
    properties.assert_equal_bits([r], updates)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ANY)
@pytest.mark.parametrize("stats", [True, False])
def test_in_a_cuda_graph(rule, stats):
    """Captured at its first call, replayed on new gradients and new weights, beside eager calls."""
    forget, retain = ([t.to(BF16).cuda() for t in inputs.pair(n)] for n in (100, 70000))
    out = [torch.empty_like(t) for t in retain]
    gamma = torch.ones((), dtype=FP64, device="cuda")
    plan = sago.Plan(forget, retain, rule, out=out, stats=stats)
    eager = sago.Plan(forget, retain, rule, out=[torch.empty_like(t) for t in retain], stats=stats)
    eager.synthesize_(gamma, 1.5)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = plan.synthesize_(gamma, 1.5)
        ff = report.ff
    for seed, weight in ((10, 0.5), (20, 2.0)):
        for i, t in enumerate((*forget, *retain)):
            t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + i)))
        gamma.fill_(weight)
        graph.replay()
        plan.synthesize_(gamma, 1.5)
        graph.replay()
        updates, again = sago.synthesize(forget, retain, rule, gamma=weight, alpha=1.5, stats=stats)
        properties.assert_equal_bits([t.cpu() for t in out], [t.cpu() for t in updates])
        if ff is not None:
            properties.assert_equal_bits([ff], [again.ff])


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ANY)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("late", ["made", "other"])
def test_on_another_stream_than_it_was_made_on(rule, strided, late):
    """The other stream waits for the tables, and nothing reuses their memory while it runs."""
    forget, retain = ([t.cuda() for t in inputs.pair(n)] for n in (100, 1 << 20))
    if strided:  # these tensors are processed as copies
        forget, retain = ([t.repeat_interleave(2)[::2] for t in side] for side in (forget, retain))
    expected, _ = sago.synthesize(forget, retain, rule)
    out = [torch.empty_like(t) for t in retain]
    warm = sago.Plan(forget, retain, rule, out=[torch.empty_like(t) for t in retain])
    warm.synthesize_()  # compiles
    torch.cuda.synchronize()
    made, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(made):
        # The tables are uploaded after it, and nothing else delays the other stream.
        if late == "made":
            torch.cuda._sleep(100_000_000)
        plan = sago.Plan(forget, retain, rule, out=out)
    if late == "other":
        torch.cuda.synchronize()
    with torch.cuda.stream(other):
        if late == "other":
            torch.cuda._sleep(100_000_000)
        plan.synthesize_()
    del plan
    with torch.cuda.stream(made):
        reused = [torch.full((1 << 10,), -1, dtype=torch.int64, device="cuda") for _ in range(200)]
    torch.cuda.synchronize()
    properties.assert_equal_bits([t.cpu() for t in out], [t.cpu() for t in expected])
    assert all((t == -1).all() for t in reused)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ANY)
def test_the_host_never_waits(rule):
    forget, retain = ([t.cuda() for t in inputs.pair(n)] for n in (100, 5000))
    plan = sago.Plan(forget, retain, rule)
    gamma = torch.ones((), device="cuda")
    with no_sync():
        for weight in (1.0, gamma, 0.0):
            plan.synthesize_(weight)


@pytest.mark.parametrize("copied", [deepcopy, pickle.dumps])
def test_a_plan_is_not_copied(copied):
    plan = sago.Plan(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"sago\.Plan should not be copied or pickled.*make a new plan"):
        copied(plan)
