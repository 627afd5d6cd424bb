"""More than 2^31 elements in one tensor and in one bucket, and lists of very many tensors.

The large tensors hold zeros besides a few elements. Their zeros are memory that is mapped and mostly not
there, until an update is written. `make test-large` runs these tests, which need 16 GiB of memory; the chunks
of the kernels around element 2^31 are executed in `tests/ptx/test_wrong_kernels.py`.
"""

import pytest
import torch
from torch import nn

import sago
from tests.support import properties

BF16, FP32 = torch.bfloat16, torch.float32
NUMEL = 2**31 + 32768 + 5
# The ends, both sides of 2^31, and the start of the last chunk.
AT = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 32767, 2**31 + 32768, NUMEL - 1])
FORGET = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, 8], dtype=BF16)
RETAIN = torch.tensor([1.0, 1, -2, -2, -4, -4, 8, -8], dtype=BF16)  # <f,r> is negative


def sparse(values):
    t = torch.zeros(NUMEL, dtype=values.dtype)
    t[AT] = values
    return t


def assert_sparse(found, at, expected):
    assert torch.equal(found[at], expected)
    assert torch.count_nonzero(found) == torch.count_nonzero(expected)


def assert_sums(report):
    f, r, report = FORGET.double(), RETAIN.double(), report.total()
    assert [report.ff.item(), report.fr.item(), report.rr.item()] == [f @ f, f @ r, r @ r]
    assert report.numel.tolist() == [NUMEL]
    assert report.conflict_fraction.item() == (f * r < 0).sum() / NUMEL


@pytest.mark.large
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_a_tensor(rule):
    expected, _ = sago.reference.synthesize([FORGET], [RETAIN], rule, gamma=0.5, alpha=2.0)
    retain = sparse(RETAIN)
    report = sago.synthesize_(sparse(FORGET), retain, rule, gamma=0.5, alpha=2.0)
    assert_sums(report)
    assert_sparse(retain, AT, expected[0])


@pytest.mark.large
@pytest.mark.parametrize("one_copy", [False, True])
def test_a_bucket(one_copy):
    """Two parameters of fewer than 2^31 elements lie in one buffer of more."""
    first, second = (nn.Parameter(torch.zeros(n, dtype=BF16)) for n in (NUMEL // 2, NUMEL - NUMEL // 2))
    buckets = sago.GradientBuckets([first, second], bucket_cap_mb=1e5, one_copy=one_copy)
    head = NUMEL // 2 > AT

    def loss(values):
        inside = first[AT[head]] * values[head], second[AT[~head] - NUMEL // 2] * values[~head]
        return sum(x.sum() for x in inside)

    with buckets.forget():
        loss(FORGET).backward()
    if one_copy:
        with buckets.synthesize_in_backward("sago", gamma=0.5, alpha=2.0) as step:
            loss(RETAIN).backward()
        report = step.report
    else:
        with buckets.retain():
            loss(RETAIN).backward()
        report = buckets.synthesize_("sago", gamma=0.5, alpha=2.0)
    assert first.grad.untyped_storage().nbytes() >= 2 * NUMEL
    assert_sums(report)
    expected, _ = sago.reference.synthesize([FORGET], [RETAIN], "sago", gamma=0.5, alpha=2.0)
    assert_sparse(first.grad, AT[head], expected[0][head])
    assert_sparse(second.grad, AT[~head] - NUMEL // 2, expected[0][~head])


@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_ten_thousand_tensors(rule):
    """Of no, one, two and three elements: the same as one tensor of all elements."""
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(i % 4, generator=generator) for i in range(10_000)] for _ in range(2)]
    updates, report = sago.synthesize(*sides, rule, backend="compiled")
    expected, known = sago.synthesize(*map(torch.cat, sides), rule, backend="reference")
    assert [len(u) for u in updates] == [i % 4 for i in range(10_000)]
    properties.assert_near([torch.cat(updates)], [expected], properties.PROMISED)
    total, size = report.total(), (known.ff * known.rr).sqrt().item()
    assert torch.equal(total.conflict_fraction, known.conflict_fraction)
    for name in ("ff", "fr", "rr", "uu", "uf", "ur"):
        allowed = properties.PROMISED * 4 * size  # u is at most f and r together
        assert getattr(total, name).item() == pytest.approx(getattr(known, name).item(), rel=0, abs=allowed)
