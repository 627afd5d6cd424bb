"""`GradientBuckets` in training loops, what its captures cost, and every way to use it wrongly.

What random schedules accumulate is in test_buckets_fuzz. The gradients here are known beforehand:
`(p * g).sum().backward()` gives `p` the gradient `g`.
"""

import copy
import ctypes
import gc
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sago
from sago.compiled import has_compiler
from tests.backends import DTYPES, ELEMENTWISE, RULES
from tests.conftest import needs_interpreter, needs_triton
from tests.properties import assert_equal_bits

BF16, FP16, FP32, FP64 = DTYPES
SIDES = ("forget", "retain")
FORMS = {"in place": (FP32, None), "in fp32": (BF16, FP32)}  # parameters, accumulators


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # A second one has nothing to do here but to be waited for, for long where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def added(total, grads):
    """In the order in which autograd adds."""
    return [t if g is None else g if t is None else t + g for t, g in zip(total, grads, strict=True)]


class Window:
    """Buckets over two parameters, and what their accumulators should hold."""

    def __init__(self, dtype=FP32, accumulate_dtype=None, **options):
        self.params = {n: nn.Parameter(torch.ones(k, dtype=dtype)) for n, k in (("w", 3), ("v", 5))}
        self.wide = accumulate_dtype or dtype
        self.buckets = sago.GradientBuckets(self.params.items(), accumulate_dtype=accumulate_dtype, **options)
        self.start_anew()

    def zero_(self):
        self.buckets.zero_()
        self.start_anew()

    def start_anew(self):
        self.totals = {side: [None] * len(self.params) for side in SIDES}

    def open(self, side):
        return getattr(self.buckets, side)()

    def enter(self, side):
        with self.open(side):
            pytest.fail("entered")

    def entries(self):
        """Calls that enter a capture."""
        return [lambda s=side: self.enter(s) for side in SIDES]

    def loss(self, **gradients):
        return sum((self.params[name] * g).sum() for name, g in gradients.items())

    def backward(self, side, **gradients):
        """Within a capture."""
        self.loss(**gradients).backward()
        grads = [gradients.get(name) for name in self.params]
        grads = [
            None if g is None else torch.full_like(p, g, dtype=self.wide, requires_grad=False)
            for g, p in zip(grads, self.params.values(), strict=True)
        ]
        self.totals[side] = added(self.totals[side], grads)

    def capture(self, side, **gradients):
        with self.open(side):
            self.backward(side, **gradients)

    def fail(self, error, side, **gradients):
        with self.open(side):
            if gradients:
                self.loss(**gradients).backward()
            raise error

    def grads(self):
        return [p.grad for p in self.params.values()]

    def check(self):
        """Between captures."""
        for side in SIDES:
            assert_equal_bits(getattr(self.buckets, f"{side}_grads"), self.totals[side])
        assert self.grads() == [None, None]
        for p in self.params.values():
            assert not p._backward_hooks
            assert not p._post_accumulate_grad_hooks

    def finish(self):
        """Goes on with the window: nothing of it has been lost."""
        self.check()
        self.capture("forget", w=-3.0, v=2.0)
        self.capture("retain", v=-1.0)
        self.check()
        self.buckets.synthesize_("sum", gamma=2.0)
        for p, f, r in zip(self.params.values(), *(self.totals[side] for side in SIDES), strict=True):
            assert_equal_bits([p.grad], [(2 * f if r is None else 2 * f + r).to(p.dtype)])
        self.zero_()
        self.check()


@pytest.fixture(params=FORMS)
def window(request):
    return Window(*FORMS[request.param])


@contextmanager
def refused(buckets, says, error=ValueError):
    """The block raises, and changes neither accumulator."""
    before = [None if g is None else g.clone() for g in (*buckets.forget_grads, *buckets.retain_grads)]
    with pytest.raises(error, match=f"(?s){says}") as caught:
        yield
    assert caught.type is error
    assert_equal_bits([*buckets.forget_grads, *buckets.retain_grads], before)


# What is accumulated and written.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_keep_their_signs(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)
    buckets = sago.GradientBuckets([p])
    for _ in range(2):
        with buckets.forget():
            p.backward(zeros)
        with buckets.retain():
            p.backward(-zeros)
        assert_equal_bits([*buckets.forget_grads, *buckets.retain_grads], [zeros, -zeros])
        buckets.zero_()


@pytest.mark.parametrize("options", [{}, {"accumulate_dtype": FP64}, {"bucket_cap_mb": 1e-6}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulators_are_aligned_and_laid_out_like_their_parameters(dtype, options):
    tensors = [
        torch.randn(()),
        torch.randn(3, 7).t(),
        torch.randn(0, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1),
        torch.randn(5, 4, 3).permute(1, 2, 0),
        torch.randn(33),
    ]
    params = [nn.Parameter(t.to(dtype)) for t in tensors]
    buckets = sago.GradientBuckets(params, **options)
    losses = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    for side, gradients in zip(SIDES, losses, strict=True):
        with getattr(buckets, side)():
            torch.autograd.backward(params, gradients)
    for side, gradients in zip(SIDES, losses, strict=True):
        found = getattr(buckets, f"{side}_grads")
        assert_equal_bits([g.to(dtype) for g in found], gradients)
        for g, p in zip(found, params, strict=True):
            assert g.stride() == p.stride()
            assert g.data_ptr() % 16 == 0
    buckets.synthesize_("sago", alpha=2.0)
    expected, _ = sago.reference.synthesize(*losses, "sago", alpha=2.0)
    assert_equal_bits([p.grad for p in params], expected)
    assert [p.grad.stride() for p in params] == [p.stride() for p in params]


def test_accumulation_in_fp32_loses_nothing_that_bf16_would():
    steps = [1.0, *[2.0**-9] * 64]
    found = {}
    for accumulate_dtype in (None, FP32):
        p = nn.Parameter(torch.ones(2, dtype=BF16))
        buckets = sago.GradientBuckets([p], accumulate_dtype=accumulate_dtype)
        for side in SIDES:
            with getattr(buckets, side)():
                for step in steps:
                    (p * step).sum().backward()
        buckets.synthesize_("sum", alpha=0.0)
        found[accumulate_dtype] = p.grad[0].item()
    assert found == {None: 1.0, FP32: 1.125}


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_is_over_the_captures_that_had_a_backward(form):
    window = Window(*FORMS[form], accumulation="mean")
    window.capture("forget", w=4.0)
    with window.open("forget"):
        window.backward("forget", w=1.0)
        window.backward("forget", w=1.0)  # two backwards, one capture
    with window.open("retain"):  # a frame for others, with no backward of its own
        window.capture("retain", w=-5.0)
        window.capture("retain", w=1.0)
    window.check()
    window.buckets.synthesize_("sum")
    assert torch.equal(
        window.params["w"].grad, torch.full_like(window.params["w"], (4 + 2) / 2 + (-5 + 1) / 2)
    )
    assert window.params["v"].grad is None


def test_a_capture_within_one_of_the_other_side(window):
    with window.open("forget"):
        window.backward("forget", w=1.0)
        with window.open("retain"):
            window.backward("retain", w=2.0, v=4.0)
            with window.open("forget"):
                window.backward("forget", w=8.0)
            window.backward("retain", w=16.0)
        window.backward("forget", v=32.0)
    window.finish()


def test_a_forward_that_both_sides_share(window):
    x = window.params["w"] * 2
    with window.open("forget"):
        x.sum().backward(retain_graph=True)
    with window.open("retain"):
        (-x).sum().backward(retain_graph=True)
    (f, _), (r, _) = window.buckets.forget_grads, window.buckets.retain_grads
    assert_equal_bits([f, r], [torch.full_like(f, 2.0), torch.full_like(r, -2.0)])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_create_graph(window):
    w = window.params["w"]
    for _ in range(2):
        for side, sign in zip(SIDES, (1, -1), strict=True):
            with window.open(side):
                (sign * w * w).sum().backward(create_graph=True)
                (sign * w * w * w).sum().backward()
    for side, sign in zip(SIDES, (1, -1), strict=True):
        g = getattr(window.buckets, f"{side}_grads")[0]
        assert_equal_bits([g], [torch.full_like(w, sign * 10.0, dtype=window.wide, requires_grad=False)])
        assert not g.requires_grad
    window.buckets.synthesize_()
    assert not w.grad.requires_grad


# Loops, optimizers and models of other people.


class Tied(nn.Module):
    """A language model of tied embeddings with a layer that is frozen and one that is not used."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant  # None: no checkpoints
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(6, 6)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(2):
            x = (
                self.body(x)
                if self.reentrant is None
                else checkpoint(self.body, x, use_reentrant=self.reentrant)
            )
        logits = self.norm(self.frozen(x)) @ self.embed.weight.t()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Lora(nn.Module):
    """240 tiny tensors over a frozen base. One of each pair starts at zero, as in LoRA."""

    def __init__(self, depth=120, width=6, rank=2):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.base = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.requires_grad_(False)
        self.a = nn.ParameterList(torch.randn(rank, width) for _ in range(depth))
        self.b = nn.ParameterList(torch.zeros(width, rank) for _ in range(depth))

    def forward(self, tokens):
        x = self.embed(tokens)
        for base, a, b in zip(self.base, self.a, self.b, strict=True):
            x = x + 0.1 * torch.tanh(base(x) + x @ a.t() @ b.t())
        logits = x @ self.embed.weight.t()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.inner = transformers.LlamaForCausalLM(config)

    def forward(self, tokens):
        return self.inner(input_ids=tokens, labels=tokens).loss


class RawSGD(torch.optim.Optimizer):
    """Reads gradients by their addresses, as the kernels of bitsandbytes do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert p.is_contiguous()
                assert p.grad.is_contiguous()
                assert p.grad.data_ptr() % 16 == 0
                weights, gradient = (
                    np.ctypeslib.as_array((ctypes.c_float * p.numel()).from_address(t.data_ptr()))
                    for t in (p, p.grad)
                )
                weights -= np.float32(group["lr"]) * gradient


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw, loop": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "raw": lambda p: RawSGD(p, 0.1),
}
MODELS = {
    "tied": Tied,
    "checkpointed": lambda: Tied(False),
    "checkpointed, reentrant": lambda: Tied(True),
    "lora": Lora,
    "llama": Llama,
}


def separate(model, params, batches):
    """The gradient of a side, apart from everything else."""
    if isinstance(model, Tied) and model.reentrant:  # autograd.grad cannot
        for sign, x in batches:
            (sign * model(x)).backward()
        grads = [p.grad for p in params]
        model.zero_grad()
        return grads
    total = [None] * len(params)
    for sign, x in batches:
        total = added(total, torch.autograd.grad(sign * model(x), params, allow_unused=True))
    return total


def train(model, optimizer, rule, buckets=None):
    """Gradient ascent on forget. Where there are no buckets, by hand with the reference."""
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        tokens = torch.randint(11, (2, 2, 2, 6), generator=generator)  # side, micro-batch, batch, length
        sides = [[(sign, x) for x in t] for sign, t in zip((-1, 1), tokens, strict=True)]
        if buckets is None:
            grads = [separate(model, params, batches) for batches in sides]
            for p, u in zip(params, sago.reference.synthesize(*grads, rule)[0], strict=True):
                p.grad = u
        else:
            for side, batches in zip(SIDES, sides, strict=True):
                for sign, x in batches:
                    with getattr(buckets, side)():
                        (sign * model(x)).backward()
            buckets.synthesize_(rule)
        optimizer.step()
        model.zero_grad() if buckets is None else buckets.zero_()
    return [p.detach().clone() for p in model.parameters()]


def twins(make):
    torch.manual_seed(0)
    model = make()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [*((m, "adamw, fused") for m in MODELS), *(("tied", o) for o in OPTIMIZERS if o != "adamw, fused")],
)
def test_training_by_buckets_is_training_by_hand(model, optimizer):
    by_buckets, by_hand = twins(MODELS[model])
    start = [p.detach().clone() for p in by_hand.parameters()]
    expected = train(by_hand, OPTIMIZERS[optimizer](by_hand.parameters()), "sago")
    buckets = sago.GradientBuckets(by_buckets, bucket_cap_mb=1e-3)
    found = train(by_buckets, OPTIMIZERS[optimizer](by_buckets.parameters()), "sago", buckets)
    assert_equal_bits(found, expected)
    moved = [not torch.equal(x, y) for x, y in zip(found, start, strict=True)]
    trained = [p.requires_grad and not name.startswith("unused") for name, p in by_buckets.named_parameters()]
    assert moved == trained


@pytest.mark.parametrize("rule", RULES)
def test_training_with_every_rule(rule):
    by_buckets, by_hand = twins(Tied)
    expected = train(by_hand, OPTIMIZERS["sgd"](by_hand.parameters()), rule)
    buckets = sago.GradientBuckets(by_buckets.named_parameters())
    found = train(by_buckets, OPTIMIZERS["sgd"](by_buckets.parameters()), rule, buckets)
    if rule in ELEMENTWISE:
        assert_equal_bits(found, expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_model_is_not_compiled_anew(compiler):
    """For the gradients that take turns under `p.grad`: none, both accumulators, the update."""
    if compiler == "inductor" and not has_compiler():
        pytest.skip("needs a C++ compiler")
    by_buckets, by_hand = twins(Tied)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    model = torch.compile(by_buckets, backend=counter)
    buckets = sago.GradientBuckets(by_buckets)
    expected = train(by_hand, OPTIMIZERS["sgd"](by_hand.parameters()), "sago")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at its imports
        found = train(model, OPTIMIZERS["sgd"](by_buckets.parameters()), "sago", buckets)
        for p in by_buckets.parameters():
            p.grad = torch.ones_like(p)
        model(torch.zeros(2, 6, dtype=torch.int64))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


PLACES = ("ahead of the captures", "in the captures", "between the captures", "behind the step")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("place", "set_to_none"),
    # Zeros behind the step are test_the_next_capture_with_the_update_still_there.
    [*((place, True) for place in PLACES), *((place, False) for place in PLACES[:-1])],
)
def test_foreign_code_that_calls_zero_grad(form, place, set_to_none):
    dtype, accumulate_dtype = FORMS[form]
    reached = {"forget": (0, 1), "retain": (0, 2)}  # of four parameters
    trained = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, dtype=dtype)) for _ in range(4)]
        optimizer = torch.optim.AdamW(params, 0.1, weight_decay=0.5, foreach=True)
        buckets = None if by_hand else sago.GradientBuckets(params, accumulate_dtype=accumulate_dtype)
        for step in range(3):
            losses = [
                sum((params[i] * (step + i + sign * torch.arange(4.0))).sum() for i in reached[side])
                for side, sign in zip(SIDES, (1, -1), strict=True)
            ]
            if by_hand:
                grads = [torch.autograd.grad(loss, params, allow_unused=True) for loss in losses]
                updates, _ = sago.reference.synthesize(*grads)
                for p, u in zip(params, updates, strict=True):
                    p.grad = u
            else:
                for k, (side, loss) in enumerate(zip(SIDES, losses, strict=True)):
                    if place == ("ahead of the captures", "between the captures")[k]:
                        optimizer.zero_grad(set_to_none)
                    with getattr(buckets, side)():
                        if place == "in the captures":
                            optimizer.zero_grad(set_to_none)
                        loss.backward()
                buckets.synthesize_()
            optimizer.step()
            if by_hand or place == "behind the step":
                optimizer.zero_grad(set_to_none=True)
            else:
                buckets.zero_()
        trained.append([p.detach() for p in params])
    for x, y in zip(*trained, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


# What is wrong is refused, and nothing is lost by it.


ERRORS = (RuntimeError("stop"), KeyboardInterrupt("stop"))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_after_an_exception_ahead_of_any_backward_the_window_goes_on(window, error):
    window.capture("forget", w=2.0)
    for side in SIDES:
        with refused(window.buckets, "stop", type(error)):
            window.fail(error, side)
        window.check()
    window.finish()


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("side", SIDES)
def test_after_an_exception_behind_a_backward_only_zero_helps(window, error, side):
    window.capture("forget", w=2.0)
    window.capture("retain", w=2.0)
    with pytest.raises(type(error), match="stop"):
        window.fail(error, side, w=1.0)
    assert window.grads() == [None, None]
    for call in (window.buckets.synthesize_, *window.entries()):
        with refused(window.buckets, f"{side} capture ended in {type(error).__name__}.*stop.*zero_"):
            call()
        assert window.grads() == [None, None]
    window.zero_()
    window.finish()


def stop(*_):
    raise RuntimeError("stop")


def test_an_exception_in_a_backward_that_had_reached_a_parameter(window):
    window.capture("retain", w=2.0)
    w, v = window.params.values()
    x = v * 1.0
    x.register_hook(stop)
    loss = (x.sum() * w).sum()
    with pytest.raises(RuntimeError, match="stop"), window.open("forget"):
        loss.backward()
    assert window.buckets.forget_grads[0] is not None
    assert window.grads() == [None, None]
    with refused(window.buckets, "forget capture ended in.*stop"):
        window.enter("forget")
    window.zero_()
    window.finish()


def test_an_exception_in_a_backward_that_had_reached_none(window):
    window.capture("retain", w=2.0)
    loss = window.loss(w=1.0)
    loss.register_hook(stop)
    with refused(window.buckets, "stop", RuntimeError), window.open("forget"):
        loss.backward()
    window.finish()


def test_an_exception_within_a_nested_capture_reaches_those_around_it(window):
    error = RuntimeError("stop")
    with refused(window.buckets, "stop", RuntimeError), window.open("forget"):
        window.fail(error, "retain")
    window.check()
    window.capture("forget", w=1.0)
    outer = window.open("forget")
    outer.__enter__()
    window.loss(w=1.0).backward()
    with pytest.raises(RuntimeError, match="stop"):
        window.fail(error, "retain")
    outer.__exit__(RuntimeError, error, None)
    assert window.grads() == [None, None]
    with refused(window.buckets, "forget capture ended in"):
        window.enter("retain")


@pytest.mark.parametrize("side", SIDES)
def test_a_capture_without_a_backward(window, side):
    window.capture("forget", w=2.0)
    other = nn.Parameter(torch.ones(2))
    with refused(window.buckets, f"A {side} capture should have a backward.*none"), window.open(side):
        pass
    with refused(window.buckets, f"A {side} capture should have a backward.*none"), window.open(side):
        other.sum().backward()
    with refused(window.buckets, f"A {side} capture"), window.open("forget"), window.open(side):
        pass
    window.finish()


def test_a_zero_grad_is_no_backward(window):
    """With set_to_none=False, it writes to the accumulators without a backward."""
    window.capture("retain", w=2.0)
    optimizer = torch.optim.SGD(window.params.values(), 0.1)
    for set_to_none in (True, False):
        with refused(window.buckets, "A forget capture should have a backward.*none"), window.open("forget"):
            optimizer.zero_grad(set_to_none)
    window.finish()


def test_a_synthesis_ahead_of_both_captures(window):
    for captured, missing in ((None, "forget"), ("forget", "retain")):
        if captured:
            window.capture(captured, w=2.0)
        with refused(window.buckets, f"{missing} gradient should be captured.*buckets.{missing}"):
            window.buckets.synthesize_()
    window.finish()
    window.capture("retain", v=2.0)
    with refused(window.buckets, "forget gradient should be captured"):
        window.buckets.synthesize_()
    window.finish()


@pytest.mark.parametrize("side", SIDES)
def test_a_synthesis_and_zero_within_a_capture(window, side):
    window.capture("forget", w=2.0)
    window.capture("retain", w=2.0)
    capture = window.open(side)
    capture.__enter__()
    for call in (window.buckets.synthesize_, window.buckets.zero_):
        with refused(window.buckets, rf"Captures should be closed.*open {side}\(\)"):
            call()
    window.backward(side, v=4.0)  # the capture is still open
    capture.__exit__(None, None, None)
    window.finish()


def test_a_second_synthesis_in_a_row(window):
    window.capture("forget", w=2.0)
    window.capture("retain", w=3.0)
    window.buckets.synthesize_("sum")
    update = window.params["w"].grad
    with refused(window.buckets, "should be captured.*since the last synthesis"):
        window.buckets.synthesize_("sum")
    assert window.params["w"].grad is update
    assert torch.equal(update, torch.full_like(update, 5.0))


def test_the_next_capture_with_the_update_still_there(window):
    optimizer = torch.optim.SGD(window.params.values(), 0.1)
    window.capture("forget", w=2.0)
    window.capture("retain", w=3.0)
    window.buckets.synthesize_("sum")
    update = window.params["w"].grad
    for expected in (5.0, 0.0):
        for side in SIDES:
            with refused(window.buckets, r"last update.*zero_\(\).*`w.grad`"):
                window.enter(side)
            assert window.params["w"].grad is update
            assert torch.equal(update, torch.full_like(update, expected))
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad(set_to_none=True)
    window.start_anew()
    window.finish()


@pytest.mark.parametrize("place", ["ahead", "between", "behind"])
def test_a_backward_outside_of_captures_is_noticed_and_kept_apart(window, place):
    if place != "ahead":
        window.capture("forget", w=2.0)
    if place == "behind":
        window.capture("retain", w=3.0)
    window.loss(v=7.0).backward()
    stray = window.params["v"].grad
    calls = window.entries()
    if place == "behind":
        calls.append(window.buckets.synthesize_)
    for call in calls:
        with refused(window.buckets, "Backwards should run within.*`v.grad`.*None"):
            call()
        assert window.params["v"].grad is stray
        assert torch.equal(stray, torch.full_like(stray, 7.0))
    window.params["v"].grad = None
    window.finish()


def out_of_order(window):
    """The inner capture, still open when the one around it has been closed."""
    window.capture("forget", w=1.0)
    outer, inner = window.open("forget"), window.open("retain")
    outer.__enter__()
    inner.__enter__()
    window.loss(w=5.0).backward()
    with pytest.raises(ValueError, match=r"closed in reverse order.*forget capture"):
        outer.__exit__(None, None, None)
    assert_equal_bits(window.buckets.forget_grads, window.totals["forget"])
    assert window.grads() == [None, None]
    for call in (window.buckets.synthesize_, *window.entries()):
        with refused(window.buckets, "forget capture was closed before one within it.*zero_"):
            call()
    return inner


def test_captures_closed_out_of_order(window):
    inner = out_of_order(window)
    with refused(window.buckets, "closed in reverse order"):
        inner.__exit__(None, None, None)
    window.zero_()
    window.finish()


@pytest.mark.parametrize("late", ["closed", "closed by an exception", "collected as garbage"])
def test_captures_closed_out_of_order_and_in_another_window(window, late):
    inner = out_of_order(window)
    window.zero_()
    window.capture("forget", w=1.0)
    window.capture("retain", w=1.0, v=2.0)
    window.check()
    if late == "closed":
        with refused(window.buckets, "closed in reverse order"):
            inner.__exit__(None, None, None)
    elif late == "closed by an exception":
        error = RuntimeError("stop")
        inner.__exit__(RuntimeError, error, None)
    del inner
    gc.collect()
    window.finish()


CHANGES = {
    "cast": (lambda p: p.to(FP64), "torch.float64"),
    "resized": (lambda p: torch.ones(4, dtype=p.dtype), r"\(4,\)"),
    "moved": (lambda p: p.to("cuda"), "cuda"),
}
CHANGE_PARAMS = [pytest.param(c, marks=pytest.mark.gpu) if c == "moved" else c for c in CHANGES]


@pytest.mark.parametrize("change", CHANGE_PARAMS)
@pytest.mark.parametrize("captures", [0, 1, 2])
def test_a_parameter_that_is_another_than_it_was(window, change, captures):
    for side in SIDES[:captures]:
        window.capture(side, w=2.0, v=1.0)
    v, (apply, says) = window.params["v"], CHANGES[change]
    before = v.data
    v.data = apply(before)
    calls = window.entries()
    if captures == 2:
        calls.append(window.buckets.synthesize_)
    for call in calls:
        with refused(window.buckets, f"`v` should be as it was.*Found.*{says}.*new GradientBuckets"):
            call()
        assert window.grads() == [None, None]
    v.data = before
    window.finish()


def test_a_parameter_that_is_unfrozen():
    w, v = (nn.Parameter(torch.ones(2)) for _ in range(2))
    v.requires_grad_(False)
    buckets = sago.GradientBuckets([("w", w), ("v", v)])
    with buckets.forget():
        w.sum().backward()
    v.requires_grad_(True)
    with refused(buckets, "`v` should be frozen"):
        buckets.retain().__enter__()
    v.requires_grad_(False)
    with buckets.retain():
        w.sum().backward()
    buckets.synthesize_()


def test_a_parameter_that_is_added():
    model = nn.Sequential(nn.Linear(2, 2))
    buckets = sago.GradientBuckets(model)
    for change in (lambda: model.append(nn.Linear(2, 2)), lambda: setattr(model[0], "bias", None)):
        change()
        with refused(buckets, "parameters that it had.*new GradientBuckets"):
            buckets.forget().__enter__()
        buckets = sago.GradientBuckets(model)
        with buckets.forget():
            model(torch.ones(1, 2)).sum().backward()
        buckets.zero_()


def test_a_parameter_that_is_frozen_later(window):
    window.capture("forget", w=1.0, v=4.0)
    v = window.params["v"].requires_grad_(False)
    window.capture("retain", w=2.0, v=9.0)
    window.totals["retain"][1] = None
    window.check()
    window.buckets.synthesize_("sum", gamma=2.0)
    assert torch.equal(v.grad, torch.full_like(v, 8.0))
    window.zero_()
    for side in SIDES:
        window.capture(side, w=2.0)
    window.buckets.synthesize_("sum")
    assert v.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
def test_sparse_gradients(form, side):
    dtype, accumulate_dtype = FORMS[form]
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "words": nn.Embedding(5, 2, sparse=True)}).to(dtype)
    buckets = sago.GradientBuckets(model, accumulate_dtype=accumulate_dtype)
    if side == "retain":
        with buckets.forget():
            model["dense"](torch.ones(1, 2, dtype=dtype)).sum().backward()
    with (
        refused(buckets, "`words.weight` should be dense.*sparse=False", TypeError),
        getattr(buckets, side)(),
    ):
        model["words"](torch.tensor([1, 1])).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with getattr(buckets, side)():
        model["dense"](torch.ones(1, 2, dtype=dtype)).sum().backward()


def w(dtype=FP32, **options):
    return nn.Parameter(torch.ones(2, dtype=dtype, **options))


CONSTRUCTIONS = {
    "no params": (ValueError, "`params`.*none", [], {}),
    "no params in a module": (ValueError, "`params`.*none", nn.Tanh(), {}),
    "all frozen": (ValueError, "`params`.*requires grad.*none", [w().requires_grad_(False)], {}),
    "a tensor": (TypeError, "`params`.*module or an iterable.*Parameter", w(), {}),
    "a number": (TypeError, "`params`.*int", 3, {}),
    "None": (TypeError, "`params`.*NoneType", None, {}),
    "a generator of ints": (TypeError, r"`params\[0\]`.*tensor.*int", range(3), {}),
    "names": (TypeError, r"`params\[0\]`.*tensor.*str", {"w": w()}, {}),
    "param groups": (TypeError, r"`params\[0\]`.*tensor.*dict", [{"params": [w()]}], {}),
    "half of them named": (TypeError, r"`params\[0\]`.*tensor.*tuple", [("w", w()), w()], {}),
    "a named number": (TypeError, "`w`.*tensor.*float", [("w", 1.0)], {}),
    "not a leaf": (ValueError, r"`params\[1\]`.*leaf.*Mul", [w(), w() * 2], {}),
    "meta": (ValueError, "`m`.*data.*meta", [("m", w(device="meta"))], {}),
    "complex": (TypeError, r"`params\[0\]`.*float16.*complex64", [w(torch.complex64)], {}),
    "sparse": (TypeError, r"`params\[0\]`.*dense", [torch.ones(2).to_sparse().requires_grad_()], {}),
    "accumulation": (ValueError, "`accumulation`.*'mean'.*'average'", [w()], {"accumulation": "average"}),
    "accumulation None": (ValueError, "`accumulation`.*None", [w()], {"accumulation": None}),
    "accumulate_dtype": (ValueError, "`accumulate_dtype`.*bfloat16", [w()], {"accumulate_dtype": BF16}),
    "accumulate_dtype int": (ValueError, "`accumulate_dtype`.*int", [w()], {"accumulate_dtype": torch.int32}),
    "accumulate_dtype str": (ValueError, "`accumulate_dtype`", [w()], {"accumulate_dtype": "float32"}),
    **{
        f"bucket_cap_mb {x}": (ValueError, f"`bucket_cap_mb`.*{x}", [w()], {"bucket_cap_mb": x})
        for x in (0, -1.0, float("nan"))
    },
    "bucket_cap_mb str": (TypeError, "`bucket_cap_mb`.*str", [w()], {"bucket_cap_mb": "256"}),
    "bucket_cap_mb None": (TypeError, "`bucket_cap_mb`.*None", [w()], {"bucket_cap_mb": None}),
    "too few groups": (ValueError, "`groups`.*2.*Found 1", [w(), w()], {"groups": ["a"]}),
    "too many groups": (ValueError, "`groups`.*1.*Found 2", [w()], {"groups": ["a", "b"]}),
    "groups a string": (TypeError, "`groups`.*str", [w()], {"groups": "a"}),
    "groups unhashable": (TypeError, r"`groups\[0\]`.*hashable", [w()], {"groups": [[1]]}),
    "backend": (ValueError, "`backend`.*Found 'cuda'", [w()], {"backend": "cuda"}),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_buckets_that_cannot_be_made(name):
    error, says, params, options = CONSTRUCTIONS[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){says}") as caught:
        sago.GradientBuckets(params, **options)
    assert caught.type is error


def test_one_buffer_for_all_of_a_kind():
    window = Window(bucket_cap_mb=float("inf"))
    window.finish()
    assert "1 buffers a side" in repr(window.buckets)


CALLS = {
    "rule": (ValueError, "`rule`.*'sagp'", {"rule": "sagp"}),
    "gamma": (ValueError, r"`gamma`.*0-d.*\(2,\)", {"gamma": torch.ones(2)}),
    "alpha": (TypeError, "`alpha`.*str", {"alpha": "1"}),
    "eps": (ValueError, "`eps`.*-1", {"eps": -1.0}),
    "reduce_gram": (TypeError, "`reduce_gram`.*int", {"reduce_gram": 3}),
    "a reduction that raises": (RuntimeError, "stop", {"reduce_gram": stop}),
    "a reduction that is wrong": (ValueError, "`reduce_gram`", {"reduce_gram": lambda t: t[:, :1]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_synthesis_with_wrong_arguments_can_be_called_again(window, name):
    error, says, options = CALLS[name]
    window.capture("forget", w=2.0)
    window.capture("retain", w=-3.0, v=1.0)
    with refused(window.buckets, says, error):
        window.buckets.synthesize_(**options)
    window.finish()


# What runs, and what is allocated.


class Ops(TorchDispatchMode):
    """The names of the ops that ran, each with the tensors of at least `numel` elements that it had."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [
            t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)
        ]
        self.seen.append((str(op), [t for t in tensors if t.numel() >= self.numel]))
        return out

    def large(self):
        return [name for name, tensors in self.seen if tensors]

    def names(self):
        return {name.split(".")[1] for name, _ in self.seen}


SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "unique2", "masked_select"}


@pytest.mark.parametrize("form", FORMS)
def test_captures_run_nothing_but_the_additions_of_autograd(form):
    dtype, accumulate_dtype = FORMS[form]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    x = torch.ones(3, 4, dtype=dtype)
    params = list(model.parameters())
    buckets = sago.GradientBuckets(model, accumulate_dtype=accumulate_dtype)
    memory = set()
    for window in range(2):
        for side in SIDES:
            with Ops(4) as ops:
                for backwards in (1, 2):
                    capture = getattr(buckets, side)()
                    start = len(ops.seen)
                    capture.__enter__()
                    assert ops.large() == [name for name, t in ops.seen[:start] if t]
                    for _ in range(backwards):
                        model(x).square().sum().backward()
                    end = len(ops.seen)
                    capture.__exit__(None, None, None)
                    assert ops.large() == [name for name, t in ops.seen[:end] if t]
            memory |= {g.untyped_storage().data_ptr() for g in getattr(buckets, f"{side}_grads")}
            touching = [n for n, ts in ops.seen if any(t.untyped_storage().data_ptr() in memory for t in ts)]
            assert touching == ["aten.add_.Tensor"] * (3 * len(params)), f"in window {window}"
            assert not ops.names() & SYNCHRONISING
        buckets.synthesize_()
        buckets.zero_()


@pytest.mark.parametrize("options", [{}, {"stats": False}, {"accumulation": "mean"}], ids=str)
@pytest.mark.parametrize("rule", RULES)
@needs_triton
@needs_interpreter
def test_a_synthesis_in_the_kernels_reads_nothing_back(rule, options):
    mean = options.pop("accumulation", "sum") if "accumulation" in options else "sum"
    window = Window(accumulation=mean, backend="triton")
    for _ in range(2):  # with a plan that is new, with one that is not
        for side, g in zip(SIDES, (1.0, -2.0), strict=True):
            window.capture(side, w=g, v=g)
            window.capture(side, w=g)
        with Ops(3) as ops:
            window.buckets.synthesize_(rule, **options)
        assert not ops.names() & SYNCHRONISING
        assert len(ops.seen) > 0
        window.buckets.zero_()


def test_what_reads_back_is_seen():
    with Ops(3) as ops:
        x = torch.ones(3)
        float(x.sum())
        x.nonzero()
        torch.equal(x, x)
    assert len(ops.names() & SYNCHRONISING) == 3


def peak(run):
    """Bytes that were live at once, above those at the start. Allocations by ops and by compiled code."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(live.max())


@pytest.fixture(scope="module")
def chain():
    """300 tensors of 256 KiB."""
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(300)))


def step(model, rule):
    buckets = sago.GradientBuckets(model)
    for sign, side in zip((-1, 1), SIDES, strict=True):
        with getattr(buckets, side)():
            (sign * model(torch.ones(1, 256)).square()).sum().backward()
    buckets.synthesize_(rule)
    model.zero_grad()
    return buckets


@pytest.mark.parametrize("rule", RULES)
def test_a_step_holds_two_copies_of_the_gradients(chain, rule):
    if not has_compiler():
        pytest.skip("needs a C++ compiler: without one the CPU path has temporaries of 12 MiB")
    step(chain[:1], rule)  # compiles
    copy_size = sum(p.nbytes for p in chain.parameters())
    assert copy_size < peak(lambda: step(chain, rule)) <= 2 * copy_size * 1.01


def test_a_third_copy_is_seen(chain):
    params = list(chain.parameters())

    def naive():
        forget = [g.clone() for g in torch.autograd.grad(chain(torch.ones(1, 256)).sum(), params)]
        retain = [g.clone() for g in torch.autograd.grad(chain(torch.ones(1, 256)).sum(), params)]
        return forget, retain

    copy_size = sum(p.nbytes for p in params)
    assert peak(naive) > 2.5 * copy_size


@pytest.mark.parametrize(
    ("dtype", "accumulate_dtype", "nbytes"),
    [(BF16, None, 4), (BF16, FP32, 10), (FP32, FP32, 8), (FP32, FP64, 20)],
)
def test_nbytes_is_what_is_allocated(dtype, accumulate_dtype, nbytes):
    params = [nn.Parameter(torch.ones(1000, 64, dtype=dtype)) for _ in range(3)]
    found = []
    allocated = peak(lambda: found.append(sago.GradientBuckets(params, accumulate_dtype=accumulate_dtype)))
    assert found[0].nbytes == nbytes * 3 * 64000
    assert found[0].nbytes <= allocated <= found[0].nbytes + 4096
