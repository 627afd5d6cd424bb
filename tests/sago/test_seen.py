"""Lists that were seen before."""

import gc
import weakref
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

import sago
from sago.backends.streams import Cache
from sago.core import checks as arguments
from sago.core import seen
from tests.conftest import FAST_BACKENDS, KERNEL_BACKENDS
from tests.support import inputs, properties, repeats


@pytest.fixture(params=FAST_BACKENDS)
def run(request, monkeypatch):
    monkeypatch.setattr(seen, "_seen", Cache(16))
    monkeypatch.setattr(seen, "_seen_on_cpu", Cache(16))
    monkeypatch.setattr(seen, "_long_on_cpu", Cache(2))
    return request.param


@pytest.fixture
def checks(monkeypatch):
    """Counts the calls that are checked in full."""
    found = []

    def counted(*given):
        found.append(given)
        return arguments.check_pairs(*given)

    monkeypatch.setattr(seen, "check_pairs", counted)
    return found


@pytest.mark.parametrize("calls", repeats.ALL, ids=lambda calls: calls.__name__)
def test_calls_on_the_same_memory(run, calls):
    calls(run)


@pytest.mark.parametrize("calls", repeats.ALL, ids=lambda calls: calls.__name__)
def test_without_torchs_guards(run, calls, monkeypatch):
    monkeypatch.setattr("sago.core.guards.TensorGuards", None)
    calls(run)


def test_the_same_lists_are_checked_once(run, checks):
    f, r = repeats.memory(run)
    for gamma in (1.0, 0.5, torch.tensor(2.0, device=run.device)):
        for stats in (True, False):
            # Other wrappers, as `to_local()` and `param.data` give.
            sago.synthesize_([f.view(-1)], [r.view(-1)], gamma=gamma, stats=stats, backend=run.name)
    assert len(checks) == 1
    sago.synthesize_([f], [r], "pcgrad", backend=run.name)
    assert len(checks) == 2
    sago.synthesize_([r], [f], backend=run.name)
    assert len(checks) == 3


def test_the_lists_of_a_call_may_be_synthesized_within_it(run):
    """By `reduce_gram`, for lists that are new and for lists that were seen."""
    f, r = repeats.memory(run)
    for _ in range(2):
        forget, retain = [f.clone()], [r.clone()]
        expected = sago.synthesize(forget, retain, "pcgrad", backend=run.name)[0]
        again = partial(sago.synthesize_, forget, retain, "pcgrad", backend=run.name)

        def reduce_gram(table, again=again, retain=retain):
            again(gamma=0.0)
            retain[0].copy_(r)

        for _ in range(2):
            again(reduce_gram=reduce_gram)
            properties.assert_equal_bits(retain, expected)
            retain[0].copy_(r)


def test_lists_in_turn_are_checked_once_each(run, checks):
    lists = [repeats.memory(run, seed=seed) for seed in range(4)]
    for _ in range(3):
        for f, r in lists:
            sago.synthesize_([f], [r], backend=run.name)
    assert len(checks) == 4


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"rule": "sugo"}, ValueError),
        ({"out": "foget"}, ValueError),
        ({"groups": "a"}, TypeError),
        ({"groups": [[]]}, TypeError),
        ({"groups": 0}, TypeError),
        ({"groups": torch.arange(1)}, TypeError),
        ({"groups": np.arange(1)}, TypeError),
        ({"groups": ["a", "b"]}, ValueError),
        ({"gamma": "1"}, TypeError),
        ({"gamma": torch.ones(2)}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"reduce_gram": 3}, TypeError),
    ],
    ids=str,
)
def test_bad_input_on_lists_that_were_seen(run, wrong, error):
    f, r = repeats.memory(run)
    sago.synthesize_([f], [r], groups=["a"], backend=run.name)
    sago.synthesize_([f], [r], backend=run.name)
    before = r.clone()
    with pytest.raises(error):
        sago.synthesize_([f], [r], backend=run.name, **wrong)
    for backend in ("trition", ["triton"]):
        with pytest.raises(ValueError, match="backend"):
            sago.synthesize_([f], [r], backend=backend)
    with pytest.raises((ValueError, TypeError)):
        sago.synthesize_([f], [r[:20]], backend=run.name)
    with pytest.raises(TypeError):
        sago.synthesize_([f], [3], backend=run.name)
    assert torch.equal(r, before)


def test_memory_that_overlaps_now(run):
    """The addresses are those of a call before, the strides are not."""
    f, r = repeats.memory(run)
    sago.synthesize_([f[:6].view(2, 3)], [r[:6].view(2, 3)], backend=run.name)
    with pytest.raises(ValueError, match="overlap itself"):
        sago.synthesize_([f[:6].view(2, 3)], [r[:1].expand(2, 3)], backend=run.name)


def test_none_at_another_place(run):
    """The addresses, their order and the lengths of the lists are those of the call before."""
    f, r = repeats.memory(run)
    s = torch.full_like(r, 2.0)
    for lists in ([f, None], [None, f]):
        found = [r.clone(), s.clone()]
        places = [r, s]
        sago.synthesize_(lists, places, "sum", backend=run.name)
        expected, _ = sago.reference.synthesize(lists, found, "sum")
        assert all(torch.equal(u, e) for u, e in zip(places, expected, strict=True))


def test_gradients_of_a_failed_call_are_not_kept_alive(run):
    f, r = repeats.memory(run)

    def fails(table):
        raise OSError("lost")

    for _ in range(2):
        with pytest.raises(OSError, match="lost"):
            sago.synthesize_([f], [r], "pcgrad", reduce_gram=fails, backend=run.name)
    alive = [weakref.ref(t) for t in (f, r)]
    del f, r
    gc.collect()
    assert [ref() for ref in alive] == [None] * 2


def test_gradients_are_not_kept_alive(run):
    class Key:
        pass

    (f, r), (g, s), key = repeats.memory(run), repeats.memory(run, seed=1), Key()
    sago.synthesize_([f], [r], "pcgrad", backend=run.name)
    sago.synthesize_([g[::2]], [s[::2]], "pcgrad", backend=run.name)  # through copies
    sago.synthesize_([f, g], [r, s], groups=[key, key], backend=run.name)
    alive = [weakref.ref(t) for t in (f, r, g, s, key)]
    del f, r, g, s, key
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_what_is_kept_is_bounded(run):
    kept = [repeats.memory(run, 5, seed) for seed in range(20)]
    for f, r in kept:
        sago.synthesize_([f], [r], stats=False, backend=run.name)
    cache = seen._seen_on_cpu if run.name == "compiled" else seen._seen
    assert len(cache._found) == 16


def test_iterables_that_can_be_read_once(run):
    f, r = (t.float() for t in inputs.pair(20))
    for _ in range(2):
        repeats.in_place(run, [run.place(f)], [run.place(r)])
        out = run.place(r).clone()
        sago.synthesize_(iter([run.place(f)]), (t for t in [out]), backend=run.name)
        expected = sago.reference.synthesize(f, r)[0]
        assert torch.equal(out.cpu(), expected)


def test_other_tensors_than_plain_ones_are_checked_every_time(run, checks):
    class Other(torch.Tensor):
        pass

    f, r = repeats.memory(run)
    for _ in range(2):
        sago.synthesize_([f.as_subclass(Other)], [r], backend=run.name)
    assert len(checks) == 2


def test_versions_are_counted(run):
    """Also from the second call on: autograd sees that what it saved was overwritten."""
    f, r = repeats.memory(run)
    weight = torch.ones_like(r, requires_grad=True)
    for _ in range(2):
        loss = (weight * r).sum()
        sago.synthesize_([f], [r], backend=run.name)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("run", KERNEL_BACKENDS)
def test_a_launch_that_fails_midway(run, monkeypatch):
    """It leaves a row half counted: its counter is not used again."""
    forget, retain = ([t.clone(), t.bfloat16()] for t in repeats.memory(run))
    options = {"groups": ["a", "a"], "out": [torch.empty_like(t) for t in retain], "backend": run.name}
    expected = sago.synthesize_(forget, retain, **options).ff
    combine = import_module("sago.kernels.combine")
    launch = combine.launch

    def failing(kernel, batch, *rest):
        whole, batch.launches = batch.launches, [batch.launches[0], None]
        try:
            launch(kernel, batch, *rest)
        finally:
            batch.launches = whole

    with monkeypatch.context() as patched:
        patched.setattr(combine, "launch", failing)
        with pytest.raises(AttributeError):
            sago.synthesize_(forget, retain, **options)
    assert torch.equal(sago.synthesize_(forget, retain, **options).ff, expected)
