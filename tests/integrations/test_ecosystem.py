"""Optimizers of bitsandbytes and torchao, and TRL's SFTTrainer. `make test-ecosystem` installs them."""

import copy
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import sago
from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from tests.support.trainers import (
    ALPHA,
    DRIFT,
    GAMMA,
    VOCABULARY,
    Collator,
    GradDiff,
    Pairs,
    arguments,
    by_hand,
    graddiff_losses,
    llama,
    make,
    weights,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")

BATCHES = [Collator()([pair]) for pair in Pairs(6)]
FP32, BF16 = torch.float32, torch.bfloat16
BITSANDBYTES = ["AdamW8bit", "Adam8bit", "Lion8bit", "RMSprop8bit", "AdEMAMix8bit", "AdamW"]
TORCHAO = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]
# The name of the Trainer for an optimizer.
OF_THE_TRAINER = [
    ("bitsandbytes.optim", "AdamW8bit", "adamw_bnb_8bit"),
    ("bitsandbytes.optim", "Lion8bit", "lion_8bit"),
    ("torchao.optim", "AdamW8bit", "adamw_torch_8bit"),
    ("torchao.optim", "AdamW4bit", "adamw_torch_4bit"),
]


def package(name):
    pytest.importorskip(name.partition(".")[0], reason="`make test-ecosystem` installs it")
    return import_module(name)


def wide(dtype=FP32):
    """A model that trains two matrices of 4096 elements. Smaller ones have no state of 8 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.3,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "o_proj" in name or "norm" in name)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def update_by_hand(model, batches, rule):
    """The update of the reference. `p.grad` is not touched."""
    params, sides = trained(model), []
    for side in range(2):
        total = [torch.zeros_like(p) for p in params]
        for batch in batches:
            found = torch.autograd.grad(graddiff_losses(model, None, batch)[side], params)
            for t, g in zip(total, found, strict=True):
                t += g
        sides.append(total)
    return sago.reference.synthesize(*sides, rule, gamma=GAMMA, alpha=ALPHA)[0]


def assert_quantized(optimizer):
    """Some state of the optimizer has fewer bits than the parameters."""
    found = [x for state in optimizer.state.values() for x in state.values()]
    assert any("OptimState" in type(x).__name__ or getattr(x, "dtype", None) == torch.uint8 for x in found)


def check_supported(module, name, dtype, accumulation, rule):
    """Three steps with the buckets, and with the updates of the reference in `p.grad`: the same bits."""
    model = wide(dtype)
    expected = copy.deepcopy(model)
    optimizers = [getattr(module, name)(trained(m), lr=1e-2) for m in (model, expected)]
    buckets = sago.GradientBuckets(model)
    for step in range(3):
        batches = BATCHES[step * accumulation : (step + 1) * accumulation]
        for p, update in zip(trained(expected), update_by_hand(expected, batches, rule), strict=True):
            p.grad = update
        for batch in batches:
            losses = graddiff_losses(model, None, batch)
            for capture, loss in zip((buckets.forget, buckets.retain), losses, strict=True):
                with capture():
                    loss.backward()
        buckets.synthesize_(rule, GAMMA, ALPHA)
        grads = [p.grad for p in trained(model)]
        for optimizer in optimizers:
            optimizer.step()
        # The optimizer reads `p.grad`, and neither changes nor replaces it.
        for p, g, q in zip(trained(model), grads, trained(expected), strict=True):
            assert p.grad is g
            torch.testing.assert_close(g, q.grad, rtol=0, atol=0)
        torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)
        buckets.zero_()
        optimizers[1].zero_grad()
    before = weights(wide(dtype))
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != p.requires_grad
    if "8" in name or "4" in name:
        assert_quantized(optimizers[0])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_optimizers_of_bitsandbytes(name, dtype, accumulation):
    check_supported(package("bitsandbytes.optim"), name, dtype, accumulation, "sago")


@pytest.mark.parametrize(("dtype", "accumulation"), [(FP32, 1), (BF16, 2)])
@pytest.mark.parametrize("name", TORCHAO)
def test_optimizers_of_torchao(name, dtype, accumulation):
    """They compile their step."""
    check_supported(package("torchao.optim"), name, dtype, accumulation, "sago")


def test_the_offloading_optimizer_of_torchao_is_refused(monkeypatch):
    """Its constructor needs a GPU. Only its hooks matter here."""
    offload = package("torchao.optim.cpu_offload")
    monkeypatch.setattr(offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", object)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory=False, **o: empty_like(t, **o))
    model = wide()
    optimizer = offload.CPUOffloadOptimizer(trained(model), torch.optim.SGD, lr=1e-2)
    assert len(optimizer.optim_dict) == 2
    buckets = sago.GradientBuckets(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight` .*CPUOffloadOptimizer"), buckets.forget():
        pass


class SAGO(GradientSynthesisMixin, GradDiff):
    synthesis = Synthesis("sago")


class Checking(TrainerCallback):
    """Compares each update with the reference, and the weights with those of an optimizer outside."""

    def __init__(self, batches, accumulation, make_optimizer):
        self.batches, self.accumulation, self.make_optimizer = batches, accumulation, make_optimizer
        self.optimizer, self.steps = None, 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.expected = copy.deepcopy(model)
        self.optimizer = self.make_optimizer(trained(self.expected))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        start = self.steps * self.accumulation
        # The losses are divided by a power of two, which changes no bit of an elementwise update.
        updates = update_by_hand(model, self.batches[start : start + self.accumulation], "sago")
        for p, q, update in zip(trained(model), trained(self.expected), updates, strict=True):
            q.grad = update / self.accumulation
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
        self.optimizer.step()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        torch.testing.assert_close(weights(model), weights(self.expected), rtol=0, atol=0)
        self.steps += 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("module", "name", "optim"), OF_THE_TRAINER)
def test_optimizers_in_the_trainer(module, name, optim, accumulation, tmp_path):
    kind = getattr(package(module), name)
    options = {"optim": optim, "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation}
    trainer = make(SAGO, tmp_path, wide(), Pairs(6), **options)
    # The Trainer gives its betas to Lion, too, whose own default is another.
    own = {"betas": (0.9, 0.999)} if "Lion" in name else {"eps": trainer.args.adam_epsilon}
    if module == "torchao.optim":
        own["block_size"] = 256  # that of the Trainer, also for 4 bits, where torchao's own is 128
    checking = Checking(
        trainer.data_collator.batches,
        accumulation,
        lambda params: kind(params, lr=trainer.args.learning_rate, weight_decay=0.0, **own),
    )
    trainer.add_callback(checking)
    trainer.train()
    assert checking.steps == 6 // accumulation
    assert type(trainer.optimizer.optimizer).__name__.startswith(name.removesuffix("8bit"))
    assert_quantized(trainer.optimizer.optimizer)


class Tensors(Collator):
    """`datasets` gives lists."""

    def __call__(self, items):
        return super().__call__(
            [
                {side: {k: torch.tensor(v) for k, v in text.items()} for side, text in item.items()}
                for item in items
            ]
        )


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_the_sft_trainer(rule, accumulation, adapters, tmp_path):
    """With its own loss, which makes no logits, and its checkpointed activations."""
    trl, peft, datasets = package("trl"), package("peft"), package("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class SAGOSFT(GradientSynthesisMixin, trl.SFTTrainer):
        gamma, alpha = GAMMA, ALPHA

        def compute_losses(self, model, inputs):
            forget_loss = -super().compute_loss(model, inputs["forget"])
            return forget_loss, super().compute_loss(model, inputs["retain"])

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    plain = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    chosen = [
        "output_dir",
        "use_cpu",
        "report_to",
        "disable_tqdm",
        "save_strategy",
        "per_device_train_batch_size",
        "num_train_epochs",
        "optim",
        "learning_rate",
        "adam_epsilon",
        "lr_scheduler_type",
        "max_grad_norm",
        "remove_unused_columns",
        "dataloader_pin_memory",
        "gradient_accumulation_steps",
    ]
    options = {name: getattr(plain, name) for name in chosen}
    lists = [
        {side: {k: v.tolist() for k, v in text.items()} for side, text in pair.items()} for pair in Pairs(4)
    ]
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer = SAGOSFT(
        model=llama(),
        args=trl.SFTConfig(**options, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=datasets.Dataset.from_list(lists),
        data_collator=Tensors(),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        peft_config=lora if adapters else None,
        synthesis=Synthesis(rule),
    )
    expected = peft.get_peft_model(llama(), lora) if adapters else llama()
    expected.load_state_dict(trainer.model.state_dict())
    start = weights(expected)
    trainer.train()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, accumulation), rule)
    found = weights(trainer.model)
    torch.testing.assert_close(found, weights(expected), rtol=0, atol=DRIFT)
    for name, p in trainer.model.named_parameters():
        moved = (found[name] - start[name]).abs().max().item()
        assert moved > 10 * DRIFT if p.requires_grad else moved == 0.0
