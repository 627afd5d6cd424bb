"""`GradientBuckets` where something around it is unusual: ranks, names, interruptions, default devices."""

import copy
import gc
import io
import pickle
import weakref
from contextlib import suppress
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sago
from sago.backends import compiled, packs
from sago.capture import others
from tests.support.backends import RULES
from tests.support.properties import assert_equal_bits
from tests.support.windows import ANY, BF16, FP32, backward, fresh, losses, model_of, window


def leaves(*sizes, dtype=FP32):
    return [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]


def test_accumulators_in_another_dtype_are_refused_where_an_unknown_engine_may_reduce_later():
    """The hook takes the gradient away before the engine sees it, and ranks would train on their own."""
    params = leaves(3, dtype=BF16)
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
    ):
        buckets = sago.GradientBuckets(params)
        window(buckets, params, [torch.ones(3, dtype=BF16)], [torch.ones(3, dtype=BF16)])
        buckets.synthesize_()
        with pytest.raises(ValueError, match=r"accumulate_dtype.*Found 2 ranks"):
            sago.GradientBuckets(params, accumulate_dtype=FP32)


def test_parameters_of_one_name_are_groups_of_their_own():
    """RMU trains the same matrix of several layers."""
    layers = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    named = [pair for layer in layers for pair in layer.named_parameters()]
    forget = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 1.0]])]
    retain = [torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, -1.0]])]
    buckets = sago.GradientBuckets([("head", torch.nn.Parameter(torch.ones(1))), *named])
    window(buckets, [p for _, p in named], forget, retain)
    report = buckets.synthesize_("pcgrad")
    assert report.groups == ("head", "weight (1)", "weight (2)")
    expected, _ = sago.reference.synthesize(forget, retain, "pcgrad")
    assert_equal_bits([p.grad for _, p in named], expected)  # k is -1/2 and -1/4


def test_a_synthesis_that_was_interrupted_cannot_be_repeated():
    """Part of the retain gradient is the update by then."""
    size = packs.SMALL  # smaller ones are updated together
    params, buckets = fresh(ANY, *[leaves(size, size, size)] * 2, bucket_cap_mb=1e-6)
    gradients = [torch.full((size,), 2.0)] * 3
    update, calls = compiled._update, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(*args, **options)

    window(buckets, params, gradients, gradients)
    with mock.patch.object(compiled, "_update", interrupted), pytest.raises(KeyboardInterrupt):
        buckets.synthesize_("sum", stats=False)
    with pytest.raises(ValueError, match=r"should be whole.*KeyboardInterrupt.*zero_"):
        buckets.synthesize_("sum")
    buckets.zero_()
    window(buckets, params, gradients, gradients)
    buckets.synthesize_("sum")
    assert all((p.grad == 4.0).all() for p in params)


def test_a_reduction_that_fails_can_be_repeated():
    """It comes ahead of everything that is written."""
    params, buckets = fresh(ANY, *[leaves(3)] * 2)
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    with pytest.raises(OSError, match="lost"):
        buckets.synthesize_("pcgrad", reduce_gram=mock.Mock(side_effect=OSError("lost")))
    buckets.synthesize_("pcgrad", reduce_gram=lambda table: table)
    assert (params[0].grad == 5.0).all()


def test_dropped_captures_are_neither_a_gradient_nor_part_of_a_mean():
    (p,) = params = leaves(3)
    optimizer = torch.optim.SGD(params)
    buckets = sago.GradientBuckets(params, accumulation="mean")
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    with pytest.raises(ValueError, match="should have a backward"), buckets.forget():
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="forget gradient should be captured"):
        buckets.synthesize_("sum")
    for value in (1.0, 2.0, 5.0):
        with buckets.forget():
            optimizer.zero_grad()
            backward(params, [torch.full((3,), value)])
    buckets.synthesize_("sum")
    assert (p.grad == 5.0 + 3.0).all()


def test_a_zero_grad_behind_the_backward_drops_no_update_that_was_written_in_it():
    params, buckets = fresh(ANY, *[leaves(3)] * 2)
    with buckets.forget():
        backward(params, [torch.full((3,), 2.0)])
    with buckets.synthesize_in_backward("sum"):
        backward(params, [torch.full((3,), 3.0)])
        torch.optim.SGD(params).zero_grad()
    assert (params[0].grad == 5.0).all()


def test_sparse_gradients_are_refused_in_whatever_capture_they_come_first():
    table, other = torch.nn.Embedding(4, 2, sparse=True), leaves(2)[0]
    buckets = sago.GradientBuckets([("table", table.weight), ("other", other)])
    with buckets.forget():
        other.sum().backward()
    with pytest.raises(TypeError, match="`table` should be dense"), buckets.forget():
        table(torch.tensor([1])).sum().backward()


def test_buckets_that_are_made_in_inference_mode():
    params = leaves(3)
    with torch.inference_mode():
        buckets = sago.GradientBuckets(params)
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    buckets.synthesize_("sum")
    assert (params[0].grad == 5.0).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_default_device_that_is_not_that_of_the_gradients(rule):
    params, gradients = leaves(3, 4), [torch.full((n,), 2.0) for n in (3, 4)]
    with torch.device("meta"):  # as set_default_device, which in torch 2.6 does not restore the state
        buckets = sago.GradientBuckets(params)
        window(buckets, params, gradients, [gradients[0], None])
        report = buckets.synthesize_(rule, max_norm=1.0, reduce_gram=lambda table: table)
        assert report.summary()["norm_forget"] == 28**0.5
    assert all(p.grad.isfinite().all() for p in params)


def body_and_head():
    return torch.nn.ModuleDict({"body": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 2)})


def loss_of(model):
    return model["head"](model["body"](torch.ones(2, 3))).sum()


@pytest.mark.parametrize("given", ["list", "submodule"])
@pytest.mark.parametrize("before", [None, 2.0])
def test_a_trained_parameter_that_was_not_given_is_an_error_where_a_backward_reaches_it(given, before):
    """Its gradient would be the sum of both sides, in every window more of it."""
    model = body_and_head()
    params, others = list(model["head"].parameters()), list(model["body"].parameters())
    buckets = sago.GradientBuckets(model["head"] if given == "submodule" else params)
    own = [None if before is None else torch.full_like(p, before) for p in others]
    for p, g in zip(others, own, strict=True):
        p.grad = g

    def run(side):
        with getattr(buckets, side)():
            loss_of(model).backward()

    def assert_kept():
        assert all(p.grad is g for p, g in zip(others, own, strict=True))
        assert all(g is None or (g == before).all() for g in own)

    for side in ("forget", "retain"):
        with buckets.forget():
            sum(p.sum() for p in params).backward()  # does not reach the others
        with pytest.raises(ValueError, match=rf"`body\.(weight|bias)` should be given.*{side}\(\) reaches"):
            run(side)
        assert_kept()
        with pytest.raises(ValueError, match=r"should be whole.*`body\.(weight|bias)`.*do not have"):
            buckets.synthesize_()
        buckets.zero_()
    model["body"].requires_grad_(False)
    buckets = sago.GradientBuckets(params)
    run("forget")
    run("retain")
    buckets.synthesize_("sum")
    assert_kept()
    assert (params[1].grad == 4.0).all()
    buckets.zero_()
    model["body"].requires_grad_()  # later, and reached in a capture within another
    with pytest.raises(ValueError, match="should be given"), buckets.forget():
        run("retain")
    assert_kept()


def test_a_gradient_of_a_parameter_that_was_not_given_goes_with_a_capture_that_fails():
    model = body_and_head()
    buckets = sago.GradientBuckets(model["head"].parameters())
    with suppress(ZeroDivisionError), buckets.forget():
        loss_of(model).backward()
        raise ZeroDivisionError
    assert model["body"].weight.grad is None


MADE_BEFORE = torch.nn.Linear(4, 4)
ADDITIONS = {
    "module": lambda head: head.add_module("adapter", torch.nn.Linear(4, 4)),
    "attribute": lambda head: setattr(head, "adapter", torch.nn.Linear(4, 4)),
    "module made before": lambda head: setattr(head, "adapter", copy.deepcopy(MADE_BEFORE)),
    "parameter": lambda head: setattr(head, "scale", torch.nn.Parameter(torch.ones(4))),
}


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(getattr(self, "adapter", torch.nn.Identity())(x) * getattr(self, "scale", 1.0))


@pytest.mark.parametrize("inside", ["between windows", "between the sides"])
@pytest.mark.parametrize("added", ADDITIONS)
def test_a_parameter_that_is_added_after_the_first_capture_is_noticed(added, inside):
    """Adapters are added in this way. The buckets were made from a list, so they do not know the module."""
    head, x = Head(), torch.ones(1, 4)
    buckets = sago.GradientBuckets(head.parameters())
    with buckets.forget():
        head(x).sum().backward()
    if inside == "between windows":
        with buckets.retain():
            head(x).sum().backward()
        buckets.synthesize_()
        buckets.zero_()
    ADDITIONS[added](head)
    side = "forget" if inside == "between windows" else "retain"
    found = r"`scale`" if added == "parameter" else r"`adapter\.(weight|bias)`"
    error = pytest.raises(ValueError, match=rf"{found} should be given.*{side}\(\) reaches")
    with error, getattr(buckets, side)():
        head(x).sum().backward()
    assert all(p.grad is None for p in head.parameters())


def test_live_modules_are_searched_again_only_after_something_was_added(monkeypatch):
    """Decoders of transformers slice their list of layers in each forward, which makes a module."""
    layers, x = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)), torch.ones(1, 4)
    buckets = sago.GradientBuckets(layers.parameters())
    searches = []
    monkeypatch.setattr(others, "_beside", lambda *args: searches.append(args) or [])
    counts, added = [], []
    for step in range(6):
        if step in (2, 5):
            added.append(torch.nn.Sequential(torch.nn.Linear(1, 1)))  # it does not matter where
        added.append(torch.nn.Sequential(torch.nn.ReLU()))  # no parameters
        for side in (buckets.forget, buckets.retain):
            with side():
                torch.nn.Sequential(*layers[:3])(x).sum().backward()
        buckets.synthesize_()
        buckets.zero_()
        counts.append(len(searches))
    assert counts == [1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("search", ["sago.capture.others._beside", "sago.ranks.ddp.check_not_wrapped"])
@pytest.mark.parametrize("interrupted", [True, False])
def test_a_search_that_was_interrupted_or_missed_something_is_repeated(search, interrupted):
    (p,) = params = leaves(3)
    buckets = sago.GradientBuckets(params)

    def first(*args):
        if interrupted:
            raise KeyboardInterrupt
        added.append(torch.nn.Linear(1, 1))  # another thread registers parameters during the search
        return []

    added = []
    with mock.patch(search, side_effect=first) as searched:
        with suppress(KeyboardInterrupt), buckets.forget():
            p.sum().backward()
        searched.side_effect = lambda *args: []
        for _ in range(2):
            with buckets.forget():
                p.sum().backward()
    assert searched.call_count == 2


def test_a_compiled_forward_that_registers_a_module_is_compiled_once():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x):
            return torch.nn.Sequential(self.linear)(x)

    net, x = Net(), torch.ones(2, 3)
    buckets = sago.GradientBuckets(net.parameters())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for _ in range(3):
        with buckets.forget():
            compiled(x).sum().backward()
        torch.nn.Linear(1, 1)
    assert counter.frame_count == 1


def test_the_hooks_on_registrations_live_until_the_next_buckets():
    hooks = modules._global_parameter_registration_hooks, modules._global_module_registration_hooks
    gc.collect()
    params = leaves(3)
    buckets = sago.GradientBuckets(params)
    with buckets.forget():
        backward(params, [torch.ones(3)])
    before = [len(x) for x in hooks]
    numbers = buckets._registrations
    del buckets
    gc.collect()
    torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert numbers._count == 0
    sago.GradientBuckets(leaves(3))
    assert [len(x) for x in hooks] == before


def test_buckets_may_be_collected_while_an_optimizer_steps():
    """torch iterates over the hooks then."""
    params = leaves(3)
    buckets = sago.GradientBuckets(params)
    with buckets.forget():
        backward(params, [torch.ones(3)])
    cycle = [buckets]
    cycle.append(cycle)
    del buckets, cycle
    found = [lambda *_: gc.collect() and None, lambda *_: None]
    handles = [register_optimizer_step_pre_hook(hook) for hook in found]
    try:
        torch.optim.SGD(leaves(2), lr=0.1).step()
    finally:
        for handle in handles:
            handle.remove()


def test_buckets_may_be_collected_while_a_module_is_registered():
    cycle = [sago.GradientBuckets(leaves(3))]
    cycle.append(cycle)
    del cycle
    found = [lambda *_: gc.collect() and None, lambda *_: None]
    handles = [modules.register_module_module_registration_hook(hook) for hook in found]
    try:
        torch.nn.Sequential(torch.nn.Linear(1, 1))
    finally:
        for handle in handles:
            handle.remove()


def test_modules_may_be_collected_while_the_last_registration_is_looked_up():
    buckets, thresholds = sago.GradientBuckets(leaves(3)), gc.get_threshold()
    gc.disable()
    added = torch.nn.Linear(1, 1)
    added.cycle = [added]
    del added
    try:
        gc.set_threshold(1)
        gc.enable()
        buckets._registrations.latest()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def test_modules_whose_init_has_not_run_are_passed_over():
    model, raw = body_and_head().requires_grad_(False), torch.nn.Linear.__new__(torch.nn.Linear)
    buckets = sago.GradientBuckets(list(model["head"].requires_grad_().parameters()))
    with buckets.forget():
        loss_of(model).backward()
    assert isinstance(raw, torch.nn.Module)


class Wrapper(torch.Tensor):
    """A tensor around another one, as those of quantised weights are."""

    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        found = func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return cls(found) if func is torch.ops.aten.detach.default else found


def test_parameters_that_wrap_other_tensors_are_refused():
    p = torch.nn.Parameter(Wrapper(torch.ones(3)))
    assert type(p) is Wrapper
    with pytest.raises(TypeError, match=r"`w` should be a plain tensor or a DTensor of one\. Found Wrapper"):
        sago.GradientBuckets([("w", p), ("v", torch.nn.Parameter(torch.ones(3)))])
    sago.GradientBuckets(leaves(0, 3))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, saved])
def test_buckets_are_not_copied(copied):
    """By EMA and SWA, for example, which copy a module with all that is in it."""
    model = model_of(FP32, "cpu")
    model.buckets = sago.GradientBuckets(model)
    for thing in (model.buckets,) if copied is copy.copy else (model.buckets, model):
        with pytest.raises(TypeError, match=r"beside the module, not inside of it"):
            copied(thing)


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float64])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_model_can_be_copied_at_any_time(copied, accumulate_dtype):
    def run(model, look=lambda: None):
        buckets = sago.GradientBuckets(model, accumulate_dtype=accumulate_dtype)
        look()
        for capture, loss in zip((buckets.forget, buckets.retain), losses(model), strict=True):
            with capture():
                loss.backward()
                look()
            look()
        buckets.synthesize_()
        look()
        return [p.grad for p in model.parameters()]

    model, copies = model_of(FP32, "cpu"), []
    update = [g.clone() for g in run(model, lambda: copies.append(copied(model)))]
    assert len(copies) == 6
    for other in copies:
        for p in other.parameters():
            assert p.grad is None
            assert not p._backward_hooks
            assert not p._post_accumulate_grad_hooks
        assert all(torch.equal(g, u) for g, u in zip(run(other), update, strict=True))
    assert all(torch.equal(p.grad, u) for p, u in zip(model.parameters(), update, strict=True))


def test_a_step_ahead_of_the_synthesis_is_warned_of_once():
    params = leaves(3, 4)
    buckets, gradients = sago.GradientBuckets(params), [torch.ones(3), torch.ones(4)]
    step = torch.optim.SGD(params[1:], lr=1.0).step
    step()  # no window, and any warning is an error here
    window(buckets, params, gradients, gradients)
    torch.optim.SGD(leaves(2), lr=1.0).step()  # of other parameters
    buckets.synthesize_("sum")
    step()
    buckets.zero_()
    with buckets.forget():
        backward(params, gradients)
    buckets.zero_()  # drops the window on purpose
    step()
    with buckets.forget():
        backward(params, gradients)
    with pytest.warns(RuntimeWarning, match="should come after synthesize_") as seen:
        step()
    assert seen[0].filename == __file__
    step()
    buckets.zero_()
    window(buckets, params, gradients, gradients)
    step()


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_step_within_a_capture_is_refused(side):
    """`p.grad` is the gradient of that side alone there."""
    params = leaves(3)
    buckets = sago.GradientBuckets(params)
    with buckets.forget():
        backward(params, [torch.ones(3)])

    def step_within():
        with getattr(buckets, side)():
            backward(params, [torch.ones(3)])
            torch.optim.SGD(leaves(2), lr=1.0).step()  # of other parameters
            torch.optim.SGD(params, lr=1.0).step()

    with pytest.raises(ValueError, match=rf"should come after synthesize_.*within {side}\(\)"):
        step_within()
    assert torch.equal(params[0], torch.ones(3))
    with pytest.raises(ValueError, match=r"should be whole.*zero_"):
        buckets.synthesize_()


@pytest.mark.parametrize("order", [("head", "body"), ("body", "head")])
def test_two_buckets_capture_two_halves_of_a_module(order):
    """One backward reaches both, and each has the gradients of its half."""
    model = body_and_head()
    halves = [sago.GradientBuckets(model[name]) for name in order]
    expected = {}
    for side, sign in (("forget", -1.0), ("retain", 2.0)):
        with getattr(halves[0], side)(), getattr(halves[1], side)():
            (sign * loss_of(model)).backward()
        grads = torch.autograd.grad(sign * loss_of(model), list(model.parameters()))
        expected[side] = dict(zip(model.parameters(), grads, strict=True))
    for buckets, name in zip(halves, order, strict=True):
        for side, found in (("forget", buckets.forget_grads), ("retain", buckets.retain_grads)):
            assert_equal_bits(found, [expected[side][p] for p in model[name].parameters()])
        buckets.synthesize_("sum")
        for p in model[name].parameters():
            assert torch.equal(p.grad, expected["forget"][p] + expected["retain"][p])


def test_the_hook_on_optimizers_is_there_in_windows_only_and_keeps_nothing_alive():
    hooks = optimizers._global_optimizer_pre_hooks
    gc.collect()  # windows of other tests may be open
    before, params, gradients = len(hooks), leaves(3), [torch.ones(3)]
    buckets = sago.GradientBuckets(params)
    for end in (lambda b: b.synthesize_(), lambda b: b.zero_()):
        window(buckets, params, gradients, gradients)
        assert len(hooks) == before + 1
        end(buckets)
        assert len(hooks) == before
        buckets.zero_()
    window(buckets, params, gradients, gradients)
    refs = [weakref.ref(buckets), *map(weakref.ref, params)]
    del buckets, params
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    params = leaves(3)
    buckets = sago.GradientBuckets(params)
    window(buckets, params, gradients, gradients)  # which removes the hook of the deleted buckets
    assert len(hooks) == before + 1
    buckets.zero_()
    assert len(hooks) == before
