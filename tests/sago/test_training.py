"""`GradientBuckets` in training loops: the optimizers and models of other people."""

import copy
import ctypes
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sago
from sago.backends.compiled import has_compiler
from tests.support.backends import ELEMENTWISE, RULES
from tests.support.captures import FORMS, SIDES, added
from tests.support.oracle import SUM_ERROR
from tests.support.properties import assert_equal_bits

pytestmark = pytest.mark.usefixtures("one_thread")


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


def assert_trained_alike(found, expected):
    """In fp64, where other orders of sums make an error of a step of at most `SUM_ERROR`, 1e-14.

    Four steps of SGD magnify it by a factor of some 20. A factor of 1000 is allowed: a sum in fp32 or a wrong
    coefficient moves the weights, which are of size 1, by 1e-7 or more.
    """
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=0, atol=1e3 * SUM_ERROR[torch.float64])


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
    by_buckets, by_hand = twins(Tied if rule in ELEMENTWISE else lambda: Tied().double())
    expected = train(by_hand, OPTIMIZERS["sgd"](by_hand.parameters()), rule)
    buckets = sago.GradientBuckets(by_buckets.named_parameters())
    found = train(by_buckets, OPTIMIZERS["sgd"](by_buckets.parameters()), rule, buckets)
    (assert_equal_bits if rule in ELEMENTWISE else assert_trained_alike)(found, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_model_is_not_compiled_anew(compiler):
    """For the gradients that take turns under `p.grad`: none, both accumulators, the update."""
    if compiler == "inductor" and not has_compiler():
        pytest.skip("needs a C++ compiler")
    by_buckets, by_hand = twins(lambda: Tied().double())
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
    assert_trained_alike(found, expected)


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
    # Zeros in the accumulators are gradients, and AdamW then decays what no loss reaches.
    zeros = place == "in the captures" and not set_to_none and accumulate_dtype is None
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
                grads = [
                    torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=zeros)
                    for loss in losses
                ]
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
    assert_equal_bits(*trained)
