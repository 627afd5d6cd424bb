"""How many kernels a synthesis launches, counted, whatever the list looks like."""

from importlib import import_module

import pytest
import torch

import sago
from sago.cache import Cache
from tests.conftest import DEVICES

pytest.importorskip("triton", reason="needs Triton")


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """Calls a function and returns how often the gram and the combine kernel were launched."""
    counters = []
    # The first launch goes through the kernel itself.
    monkeypatch.setattr("sago.kernels.batch._layouts", Cache(64))
    monkeypatch.setattr("sago.seen._seen", Cache(16))
    for name in ("gram", "combine"):
        module = import_module(f"sago.kernels.{name}")
        counters.append(Counting(getattr(module, f"_{name}_kernel")))
        monkeypatch.setattr(module, f"_{name}_kernel", counters[-1])

    def count(call):
        before = [counter.launches for counter in counters]
        call()
        return tuple(c.launches - b for c, b in zip(counters, before, strict=True))

    return count


@pytest.fixture(params=DEVICES)
def gradients(request):
    """Two lists of one dtype: many lengths, several chunks, unaligned, transposed, strided, None, empty."""
    g = torch.Generator().manual_seed(0)

    def some():
        found = [torch.randn(n, generator=g) for n in (1, 17, 4096, 40000, 0)]
        found += [torch.randn(33, generator=g)[1:], torch.randn(8, 5, generator=g).t()]
        return [t.to(request.param) for t in (*found, torch.randn(9, generator=g)[::2])]

    forget, retain = some(), some()
    return [None, *forget], [torch.ones_like(retain[0]), *retain]


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", ["sum", "sago", "sago_prefer_retain"])
def test_an_elementwise_rule_is_one_launch(launches, gradients, rule, stats):
    assert launches(lambda: sago.synthesize_(*gradients, rule, stats=stats, backend="triton")) == (0, 1)


@pytest.mark.parametrize("groups", [None, list("aabbccdda")])
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global", "blur"])
def test_a_rule_with_inner_products_is_two_launches(launches, gradients, rule, stats, groups):
    call = lambda: sago.synthesize_(*gradients, rule, groups=groups, stats=stats, backend="triton")  # noqa: E731
    assert launches(call) == (1, 1)


def test_weights_on_the_device_cost_no_launch(launches, gradients):
    weights = [torch.tensor(w, device=gradients[1][0].device) for w in (0.5, 2.0)]
    assert launches(lambda: sago.synthesize_(*gradients, "pcgrad", *weights, backend="triton")) == (1, 1)


def test_every_combination_of_dtypes_is_a_launch(launches, gradients):
    forget, retain = gradients
    both = [*forget, *forget[1:]], [*retain, *(t.to(torch.bfloat16) for t in retain[1:])]
    assert launches(lambda: sago.synthesize_(*both, "blur", backend="triton")) == (2, 2)


def test_reading_the_report_launches_neither(launches, gradients):
    report = sago.synthesize_(*gradients, "sago", backend="triton")
    assert launches(report.summary) == (0, 0)
