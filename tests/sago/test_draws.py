"""Random gates: the numbers that they draw, alike on every backend, and their steps in buckets."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sago
from sago.rules import graddrop, where
from sago.rules.draws import uniform
from tests.support import inputs
from tests.support.backends import Backend
from tests.support.properties import assert_equal_bits
from tests.support.windows import FP32

N = 1 << 16


def draws(seed=0, step=0, start=0, count=N):
    return uniform(torch.tensor([seed, step]), torch.arange(start, start + count))


def correlation(x, y):
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].abs().item()


@pytest.mark.parametrize("start", [0, 2**32 - N // 2, 2**40])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_the_numbers_are_uniform(seed, start):
    u = draws(seed, start=start)
    assert u.dtype == torch.float32
    assert 0.0 <= u.min() < u.max() < 1.0
    # Chi-square of 256 equal parts: mean 255 and deviation 23, so 400 is beyond 6 deviations.
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    assert ((counts - N / 256) ** 2 / (N / 256)).sum() < 400
    # The deviation of a correlation of independent numbers is 1 / sqrt(N), here 0.004.
    assert correlation(u[1:], u[:-1]) < 6 * N**-0.5
    assert u.unique().numel() > N - 400  # of 2^24 values, about N^2 / 2^25 = 128 are drawn twice


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"step": 2**32}, {"start": N}, {"start": 2**32}])
def test_other_seeds_steps_and_positions_have_other_numbers(other):
    """Independent ones, and not the same numbers in another order."""
    u, v = draws(), draws(**other)
    assert correlation(u, v) < 6 * N**-0.5
    shared = (torch.isin(u, v)).sum()
    assert abs(shared - N * N / 2**24) < 6 * (N * N / 2**24) ** 0.5


def mixed(x):
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 15)


def by_hand(seed, step, position):
    """In Python's integers."""
    key = 0
    for x in (seed, step):
        key = mixed(mixed(key ^ x % 2**32) ^ (x >> 32) % 2**32)
    first = mixed(key ^ position >> 32)
    return (mixed((mixed(first ^ position % 2**32) + mixed(first ^ 0x9E3779B9)) % 2**32) >> 8) / 2**24


def test_the_numbers_do_not_change():
    """A checkpoint of one version is continued by the next one."""
    for seed in (0, 5, -1, 2**62 + 3):
        for step in (0, 7, 2**33):
            positions = [0, 1, 2**31, 2**32 - 1, 2**33 + 1]
            found = uniform(torch.tensor([seed, step]), torch.tensor(positions))
            assert found.tolist() == [by_hand(seed, step, p) for p in positions]


def test_the_probability_of_each_gradient():
    f, r = torch.full((N,), 3.0), torch.full((N,), -1.0)
    for forget, retain in ((f, r), (r, f), (-f, -r), (-r, -f)):
        update, _ = sago.synthesize(forget, retain, "graddrop")
        # The positive one with probability |positive| / (|f| + |r|). Its deviation is below 0.5 / sqrt(N).
        kept = (update == forget.clamp(min=0.0) + retain.clamp(min=0.0)).double().mean()
        positive = max(forget[0], retain[0]).item()
        assert abs(kept - positive / 4.0) < 3 * N**-0.5
        assert ((update == forget) | (update == retain)).all()


def test_against_torchjd_with_the_same_numbers(monkeypatch):
    torchjd = pytest.importorskip("torchjd.aggregation", reason="needs TorchJD")
    f, r = inputs.pair(5000)
    f[:50], r[50:100] = 0.0, 0.0
    u = uniform(torch.tensor([4, 0]), torch.arange(5000)).double()
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: u)
    expected = torchjd.GradDrop()(torch.stack([f, r]))
    assert_equal_bits([sago.synthesize(f, r, graddrop(4))[0]], [expected])


@pytest.mark.parametrize("family", ["tails", "unaligned", "missing", "mixed_strides", "transposed"])
def test_every_backend_draws_alike(backend, family):
    forget, retain = inputs.FAMILIES[family](FP32, FP32)
    for seed in (0, 2**40 + 1, -3):
        rule = graddrop(seed)
        expected, _ = sago.reference.synthesize(forget, retain, rule, gamma=0.75, alpha=1.5)
        found, _ = backend(forget, retain, rule, gamma=0.75, alpha=1.5)
        assert_equal_bits(found, expected)


def test_another_layout_of_the_update(backend):
    """Gradients and updates of different strides are processed in their logical order."""
    f, r = (t.float().view(6, 50).t() for t in inputs.pair(300))
    out, expected = torch.empty(50, 6), torch.empty(50, 6)
    sago.synthesize_([f], [r], "graddrop", out=[out], backend=backend.name)
    sago.reference.synthesize_([f], [r], "graddrop", out=[expected])
    assert_equal_bits([out], [expected])


def test_the_position_counts_and_not_the_tensor(backend):
    """The list in other pieces, over several chunks, and on more than one row."""
    f, r = (t.float() for t in inputs.pair(inputs.CHUNK + 100))
    (whole,), report = backend([f], [r], "graddrop")
    sizes = [5, 0, inputs.CHUNK - 7, 102]
    found, of_pieces = backend(list(f.split(sizes)), list(r.split(sizes)), "graddrop")
    assert_equal_bits([torch.cat(found)], [whole])
    # A sum over the update has at most 4 times the error of a sum, 1e-6 of what its terms add up to. That is
    # about the number of elements for products that cancel. `uu` has positive terms only.
    for name in ("uu", "uf", "ur"):
        exact = getattr(report, name).sum()
        torch.testing.assert_close(getattr(of_pieces, name).sum(), exact, rtol=4e-6, atol=4e-6 * len(f))
    torch.testing.assert_close(report.uu[0], whole.double() @ whole.double(), rtol=4e-6, atol=0.0)


def test_steps_and_checkpoints_of_buckets():
    """Each step draws other numbers. A run that is continued draws those that it would have drawn."""
    f, r = (t.float() for t in inputs.pair(300))
    updates = []
    params = [nn.Parameter(torch.zeros(n)) for n in (100, 200)]
    buckets = sago.GradientBuckets(params)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(buckets.state_dict())
            buckets = sago.GradientBuckets(params)
            buckets.load_state_dict(state)
        for side, grads in ((buckets.forget, f), (buckets.retain, r)):
            with side():
                torch.autograd.backward(params, list(grads.split([100, 200])))
        if step == 3:
            with buckets.retain():
                torch.autograd.backward(params, [torch.zeros(n) for n in (100, 200)])
        # Without statistics, other rules would process a whole buffer at once, with its gaps.
        buckets.synthesize_(graddrop(9), max_norm=1e6 if step == 1 else None, stats=step < 2)
        updates.append(torch.cat([p.grad.clone() for p in params]))
        buckets.zero_()
    for step, update in enumerate(updates):
        u = uniform(torch.tensor([9, step]), torch.arange(300))
        positive = u * f.abs() + u * r.abs() < torch.maximum(f, r)
        drawn = torch.where(positive, torch.maximum(f, r), torch.minimum(f, r))
        assert torch.equal(update, torch.where(f * r < 0, drawn, f + r))


def divides(f, r):
    return where(f / r > 1.0, 1.0, 0.0)


def of_three(f, r, u):
    return where(u < 0.5, 0.0, 1.0)


def two(ff, fr, rr, gamma, alpha):
    return gamma, 0.0, 0.0, alpha


def test_what_is_refused(device):
    f, r = torch.randn(2, 20)
    with pytest.raises(ValueError, match="`seed` should be None for a rule without a `gate`"):
        sago.Rule("wrong", two, "element", gated=True, seed=1)
    for seed, fits in ((-(2**63) - 1, False), (-(2**63), True), (2**63 - 1, True), (2**63, False)):
        says = pytest.raises(ValueError, match="`seed` should be None or an int of 64 bits")
        with nullcontext() if fits else says:
            sago.Rule("seeded", two, "element", gate=of_three, seed=seed)
    with pytest.raises(ValueError, match=r"`gate` should take `\(f, r, u\)`"):
        sago.Rule("wrong", two, "element", gate=divides, seed=0)
    with pytest.raises(ValueError, match="`reduce_gram` should be None for a rule with a random gate"):
        sago.synthesize(f, r, "graddrop", reduce_gram=lambda table: table)
    with pytest.raises(ValueError, match=r"only \+ - \*, comparisons"):
        Backend("triton", device)([f], [r], sago.Rule("divides", two, "element", gate=divides))
