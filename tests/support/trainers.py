"""Trainers that are built like those of OpenUnlearning, without sago, and the same training by hand."""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import sago
from tests.support.oracle import rounding_error

NEWER = "num_items_in_batch" in inspect.signature(Trainer.training_step).parameters  # than 4.45
GAMMA, ALPHA, LR, EPSILON = 0.7, 1.3, 1e-2, 1e-3
VOCABULARY, LENGTH = 23, 7
# How far weights may end apart that were trained in fp32 for at most 8 steps on the same batches. Gradients
# have a norm of about 0.5, to which they are clipped. Summed in another order, they are off by at most 16
# roundings. AdamW moves a weight by at most LR / EPSILON times the error of a gradient.
DRIFT = 8 * LR / EPSILON * 0.5 * rounding_error(16, torch.float32)


def llama(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.3,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


class Pairs(torch.utils.data.Dataset):
    """Pairs of one text to forget and one to retain."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCABULARY, (count, 2, LENGTH), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {side: _text(self.tokens[i, j]) for j, side in enumerate(("forget", "retain"))}


class Texts(Pairs):
    """The texts on which the Trainer evaluates."""

    def __getitem__(self, i):
        return _text(self.tokens[i, 0])


def _text(tokens):
    labels = tokens.clone()
    labels[:2] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Collator:
    """Stacks, and remembers the batches in their order."""

    def __init__(self):
        self.batches = []

    def __call__(self, items):
        if "forget" not in items[0]:
            return _stack(items)
        batch = {side: _stack([item[side] for item in items]) for side in ("forget", "retain")}
        self.batches.append(batch)
        return batch


def _stack(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class GradDiff(Trainer):
    def __init__(self, gamma=1.0, alpha=1.0, **options):
        super().__init__(**options)
        self.gamma, self.alpha = gamma, alpha
        self.ref_model = None

    def _prepare_ref_model(self):
        return self.accelerator.prepare_model(reference(self.model), evaluation_mode=True)

    if NEWER:

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.compute_unlearn_loss(model, inputs, return_outputs)
    else:

        def compute_loss(self, model, inputs, return_outputs=False):
            return self.compute_unlearn_loss(model, inputs, return_outputs)

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        if "forget" not in inputs:  # evaluation
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        outputs = model(**inputs["forget"])
        forget_loss = -outputs.loss
        retain_loss = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
        loss = self.gamma * forget_loss + self.alpha * retain_loss
        return (loss, outputs) if return_outputs else loss

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss


class NPO(GradDiff):
    def __init__(self, beta=0.5, **options):
        super().__init__(**options)
        self.beta = beta
        self.ref_model = self._prepare_ref_model()

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        if "forget" not in inputs:
            return super().compute_unlearn_loss(model, inputs, return_outputs)
        outputs = model(**inputs["forget"])
        with torch.no_grad():
            before = text_nll(self.ref_model(**inputs["forget"]).logits, inputs["forget"])
        ratio = text_nll(outputs.logits, inputs["forget"]) - before
        forget_loss = -F.logsigmoid(self.beta * ratio).mean() * 2 / self.beta
        retain_loss = model(**inputs["retain"]).loss
        loss = self.gamma * forget_loss + self.alpha * retain_loss
        return (loss, outputs) if return_outputs else loss


class SimNPO(GradDiff):
    """With a retain loss against the reference model."""

    def __init__(self, beta=1.5, delta=0.1, **options):
        super().__init__(**options)
        self.beta, self.delta = beta, delta
        self.ref_model = self._prepare_ref_model()

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        if "forget" not in inputs:
            return super().compute_unlearn_loss(model, inputs, return_outputs)
        outputs = model(**inputs["forget"])
        tokens = (inputs["forget"]["labels"] != -100).sum(-1)
        margin = text_nll(outputs.logits, inputs["forget"]) / tokens - self.delta
        forget_loss = -F.logsigmoid(self.beta * margin).mean() * 2 / self.beta
        with torch.no_grad():
            before = self.ref_model(**inputs["retain"]).logits
        retain_loss = divergence(model(**inputs["retain"]).logits, before)
        loss = self.gamma * forget_loss + self.alpha * retain_loss
        return (loss, outputs) if return_outputs else loss


def reference(model):
    """A frozen model that is not quite the same, so that no gradient against it is rounding alone."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for p in frozen.parameters():
        p.mul_(0.9)
    return frozen


def text_nll(logits, text):
    """The NLL of each text, summed over its tokens."""
    each = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), text["labels"][:, 1:], ignore_index=-100, reduction="none"
    )
    return each.sum(-1)


def divergence(logits, before):
    """The KL divergence of the model from the reference model, for each token."""
    new, old = (x.flatten(0, 1).log_softmax(-1) for x in (logits, before))
    return F.kl_div(new, old, reduction="batchmean", log_target=True)


def npo_losses(model, frozen, batch):
    frozen_nll = text_nll(frozen(**batch["forget"]).logits, batch["forget"])
    ratio = text_nll(model(**batch["forget"]).logits, batch["forget"]) - frozen_nll.detach()
    return -(4 * F.logsigmoid(0.5 * ratio)).mean(), model(**batch["retain"]).loss


def simnpo_losses(model, frozen, batch):
    tokens = LENGTH - 2
    margin = text_nll(model(**batch["forget"]).logits, batch["forget"]) / tokens - 0.1
    kept = divergence(model(**batch["retain"]).logits, frozen(**batch["retain"]).logits.detach())
    return -F.logsigmoid(1.5 * margin).mean() * 2 / 1.5, kept


def graddiff_losses(model, frozen, batch):
    return -model(**batch["forget"]).loss, model(**batch["retain"]).loss


LOSSES = {GradDiff: graddiff_losses, NPO: npo_losses, SimNPO: simnpo_losses}


def arguments(folder, **options):
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "optim": "adamw_torch",
        "learning_rate": LR,
        "adam_epsilon": EPSILON,  # at 1e-8 the sign of a gradient near 0 would be a step
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
        **options,
    }
    return TrainingArguments(**given)


def make(kind, folder, model=None, data=None, eval_dataset=None, callbacks=None, **options):
    """A trainer of this kind, its batches in `data_collator.batches`."""
    return kind(
        gamma=GAMMA,
        alpha=ALPHA,
        model=llama() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=Pairs(8) if data is None else data,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        data_collator=Collator(),
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Autocast(nn.Module):
    """The model as accelerate runs it in mixed precision."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, **batch):
        with torch.autocast("cpu", self.dtype):
            outputs = self.model(**batch)
        outputs.loss, outputs.logits = outputs.loss.float(), outputs.logits.float()
        return outputs


def windows(batches, accumulation, each=None):
    """The micro-batches of each step, and what their losses are divided by, in this transformers.

    Args:
        each: Batches of an epoch.
    """
    each = len(batches) if each is None else each
    found = [[]]
    for i, batch in enumerate(batches):
        found[-1].append(batch)
        ended = (i + 1) % each == 0
        if NEWER:
            full = (i % each + 1) % accumulation == 0
        else:  # windows go on over the end of an epoch, unless the epoch is shorter than one
            full, ended = (i + 1) % accumulation == 0, ended and each <= accumulation
        if full or ended:
            found.append([])
    return [(window, _divisor(accumulation, len(window))) for window in found[:-1]]


def _divisor(accumulation, length):
    if not NEWER:
        return accumulation
    if not hasattr(Trainer, "_run_epoch"):  # 4.51 takes it that a model with loss kwargs has done it
        return 1
    return length


def by_hand(
    model,
    losses,
    steps,
    rule="sago",
    max_norm=0.5,
    weights=(GAMMA, ALPHA),
    groups=None,
    autocast=None,
    scaler=None,
    wide=False,
    optimizer=None,
):
    """Trains as the trainers above should with `rule`. Returns what they should log of each step."""
    frozen = reference(model)
    run, run_frozen = (m if autocast is None else Autocast(m, autocast) for m in (model, frozen))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    keys = None if groups is None else [groups(n) for n, _ in named]
    optimizer = adamw(params) if optimizer is None else optimizer
    reports = []
    for batches, divisor in steps:
        scale = 1.0 if scaler is None else scaler.get_scale()
        sides = []
        for side in range(2):
            total = [torch.zeros_like(p, dtype=torch.float32 if wide else p.dtype) for p in params]
            for batch in batches:
                loss = losses(run, run_frozen, batch)[side] / divisor * scale
                for t, g in zip(total, torch.autograd.grad(loss, params), strict=True):
                    t += g
            sides.append(total)
        updates, report = sago.reference.synthesize(
            *sides, rule, gamma=weights[0], alpha=weights[1], groups=keys
        )
        reports.append({k: v / scale if k.startswith("norm") else v for k, v in report.summary().items()})
        for p, update, f, r in zip(params, updates, *sides, strict=True):
            p.grad = torch.where((f + r).isfinite(), update, torch.nan).to(p.dtype)
        if scaler is not None:
            scaler.scale(torch.ones(()))  # is asked for before it unscales
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return reports


def assert_logged(found, expected):
    """Losses, norms and cosines change by up to 10 times what the weights do; 4 elements may change signs."""
    numel = sum(p.numel() for p in llama().parameters())
    for name, value in expected.items():
        atol = 4 / numel if name == "conflict_fraction" else 10 * DRIFT
        torch.testing.assert_close(
            found[name], value, rtol=10 * DRIFT, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def adamw(params):
    return torch.optim.AdamW(params, lr=LR, eps=EPSILON, weight_decay=0.0)
