"""The adapters for TorchJD against the reference, against GradientBuckets, and in TorchJD's own engines."""

import subprocess
import sys

import pytest
import torch

import sago
import sago.reference
from tests.support import inputs
from tests.support.backends import DTYPES, ELEMENTWISE, RULES
from tests.support.oracle import PROMISED, SUM_ERROR
from tests.support.properties import assert_equal_bits, assert_near, assert_updates

pytest.importorskip("torchjd", reason="needs TorchJD")

from torchjd.aggregation import GramianWeightedAggregator
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from sago.integrations.torchjd import SynthesisAggregator, SynthesisWeighting

WEIGHTS = {"gamma": 0.75, "alpha": 1.5}
ERROR = 16 * SUM_ERROR[torch.float64]  # of updates from sums in another order, and of nets in fp64
UNGATED = ["sum", "pcgrad", "pcgrad_global", "blur"]


def jacobian(dtype=torch.float32, numel=257):
    return torch.stack([inputs._to(t, dtype) for t in inputs.pair(numel, 3)])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
        self.heads = torch.nn.ModuleList([torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)])
        self.register_buffer("x", torch.randn(2, 7, 6))
        self.double()

    def losses(self):
        """Forget and retain, with parameters that only one of them reaches."""
        forget, retain = (head(self.shared(x)) for head, x in zip(self.heads, self.x, strict=True))
        return -(forget**2).mean(), (retain - 1.0).square().mean()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_reference(rule, dtype):
    matrix = jacobian(dtype)
    kept = matrix.clone()
    found = SynthesisAggregator(rule, **WEIGHTS)(matrix)
    expected, _ = sago.reference.synthesize(matrix[0], matrix[1], rule, **WEIGHTS)
    assert torch.equal(matrix, kept)
    if rule in ELEMENTWISE:
        assert_equal_bits([found], [expected])
    else:
        assert_updates([found], [matrix[0]], [matrix[1]], rule, **WEIGHTS)


@pytest.mark.parametrize("rule", RULES)
def test_a_training_step_is_that_of_the_buckets(rule):
    ours, theirs = Net(), Net()
    buckets = sago.GradientBuckets(ours)
    forget, retain = ours.losses()
    with buckets.forget():
        forget.backward(retain_graph=True)
    with buckets.retain():
        retain.backward()
    buckets.synthesize_(rule, **WEIGHTS)

    backward(list(theirs.losses()))
    params = list(theirs.parameters())
    aggregator = SynthesisAggregator(rule, **WEIGHTS, numels=[p.numel() for p in params])
    jac_to_grad(params, aggregator)
    assert_near([q.grad for q in params], [p.grad for p in ours.parameters()], ERROR)


def test_mtl_backward_gives_the_shared_parameters_the_rule():
    net, expected = Net(), Net()
    features = net.shared(net.x)
    forget, retain = (head(f) for head, f in zip(net.heads, features, strict=True))
    mtl_backward([-(forget**2).mean(), (retain - 1.0).square().mean()], features=features)
    jac_to_grad(net.shared.parameters(), SynthesisAggregator("sago", **WEIGHTS))

    both = [
        torch.autograd.grad(loss, list(expected.shared.parameters()), retain_graph=True)
        for loss in expected.losses()
    ]
    updates, _ = sago.reference.synthesize(*both, "sago", **WEIGHTS)
    assert_near([p.grad for p in net.shared.parameters()], updates, ERROR)
    assert all(p.grad is not None for p in net.heads.parameters())


def test_numels_make_a_rule_module_wise():
    matrix = jacobian(torch.float64)
    numels = [100, 0, 57, 100]
    found = SynthesisAggregator("pcgrad", **WEIGHTS, numels=iter(numels))(matrix)
    expected, _ = sago.reference.synthesize(
        matrix[0].split(numels), matrix[1].split(numels), "pcgrad", **WEIGHTS
    )
    assert_near([found], [torch.cat(expected)], ERROR)
    whole = SynthesisAggregator("pcgrad", **WEIGHTS)(matrix)
    assert_equal_bits([whole], [SynthesisAggregator("pcgrad_global", **WEIGHTS)(matrix)])
    assert not torch.allclose(found, whole)


def test_a_rule_of_ones_own_and_a_weight_that_changes():
    def swapped(ff, fr, rr, gamma, alpha):
        return alpha, gamma

    matrix = jacobian(torch.float64)
    aggregator = SynthesisAggregator(sago.Rule("swapped", swapped, "global"), gamma=2.0, alpha=3.0)
    assert_near([aggregator(matrix)], [3.0 * matrix[0] + 2.0 * matrix[1]], ERROR)
    aggregator.gamma = torch.tensor(5.0)
    assert_near([aggregator(matrix)], [3.0 * matrix[0] + 5.0 * matrix[1]], ERROR)


def test_the_report():
    matrix = jacobian()
    aggregator = SynthesisAggregator("sago", stats=True)
    assert aggregator.report is None
    aggregator(matrix)
    _, expected = sago.reference.synthesize(matrix[0], matrix[1], "sago")
    # No sum is less than a quarter of its magnitudes, and a cosine is made of three.
    assert aggregator.report.summary() == pytest.approx(expected.summary(), rel=8 * PROMISED)


def test_no_graph_and_no_state():
    matrix = jacobian().requires_grad_()
    aggregator = SynthesisAggregator("blur")
    assert not aggregator(matrix).requires_grad
    assert not aggregator.state_dict()
    assert not list(aggregator.parameters())
    assert repr(aggregator) == "SynthesisAggregator(rule='blur', gamma=1.0, alpha=1.0)"


def test_a_matrix_without_columns():
    assert SynthesisAggregator()(torch.zeros(2, 0)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SynthesisAggregator()(torch.zeros(3, 4)), "`matrix` should have two rows.*Found 3"),
        (lambda: SynthesisAggregator()(torch.zeros(1, 4)), "`matrix` should have two rows.*Found 1"),
        (lambda: SynthesisAggregator()(torch.zeros(4)), "`matrix`"),
        (lambda: SynthesisAggregator(numels=[2, 3])(torch.zeros(2, 4)), "have 5 columns.*Found 4"),
        (lambda: SynthesisAggregator("gradnorm"), "`rule` should be one of.*Found 'gradnorm'"),
        (lambda: SynthesisAggregator()(torch.zeros(2, 4, dtype=torch.int32)), "forget"),
        (lambda: SynthesisWeighting("sago"), "`rule` should be a rule that is not gated.*Found 'sago'"),
        (lambda: SynthesisWeighting()(torch.eye(3)), r"`gramian` should have shape \[2, 2\]. Found \[3, 3\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("rule", UNGATED)
def test_the_weighting_is_the_aggregator(rule):
    matrix = jacobian(torch.float64)
    weights = SynthesisWeighting(rule, **WEIGHTS)(matrix @ matrix.T)
    assert_near([weights @ matrix], [SynthesisAggregator(rule, **WEIGHTS)(matrix)], ERROR)


def test_the_weighting_skips_the_concatenation():
    nets = Net(), Net()
    aggregator = GramianWeightedAggregator(SynthesisWeighting("blur", **WEIGHTS))
    for net, optimize in zip(nets, (False, True), strict=True):
        backward(list(net.losses()))
        weights = jac_to_grad(net.parameters(), aggregator, optimize_gramian_computation=optimize)
        assert weights.shape == (2,)
    assert_near(*([p.grad for p in net.parameters()] for net in nets), ERROR)


def test_the_weighting_in_autogram():
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)).double() for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def losses(model):
        return torch.tensor([-1.0, 1.0]) * (model(x).squeeze(1) - y) ** 2  # a row each: forget, retain

    engine = Engine(theirs, batch_dim=0)
    found = losses(theirs)
    found.backward(SynthesisWeighting("pcgrad_global", **WEIGHTS)(engine.compute_gramian(found)))
    forget, retain = (
        torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True) for loss in losses(ours)
    )
    updates, _ = sago.reference.synthesize(forget, retain, "pcgrad_global", **WEIGHTS)
    assert_near([p.grad for p in theirs.parameters()], updates, ERROR)


def test_import_sago_does_not_import_torchjd():
    code = "import sys, sago; assert 'torchjd' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
