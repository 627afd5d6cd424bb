"""How many kernels a synthesis launches, counted, whatever the list looks like.

`test_launcher` and `test_gpu` count what reaches the driver.
"""

from collections import Counter
from importlib import import_module

import pytest
import torch

import sago
from tests.conftest import DEVICES
from tests.support.backends import import_with_triton

import_with_triton("triton")


def count_launches(monkeypatch):
    """Calls a function and returns how often the gram and the combine kernel were launched."""
    counts = Counter()
    launch = import_module("sago.kernels.launch").launch

    def counted(kernel, batch, *rest):
        counts[kernel] += len(batch.launches)
        launch(kernel, batch, *rest)

    modules = [import_module(f"sago.kernels.{name}") for name in ("gram", "combine")]
    for module in modules:
        monkeypatch.setattr(module, "launch", counted)

    def count(call):
        counts.clear()
        call()
        return counts[modules[0]._gram_kernel], counts[modules[1]._combine_kernel]

    return count


@pytest.fixture
def launches(monkeypatch):
    return count_launches(monkeypatch)


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


@pytest.mark.parametrize("stats", [True, False])
def test_a_floor_is_one_more_launch(launches, gradients, stats):
    call = lambda: sago.synthesize_(*gradients, retain_floor=0.1, stats=stats, backend="triton")  # noqa: E731
    assert launches(call) == (1, 1)


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
