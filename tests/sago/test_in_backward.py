"""`synthesize_in_backward`: the bits of `synthesize_`, earlier, or a refusal."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sago
from sago.capture import buckets as capture_buckets
from sago.capture import pipelines
from sago.core import pipeline
from tests.support import inputs, properties
from tests.support.backends import ELEMENTWISE
from tests.support.windows import (
    ALONE,
    ANY,
    BF16,
    DROPPED,
    FP16,
    FP32,
    FP64,
    GATED,
    NAN,
    NORMALIZED,
    WEIGHTS,
    assert_equal_results,
    backward,
    bucketed,
    fresh,
    grads,
    losses,
    model_of,
    normalized,
    parts,
    rule_name,
    small,
    thin,
    window,
)


@pytest.mark.parametrize("rule", [*ELEMENTWISE, "pcgrad", GATED, DROPPED], ids=rule_name)
def test_updates_written_in_backward_are_those_written_after_it(backend, rule):
    """And so are the reports; over one buffer and over one a tensor, over missing and empty gradients."""
    cases = (
        (BF16, "missing", {}, True),
        (FP16, "empty", ALONE, True),
        (FP32, "specials", {}, False),
        (FP64, "transposed", ALONE, False),
    )
    for dtype, family, made, stats in thin(backend, cases, rule):
        pairs, options = small(dtype, family), {"stats": stats, **WEIGHTS}
        expected = bucketed(backend, *pairs, rule, made, False, **options)
        for form in (made, {"one_copy": True, **made}):
            assert_equal_results(bucketed(backend, *pairs, rule, form, True, **options), expected)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_updates_written_in_backward_of_buckets_of_all_kinds(backend, rule):
    cases = (
        ({"accumulate_dtype": FP32}, (BF16, FP16, BF16, FP16)),
        ({"accumulate_dtype": FP64, **ALONE}, (BF16, FP16, FP32, FP64)),
        ({"groups": ["a", 1, "a", 1]}, (FP32,) * 4),
        ({"groups": ["a", 1, "a", 1]}, (BF16, FP16, BF16, FP16)),
        ({"bucket_cap_mb": 300 / 2**20}, (FP32,) * 4),
    )
    for made, dtypes in thin(backend, cases, rule):
        forget = [inputs.normal(20 + i, i).to(d) for i, d in enumerate(dtypes)]
        retain = [inputs.normal(20 + i, 9 + i).to(d) for i, d in enumerate(dtypes)]
        expected = bucketed(backend, forget, retain, rule, made, False, **WEIGHTS)
        forms = [made] if "accumulate_dtype" in made else [made, {"one_copy": True, **made}]
        for form in forms:
            assert_equal_results(bucketed(backend, forget, retain, rule, form, True, **WEIGHTS), expected)


@pytest.mark.parametrize("accumulation", ["sum", "mean"])
def test_the_last_retain_capture_may_follow_others(fast_backend, accumulation):
    forget, retain = small()
    for rule in ("sago", NORMALIZED):
        found = []
        for in_backward in (True, False):
            params, buckets = fresh(fast_backend, forget, retain, accumulation=accumulation)
            first, last = parts(retain, 2)
            window(buckets, params, forget, [first[0], None])  # the other arrives in the last capture alone
            if in_backward:
                report = window(buckets, params, forget, last, {"rule": rule, **WEIGHTS})
            else:
                window(buckets, params, forget, last)
                report = buckets.synthesize_(rule, **WEIGHTS)
            found.append((grads(params), report))
        assert_equal_results(*found)


def test_parameters_that_the_backward_does_not_reach_or_that_are_frozen():
    """They are synthesized when the block ends: forget alone, retain of an earlier capture alone, neither."""
    f, r = (t.float() for t in inputs.pair(12))
    for made in ({}, ALONE, {"one_copy": True}):
        params, buckets = fresh(ANY, [f] * 5, [r] * 5, **made)
        if made == {"one_copy": True}:
            with buckets.forget():
                backward(params, [f, f, None, f, None])
        else:
            window(buckets, params, [f, f, None, f, None], [None, None, r, None, None])
        params[3].requires_grad_(False)
        with buckets.synthesize_in_backward("sum") as step:
            backward(params, [r, None, r if "one_copy" in made else None, None, None])
        expected, _ = sago.reference.synthesize([f, f, None, f, None], [r, None, r, None, None], "sum")
        properties.assert_equal_bits(grads(params), expected)
        assert step.report.numel.tolist() == [12, 12, 12, 12, 0]


class Look(torch.autograd.Function):
    """The identity; its backward calls a function."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.look()
        return gradient, None


@pytest.mark.parametrize("accumulate_dtype", [None, FP64], ids=str)
def test_late_layers_are_updated_before_the_backward_reaches_the_early_ones(backend, accumulate_dtype):
    model = model_of(FP32, backend.device)
    buckets = sago.GradientBuckets(model, accumulate_dtype=accumulate_dtype, backend=backend.name, **ALONE)
    first, activation, last = model
    updates, seen = [], []

    def backwards(retain_capture):
        with buckets.forget():
            losses(model)[0].backward()
        with retain_capture("pcgrad"):
            hidden = activation(first(inputs.normal(20, 5).view(4, 5).to(first.weight)))
            hidden = Look.apply(hidden, lambda: seen.append([t.clone() for t in updates]))
            (last(hidden) ** 2).mean().backward()

    backwards(lambda _: buckets.retain())
    buckets.synthesize_("pcgrad")
    expected = grads(model.parameters())
    # Where the updates will lie: the same memory in every window.
    updates += [p.grad for p in model.parameters()]
    buckets.zero_()
    for u in updates if accumulate_dtype else ():  # they are no accumulators then, which zero_ clears
        u.fill_(NAN)
    backwards(buckets.synthesize_in_backward)
    properties.assert_equal_bits(grads(model.parameters()), expected)
    properties.assert_equal_bits(seen[-1][2:], expected[2:])
    assert not any(torch.equal(u.cpu(), right) for u, right in zip(seen[-1], expected[:2], strict=False))


def ranks(count):
    patches = {"is_initialized": lambda: True, "get_world_size": lambda *_: count}
    return mock.patch.multiple("torch.distributed", **patches)


@pytest.mark.parametrize(
    ("options", "made", "says"),
    [
        ({"rule": "blur"}, {}, "`blur` needs inner products over all gradients"),
        (
            {"rule": sago.Rule("mine", normalized, "global")},
            {"groups": [1, 2]},
            "`mine` needs inner products",
        ),
        (
            {"rule": "pcgrad"},
            {"groups": ["x", "x"], **ALONE},
            "Group 'x' should lie in one buffer.*bucket_cap_mb",
        ),
        ({}, {}, "one rank, because gradients are reduced.*Found 2 ranks"),
        ({"rule": "nothing"}, {}, "`rule`"),
        ({"gamma": torch.ones(2)}, {}, "`gamma`"),
        ({"eps": -1.0}, {}, "`eps`"),
    ],
    ids=["global", "global and groups", "groups", "ranks", "rule", "weight", "eps"],
)
def test_what_would_not_be_exact_in_backward_is_refused_on_entry(options, made, says):
    """With the reason; the window goes on as if nothing had been asked."""
    params, buckets = fresh(ANY, *small(), **made)
    with pytest.raises(ValueError, match="forget gradient should be"), buckets.synthesize_in_backward():
        pytest.fail("the block was entered")
    with buckets.forget():
        backward(params, small()[0])
    with ranks(1 if options else 2), pytest.raises(ValueError, match=says):  # noqa: SIM117
        with buckets.synthesize_in_backward(**options):
            pytest.fail("the block was entered")
    assert grads(params) == [None, None]
    with ranks(1), buckets.synthesize_in_backward("sago"):  # groups over buffers are no matter to it
        backward(params, small()[1])
    properties.assert_equal_bits(grads(params), bucketed(ANY, *small(), "sago")[0])


def assert_lost(buckets, params):
    """`p.grad` is as it is outside of a capture; nothing but zero_ helps, and that does."""
    assert grads(params) == [None] * len(params)
    synthesize = buckets.synthesize_in_backward().__enter__
    for method in (synthesize, lambda: buckets.forget().__enter__()):
        with pytest.raises(ValueError, match=r"gradients of this window should be whole.*zero_"):
            method()
    buckets.zero_()
    ones = [torch.ones(p.shape, dtype=p.dtype) for p in params]
    window(buckets, params, ones, [3 * t for t in ones], {"rule": "sum"})
    assert all((p.grad == 4.0).all() for p in params)
    buckets.zero_()


def test_one_copy_has_no_retain_accumulators():
    params, buckets = fresh(ANY, *small(), one_copy=True)
    assert 2 * buckets.nbytes == fresh(ANY, *small())[1].nbytes
    assert buckets.retain_grads == [None, None]
    calls = {
        "retain": buckets.retain,
        "synthesize_": buckets.synthesize_,
        "unscale_": lambda: buckets.unscale_(torch.amp.GradScaler("cpu"), torch.optim.SGD(params, 1.0)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} should not be called with `one_copy`"):
            call()
    for given in ({"accumulate_dtype": FP32}, {"retain_decay": 0.5}):
        with pytest.raises(ValueError, match="should be None with `one_copy`"):
            sago.GradientBuckets(params, one_copy=True, **given)
    with ranks(2), pytest.raises(ValueError, match="`one_copy` should be False for Distributed"):
        sago.GradientBuckets(params, one_copy=True)


@pytest.mark.parametrize("rule", ["pcgrad", "graddrop"])
def test_one_copy_of_small_gradients_that_are_synthesized_together(rule):
    """Each has its own row of the report and its own positions. A random gate is at step 1 in window 2."""
    found = []
    for one_copy in (False, True):
        params = [nn.Parameter(torch.zeros(n)) for n in (20, 30, 2000, 40, 50)]
        buckets = sago.GradientBuckets(params, one_copy=one_copy)
        for step in range(2):
            forget, retain = (
                [inputs.normal(p.numel(), 100 * step + 10 * side + i).float() for i, p in enumerate(params)]
                for side in range(2)
            )
            if one_copy:
                report = window(buckets, params, forget, retain, {"rule": rule})
            else:
                window(buckets, params, forget, retain)
                report = buckets.synthesize_(rule)
            found.append((grads(params), report))
            buckets.zero_()
    for two, one in zip(found[:2], found[2:], strict=True):
        assert_equal_results(one, two)


def test_one_copy_beside_gradients_that_are_not_finite():
    """A NaN or an inf changes no bit of the parameters that two copies synthesize in one pack with it."""
    forget, retain = ([inputs.normal(40 + i, 10 * k + i).float() for i in range(8)] for k in (1, 2))
    forget[2][3], retain[5][0] = NAN, torch.inf
    two, one = (
        bucketed(ANY, forget, retain, "pcgrad", {"one_copy": one_copy}, one_copy)
        for one_copy in (False, True)
    )
    assert_equal_results(one, two)


def test_one_copy_of_a_group_of_several_dtypes():
    """The sums of a group are added in the order of its parameters, whatever is packed together."""
    dtypes = (FP64, FP32, FP64, FP32, FP64)
    forget, retain = ([inputs.normal(301, 10 * k + i).to(d) for i, d in enumerate(dtypes)] for k in (1, 2))
    two, one = (
        bucketed(ANY, forget, retain, "pcgrad", {"groups": [*"baaaa"], "one_copy": one_copy}, one_copy)
        for one_copy in (False, True)
    )
    assert_equal_results(one, two)


@pytest.mark.parametrize("cap", [None, 200])
def test_one_copy_of_many_equal_gradients_makes_few_pipelines(cap, monkeypatch):
    """Gradients wait for others until they have 1 % of the bytes of all, or as many bytes as the cap."""
    made = []

    class Counted(pipeline.Pipeline):
        def __init__(self, pairs, *args):
            made.append(sum(t.nbytes for t in pairs.out))
            super().__init__(pairs, *args)

    monkeypatch.setattr(pipelines, "Pipeline", Counted)
    if cap is not None:
        monkeypatch.setattr(capture_buckets, "_WAITING", cap)
    count, size = 1000, 40
    gradients = [torch.ones(size // 4)] * count
    params, buckets = fresh(ANY, gradients, gradients, one_copy=True)
    window(buckets, params, gradients, gradients, {"rule": "sago"})
    waiting = cap or count * size // 100
    assert set(made) == {waiting}
    assert len(made) == count * size // waiting


def test_one_copy_of_gradients_that_share_memory():
    """Autograd gives `p` and `q` views of one tensor. The second gradient of `p` is added to `p` alone."""
    found = []
    for one_copy in (False, True):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4,), (2, 2), (3,))]
        p, q, last = params
        buckets = sago.GradientBuckets(params, groups=["a"] * 3, one_copy=one_copy)
        with buckets.forget():
            backward(params, [torch.ones_like(t) for t in params])
        weights = torch.tensor([2.0, 3.0, 4.0, 5.0])
        with buckets.synthesize_in_backward("pcgrad"):
            (weights * (p + q.view(4))).sum().backward()
            (10 * p).sum().backward()
            last.sum().backward()
        found.append(grads(params))
    properties.assert_equal_bits(*found)


def test_a_gradient_that_another_hook_takes():
    params, buckets = fresh(ANY, *small(), one_copy=True)
    with buckets.forget():
        backward(params, small()[0])
    params[0].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def taken():
        with buckets.synthesize_in_backward("sago"):
            backward(params, small()[1])

    with pytest.raises(ValueError, match="another hook has taken it"):
        taken()


@pytest.mark.parametrize("one_copy", [False, True])
def test_a_gradient_that_is_set_by_hand_in_the_block(one_copy):
    """It would be in no update. `retain()` counts it as a gradient."""
    params, buckets = fresh(ANY, *small(), one_copy=one_copy)
    with buckets.forget():
        backward(params, small()[0])

    def set_by_hand():
        with buckets.synthesize_in_backward("sago"):
            backward(params, [small()[1][0], None])
            params[1].grad = torch.ones_like(params[1])

    with pytest.raises(ValueError, match=r"`params\[1\]\.grad` should be written by the backward alone"):
        set_by_hand()


@pytest.mark.parametrize("made", [{}, {"accumulate_dtype": FP64}, {"one_copy": True}], ids=str)
def test_a_parameter_that_is_unfrozen_in_the_block(made):
    """No hook waits for its gradient. Adapters, for example, are frozen while others are active."""
    forget, retain = small()
    params, buckets = fresh(ANY, forget, retain, **made)
    without = [None if i == 1 else r for i, r in enumerate(retain)]

    def unfreeze_within(gradients):
        buckets.zero_()
        params[1].requires_grad_(True)
        with buckets.forget():
            backward(params, forget)
        params[1].requires_grad_(False)
        with buckets.synthesize_in_backward("sago"):
            params[1].requires_grad_(True)
            backward(params, gradients)

    with pytest.raises(ValueError, match=r"`params\[1\]\.grad` .* was frozen when the block began"):
        unfreeze_within(retain)
    unfreeze_within(without)  # not reached
    expected, _ = sago.reference.synthesize(forget, without, "sago")
    properties.assert_equal_bits(grads(params), expected)


def test_on_update_is_a_function():
    params, buckets = fresh(ANY, *small(), one_copy=True)
    with buckets.forget():
        backward(params, small()[0])
    with pytest.raises(TypeError, match=r"`on_update` should be None or a function. Found int"):
        buckets.synthesize_in_backward("sago", on_update=3).__enter__()
    with buckets.synthesize_in_backward("sago") as step:  # the window goes on
        backward(params, small()[1])
    assert step.report.numel.sum() == sum(p.numel() for p in params)


def test_an_optimizer_of_other_parameters_may_step_in_on_update():
    params, buckets = fresh(ANY, *small(), one_copy=True)
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    optimizer = torch.optim.SGD([other], 0.5)
    with buckets.forget():
        backward(params, small()[0])
    with buckets.synthesize_in_backward("sago", on_update=lambda p: optimizer.step()):
        backward(params, small()[1])
    assert torch.equal(other, torch.ones(2) * (1 - 0.5 * len(params)))


def test_an_optimizer_step_in_the_block_of_one_copy():
    params, buckets = fresh(ANY, *small(), one_copy=True)
    optimizer = torch.optim.SGD(params, 0.1)
    with buckets.forget():
        backward(params, small()[0])

    def early():
        with buckets.synthesize_in_backward("sago"):
            backward(params, small()[1])
            optimizer.step()

    with pytest.raises(ValueError, match=r"optimizer.step\(\) should come after"):
        early()


class Mixed(nn.Module):
    """Tied weights, checkpointed layers, a frozen layer, and parameters that one loss or neither reaches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.scales = nn.ParameterDict({side: torch.ones(6) for side in ("forget", "retain", "neither")})

    def forward(self, tokens, side):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(checkpoint(layer, hidden, use_reentrant=False))
        return nn.functional.linear(self.frozen(hidden) * self.scales[side], self.embed.weight)


def trained(model, run, optimizer_of, rule, one_copy, how):
    """The parameters and the sums after three steps of `run`, which may be the compiled model."""
    params = [p for p in model.parameters() if p.requires_grad]
    buckets = sago.GradientBuckets(model, one_copy=one_copy)
    optimizer, sums = optimizer_of(params), []
    each = {p: optimizer_of([p]) for p in params}
    for step in range(3):
        tokens = torch.arange(step, step + 8) ** 2 % 7
        with buckets.forget():
            (-run(tokens, "forget").square().mean()).backward()
        options = {"on_update": lambda p: each[p].step()} if how == "on_update" else {}
        with buckets.synthesize_in_backward(rule, **options) if how else buckets.retain() as block:
            run(tokens.flip(0), "retain").logsumexp(-1).mean().backward()
        report = block.report if how else buckets.synthesize_(rule)
        for name, p in model.named_parameters():
            used = how == "on_update" or "neither" in name or "frozen" in name
            assert (p.grad is None) is used
        if how != "on_update":
            optimizer.step()
        buckets.zero_()
        sums += [report.ff, report.fr, report.rr, report.uu]
    return [*(p.detach().clone() for p in params), *sums]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_way_of_a_step_has_the_bits_of_two_copies(compiled):
    """An optimizer may step in the backward, too. A tied weight has one gradient, a checkpointed one, too."""
    torch.manual_seed(0)
    model = Mixed()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    start = {name: t.clone() for name, t in model.state_dict().items()}
    optimizers = {
        "sago": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        "pcgrad": lambda params: torch.optim.AdamW(params, 0.01, foreach=False),
    }
    for rule, optimizer_of in optimizers.items():
        found = []
        for one_copy, how in (
            (False, ""),
            (False, "after"),
            (True, "after"),
            (False, "on_update"),
            (True, "on_update"),
        ):
            model.load_state_dict(start)
            found.append(trained(model, run, optimizer_of, rule, one_copy, how))
        assert not torch.equal(found[0][0], start["embed.weight"])
        for other in found[1:]:
            properties.assert_equal_bits(other, found[0])


@pytest.mark.parametrize("one_copy", [False, True])
def test_an_optimizer_in_on_update_steps_on_one_parameter(one_copy):
    """The gradients of others may not be complete. After an error the window is lost."""
    params, buckets = fresh(ANY, *small(), one_copy=one_copy, **ALONE)
    optimizer, calls = torch.optim.SGD(params, 0.1), []

    def stepped(on_update):
        with buckets.forget():
            backward(params, small()[0])
        with buckets.synthesize_in_backward("sago", on_update=on_update):
            backward(params, small()[1])

    def step(p):
        calls.append((p is params[0], [q.grad is not None for q in params], torch.is_grad_enabled()))
        optimizer.step()

    if one_copy:  # where other parameters have no `p.grad`
        stepped(step)
        assert sorted(calls) == [(False, [False, True], False), (True, [True, False], False)]
    else:
        with pytest.raises(ValueError, match=r"in `on_update` should hold no other captured parameter"):
            stepped(step)
        assert_lost(buckets, params)
    buckets._engine = object()
    with pytest.raises(ValueError, match=r"`on_update` should be None with DeepSpeed"):
        stepped(step)


@pytest.mark.parametrize(
    "made", [{}, ALONE, {"one_copy": True}], ids=["one buffer", "one a tensor", "one copy"]
)
def test_a_second_backward_is_refused(made):
    forget, retain = small()
    params, buckets = fresh(ANY, forget, retain, **made)
    with buckets.forget():
        backward(params, forget)

    def twice():
        with buckets.synthesize_in_backward("sago"):
            backward(params, retain)
            backward(params, retain)

    with pytest.raises(ValueError, match=r"arrive once.*`params\[[01]\]` after its update was written"):
        twice()
    assert_lost(buckets, params)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gradient_that_arrives_twice_because_of_a_checkpoint(reentrant):
    """Reentrant: a backward in the backward brings part of a shared parameter's gradient of its own."""
    weight, x = (inputs.normal(9, i).view(3, 3).requires_grad_() for i in (1, 2))
    buckets = sago.GradientBuckets([weight])

    def layer(h):
        return torch.tanh(h @ weight)

    def backwards(retain_capture):
        for capture, sign in ((lambda _: buckets.forget(), -1.0), (retain_capture, 0.5)):
            with capture("sum"):
                (sign * layer(checkpoint(layer, x, use_reentrant=reentrant)) ** 3).sum().backward()

    backwards(lambda _: buckets.retain())
    buckets.synthesize_("sum")
    expected = grads([weight])
    buckets.zero_()
    if reentrant:
        with pytest.raises(ValueError, match=r"arrive once.*reentrant checkpointing"):
            backwards(buckets.synthesize_in_backward)
        assert_lost(buckets, [weight])
    else:
        backwards(buckets.synthesize_in_backward)
        properties.assert_equal_bits(grads([weight]), expected)


def test_an_exception_before_the_backward_loses_nothing():
    """Be it because there is none, or because of a capture within."""
    forget, retain = small()
    params, buckets = fresh(ANY, forget, retain)
    with buckets.forget():
        backward(params, forget)
    with pytest.raises(KeyError), buckets.synthesize_in_backward("sago"):
        raise KeyError
    with pytest.raises(ValueError, match="should have a backward"), buckets.synthesize_in_backward("sago"):
        pass
    for capture in (buckets.forget, buckets.retain):
        with pytest.raises(ValueError, match="no capture within"), buckets.synthesize_in_backward("sago"):
            capture().__enter__()
    assert grads(params) == [None, None]
    with buckets.synthesize_in_backward("sago"):
        backward(params, retain)
    properties.assert_equal_bits(grads(params), bucketed(ANY, forget, retain, "sago")[0])


@pytest.mark.parametrize("made", [{}, ALONE, {"accumulate_dtype": FP64}, {"one_copy": True}], ids=str)
def test_an_exception_in_or_after_the_backward_loses_the_window(made):
    model = model_of(FP32, "cpu")
    buckets = sago.GradientBuckets(model, **made)
    first, activation, last = model

    def fail():
        raise KeyError("within")

    def backwards(late):
        with buckets.forget():
            losses(model)[0].backward()
        with buckets.synthesize_in_backward("sago"):
            hidden = activation(first(torch.ones(1, 5)))
            last(hidden if late else Look.apply(hidden, fail)).sum().backward()
            fail()

    for late in (False, True):
        with pytest.raises(KeyError, match="within"):
            backwards(late)
        assert_lost(buckets, list(model.parameters()))
