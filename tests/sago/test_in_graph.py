"""A synthesis in a function that torch.compile traces has the bits of the eager one, and breaks no graph."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sago
from sago.core.report import columns_of
from sago.core.statistics import computed
from sago.rules import resolve
from tests.support import inputs, properties
from tests.support.backends import RULES

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVED = sago.Rule("halved", lambda ff, fr, rr, gamma, alpha: (gamma, alpha / 2), scope="element")
NAMED = pytest.param(HALVED, id="halved")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


def numbers(*dtypes, numel=50):
    return [inputs.normal(numel, i).to(dtype) for i, dtype in enumerate(dtypes)]


def assert_same(function, *args, backend="aot_eager"):
    """Runs the function eagerly and compiled: equal arguments afterwards, equal results and reports."""
    copies = [[t.clone() for t in args] for _ in range(2)]
    runs = [function, torch.compile(function, fullgraph=True, backend=backend)]
    (expected, *known), (found, *report) = (run(*copy) for run, copy in zip(runs, copies, strict=True))
    properties.assert_equal_bits(*copies)
    properties.assert_equal_bits(found, expected)
    for x, y in zip(report, known, strict=True):
        assert (x.groups, x.absent, x.table()) == (y.groups, y.absent, y.table())
    return found


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global", "ties", NAMED])
def test_every_output(rule):
    def step(a, b, c, d, e):
        more = sago.synthesize_([a * 2, None, c], [b, d, None], rule, 0.5, 2.0, out=[b, d, e])
        into_retain = sago.synthesize_([a, b], [c, d], rule, stats=False)
        into_forget = sago.synthesize_((a, None), (b, None), rule, out="forget", groups=("x", "y"))
        updates, new = sago.synthesize([None, a], [b, c], rule, alpha=3)
        single, last = sago.synthesize(a, b, rule, retain_floor=0.0, eps=1e-3, backend="reference")
        return [*updates, single, a + 1], more, into_retain, into_forget, new, last

    assert_same(step, *numbers(BF16, FP32, FP16, FP64, BF16))


def test_inductor_and_weights_on_the_device():
    def step(a, b, gamma, alpha):
        report = sago.synthesize_([a], [b], "pcgrad", gamma, alpha)
        gamma.add_(1.0)
        return [sago.synthesize([a], [b], "sago", gamma * 0.5, 0.0)[0][0]], report

    weights = torch.tensor(0.75), torch.tensor(2.0)
    assert_same(step, *numbers(FP32, FP32), *weights, backend="inductor")


def test_tensors_that_share_memory():
    """Inductor drops the clones, and passes the operator a tensor that the graph writes to afterwards."""

    def step(a, b, both):
        old = a.clone()
        sago.synthesize_([b * 2, old], [a, b])  # `a` is the retain gradient of the first pair
        sago.synthesize_([a], [a], "sum")
        first, second = both[:20], both[20:40]
        sago.synthesize_([first, second], [second.clone(), first.clone()], out=[first, second])
        sago.synthesize_([both[:10].clone()], [both[:10]], "pcgrad")
        return ([both * 2, old, a.view(5, 10).t() + 1],)

    assert_same(step, *numbers(FP32, FP32, FP32), backend="inductor")


def test_one_graph_for_many_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda f, r: sago.synthesize(f, r, "pcgrad", 0.5), fullgraph=True, backend=counter, dynamic=True
    )
    for numel in (50, 60, 70, 80):
        f, r = numbers(FP32, BF16, numel=numel)
        (found, report), (expected, known) = step(f, r), sago.synthesize(f, r, "pcgrad", 0.5)
        properties.assert_equal_bits([found], [expected])
        assert report.table() == known.table()
        assert report.numel.tolist() == [numel]
    assert counter.frame_count <= 2


def test_gradients_that_require_grad_stay_leaves():
    f, r = (t.requires_grad_() for t in numbers(FP32, FP32))
    before = r._version
    torch.compile(partial(sago.synthesize_, rule="sum"), fullgraph=True, backend="aot_eager")(f, r)
    assert r.is_leaf
    assert r._version > before
    assert torch.equal(r.detach(), sum(numbers(FP32, FP32)))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("rule", [*RULES, "ties", NAMED])
def test_columns_of_the_operator_are_those_of_a_report(rule, stats):
    rule = resolve(rule)
    _, report = sago.synthesize(*numbers(FP32, FP32), rule, stats=stats, backend="reference")
    assert list(columns_of(report)) == computed(rule, stats)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("missing", ["neither", "both"])
def test_opcheck(stats, missing):
    a, b, c = numbers(FP32, BF16, FP32)
    rule = resolve("pcgrad")
    with_none = [None] if missing == "both" else [c]
    args = [[a, *with_none], [b, *with_none], [0, -1 if missing == "both" else 2], id(rule), [0.5, 0.0]]
    args += [[None, torch.tensor(2.0)], [0, 0], 0.0, stats, None, 0.0]
    torch.library.opcheck(torch.ops.sago.synthesize, args)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        ("Unsupported", "distributed over ranks", {"reduce_gram": lambda table: None}),
        ("Unsupported", "should be one of", {"rule": "unknown"}),
        ("Unsupported", "should have the same shape", {"out": [torch.zeros(3, 50)]}),
        ("Unsupported", "should have 1 keys", {"groups": [1, 2]}),
        ("ValueError", "`eps` should be finite and not negative", {"eps": -1.0}),
        ("ValueError", "`gamma` should be a float or a 0-d tensor", {"gamma": torch.ones(1)}),
        ("ValueError", "`backend` should be None or one of", {"backend": "unknown"}),
        ("ValueError", "should keep no numbers", {"rule": sago.rules.gradvac(decay=0.5)}),
    ],
)
def test_bad_input_is_an_error_before_anything_is_written(error, message, options):
    f, r = numbers(FP32, FP32)
    before = r.clone()
    call = torch.compile(partial(sago.synthesize_, **options), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=message) as caught:
        call([f], [r])
    assert type(caught.value).__name__ == error
    properties.assert_equal_bits([r], [before])
