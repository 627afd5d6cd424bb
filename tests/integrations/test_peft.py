"""Adapters of peft: each update against the reference on gradients that torch.autograd.grad computes."""

import pytest
import torch

import sago
from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from tests.support.oracle import rounding_error
from tests.support.trainers import (
    ALPHA,
    DRIFT,
    GAMMA,
    LR,
    Collator,
    GradDiff,
    Pairs,
    by_hand,
    divergence,
    graddiff_losses,
    llama,
    make,
    text_nll,
    weights,
    windows,
)

peft = pytest.importorskip("peft", reason="needs peft, which `make test` installs")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_collection"),
    # peft asks transformers 5.23 by the older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
KINDS = {
    "LoRA": {"target_modules": "all-linear"},
    "modules to save": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [1, 2, 3, 5, 8]},
}
BATCHES = [Collator()([pair]) for pair in Pairs(8)]


def configured(**options):
    # By default the second factor is 0, so that half of the gradients would be.
    return peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)


def adapted(dtype=FP64, base=None, **options):
    model = llama(dtype) if base is None else base
    return peft.get_peft_model(model, configured(**options))


def tied(dtype=FP64):
    """A model whose output layer is its embedding."""
    base = llama(dtype)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    return base


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def sides_by_hand(model, batches, losses, dtype=None):
    """Both gradients, summed over the batches in `dtype`. `p.grad` is not touched."""
    params = list(trained(model).values())
    sides = []
    for side in range(2):
        total = [torch.zeros_like(p, dtype=dtype) for p in params]
        for batch in batches:
            found = torch.autograd.grad(losses(model, batch)[side], params)
            for t, g in zip(total, found, strict=True):
                t += g
        sides.append(total)
    return sides


def both(model, batch):
    return graddiff_losses(model, None, batch)


def check_window(model, buckets, batches, rule="sago", losses=both, wide=None, one_copy=False):
    """Runs a window, and compares `p.grad` with the update of the reference."""
    forget, retain = sides_by_hand(model, batches, losses, wide)
    expected, _ = sago.reference.synthesize(forget, retain, rule, gamma=GAMMA, alpha=ALPHA)
    for batch in batches:
        with buckets.forget():
            losses(model, batch)[0].backward()
        if one_copy:
            with buckets.synthesize_in_backward(rule, GAMMA, ALPHA):
                losses(model, batch)[1].backward()
        else:
            with buckets.retain():
                losses(model, batch)[1].backward()
    if not one_copy:
        buckets.synthesize_(rule, GAMMA, ALPHA)
    # An elementwise rule gives the same bits. Other rules divide two sums of `numel` products, which are in
    # another order, and a projection has at most the norm of a gradient.
    numel, norm = (sum(f(g) for g in forget) for f in (torch.numel, torch.norm))
    error = 0.0 if rule == "sago" else rounding_error(4 * numel, forget[0].dtype) * norm.item()
    for (name, p), update in zip(trained(model).items(), expected, strict=True):
        torch.testing.assert_close(
            p.grad, update.to(p.dtype), rtol=0, atol=error, msg=lambda t, n=name: f"{n}: {t}"
        )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def check_training(model, rule="sago", accumulation=1, losses=both, between=lambda: None, **options):
    """Three steps. Only the trained parameters move."""
    wide = options.get("accumulate_dtype")
    buckets = sago.GradientBuckets(model, **options)
    optimizer = torch.optim.SGD(trained(model).values(), LR)
    before = frozen(model), {n: p.detach().clone() for n, p in trained(model).items()}
    for step in range(3):
        start = step * accumulation
        check_window(
            model,
            buckets,
            BATCHES[start : start + accumulation],
            rule,
            losses,
            wide,
            options.get("one_copy", False),
        )
        optimizer.step()
        buckets.zero_()
        between()
    torch.testing.assert_close(frozen(model), before[0], rtol=0, atol=0)
    assert all(not torch.equal(p, before[1][n]) for n, p in trained(model).items())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_reference(kind, rule, accumulation):
    check_training(adapted(**KINDS[kind]), rule, accumulation)


def test_the_adapters_of_a_model_in_bf16_are_trained_in_fp32():
    model = adapted(BF16, **KINDS["LoRA"])
    assert {p.dtype for p in trained(model).values()} == {FP32}
    check_training(model, accumulation=2)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_a_saved_embedding_that_is_tied(rule):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = adapted(base=tied(), **options)
    saved = model.get_input_embeddings().modules_to_save["default"].weight
    assert model.get_output_embeddings().modules_to_save["default"].weight is saved
    assert sum(p is saved for p in trained(model).values()) == 1
    check_training(model, rule, accumulation=2)


def against_the_base(model, batch):
    """NPO, and the divergence from the model without its adapters."""
    with torch.no_grad(), model.disable_adapter():
        before = [model(**batch[side]).logits for side in ("forget", "retain")]
    ratio = text_nll(model(**batch["forget"]).logits, batch["forget"]) - text_nll(before[0], batch["forget"])
    forget = -(4 * torch.nn.functional.logsigmoid(0.5 * ratio)).mean()
    return forget, divergence(model(**batch["retain"]).logits, before[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoRA", {}),
        ("DoRA", {}),
        ("modules to save", {}),
        ("modules to save", {"one_copy": True}),
        ("modules to save", {"accumulate_dtype": FP64}),
    ],
)
def test_the_model_without_adapters_as_the_reference_model(kind, options):
    """`disable_adapter` freezes the adapters and thaws a saved module, inside the capture."""
    model = adapted(FP32 if options else FP64, **KINDS[kind])
    check_training(model, losses=against_the_base, accumulation=1 if "one_copy" in options else 2, **options)


def test_an_adapter_as_the_reference_model():
    def losses(model, batch):
        model.set_adapter("reference")
        with torch.no_grad():
            before = model(**batch["retain"]).logits
        model.set_adapter("default")
        return -model(**batch["forget"]).loss, divergence(model(**batch["retain"]).logits, before)

    model = adapted(**KINDS["LoRA"])
    model.add_adapter("reference", configured(**KINDS["LoRA"]))
    check_training(model, losses=losses, accumulation=2)


def test_the_buckets_of_one_adapter_refuse_another():
    model = adapted(**KINDS["LoRA"])
    model.add_adapter("other", configured(**KINDS["LoRA"]))
    for params in (model, list(trained(model).values())):
        model.set_adapter("default")
        buckets = sago.GradientBuckets(params)
        check_window(model, buckets, BATCHES[:1])
        buckets.zero_()
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"other\.weight` should be"), buckets.forget():
            both(model, BATCHES[1])[0].backward()
        assert all(p.grad is None for p in model.parameters())
        model.set_adapter("default")
        buckets.zero_()
        check_window(model, buckets, BATCHES[:1])
        buckets.zero_()


def test_an_adapter_that_is_added_needs_new_buckets():
    model = adapted(**KINDS["LoRA"])
    buckets = sago.GradientBuckets(model)
    check_window(model, buckets, BATCHES[:1])
    buckets.zero_()
    model.add_adapter("other", configured(**KINDS["LoRA"]))
    with pytest.raises(ValueError, match="should have the parameters that it had"), buckets.forget():
        both(model, BATCHES[1])[0].backward()
    model.base_model.set_adapter(["default", "other"])
    check_training(model, accumulation=2)


def test_an_adapter_that_is_added_is_noticed_by_buckets_of_a_list():
    model = adapted(**KINDS["LoRA"])
    buckets = sago.GradientBuckets([p for p in model.parameters() if p.requires_grad])
    check_window(model, buckets, BATCHES[:1])
    buckets.zero_()
    model.add_adapter("other", configured(**KINDS["LoRA"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"`.*lora_.*other.*` should be given"), buckets.forget():
        both(model, BATCHES[1])[0].backward()


def test_several_adapters_together_and_in_turn():
    """The buckets are made while both are trained. An adapter that is frozen has no update."""
    model = adapted(**KINDS["DoRA"])
    model.add_adapter("other", configured(**KINDS["LoRA"]))
    turns = [["default", "other"], ["other"], ["default"], ["default", "other"]]
    model.base_model.set_adapter(turns[0])
    buckets, optimizer = sago.GradientBuckets(model), torch.optim.SGD(trained(model).values(), LR)
    for turn, active in enumerate(turns):
        model.base_model.set_adapter(active)
        before = frozen(model)
        assert any("other" in n for n in trained(model)) == ("other" in active)
        check_window(model, buckets, BATCHES[2 * turn : 2 * turn + 2])
        optimizer.step()
        buckets.zero_()
        torch.testing.assert_close(frozen(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_are_merged_between_two_windows(kind):
    """As for an evaluation. The weights of the model come back with a rounding each time."""
    model = adapted(**KINDS[kind])
    buckets, optimizer = sago.GradientBuckets(model), torch.optim.SGD(trained(model).values(), LR)
    for step in range(3):
        check_window(model, buckets, BATCHES[step : step + 1])
        optimizer.step()
        buckets.zero_()
        before = weights(model)
        model.merge_adapter()
        with pytest.raises(ValueError, match="should have a backward"), buckets.forget():
            both(model, BATCHES[0])  # the adapters are not in the graph
        model.unmerge_adapter()
        found = weights(model)
        for name in trained(model):
            assert torch.equal(found[name], before[name])
        torch.testing.assert_close(found, before, rtol=0, atol=1e-13)


def with_mixin(kind, **how):
    return type(
        f"Synthesizing{kind.__name__}", (GradientSynthesisMixin, kind), {"synthesis": Synthesis(**how)}
    )


class AgainstTheBase(GradDiff):
    def compute_losses(self, model, inputs):
        return against_the_base(model, inputs)


LOSSES = {GradDiff: graddiff_losses, AgainstTheBase: lambda model, _, batch: against_the_base(model, batch)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("trainer", "kind"), [*((GradDiff, kind) for kind in KINDS), (AgainstTheBase, "modules to save")]
)
def test_trains_as_the_reference_by_hand(trainer, kind, accumulation, tmp_path):
    model, expected = (adapted(FP32, llama(), **KINDS[kind]) for _ in range(2))
    start = weights(model)
    expected.load_state_dict(model.state_dict())
    run = make(with_mixin(trainer), tmp_path, model, Pairs(4), gradient_accumulation_steps=accumulation)
    run.train()
    by_hand(expected, LOSSES[trainer], windows(run.data_collator.batches, accumulation))
    found, wanted = weights(model), weights(expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=DRIFT)
    for name, p in model.named_parameters():
        moved = (p - start[name]).abs().max().item()
        assert moved > 10 * DRIFT if p.requires_grad else moved == 0.0
