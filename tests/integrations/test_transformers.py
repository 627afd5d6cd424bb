"""Trainers with nothing but the mixin added, against the reference on the same micro-batches by hand."""

import copy
import csv
import gc
import inspect
import re
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace
from unittest import mock

import accelerate
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import sago
from sago.integrations import once
from sago.integrations.callbacks import MonitorCallback, ReportWriter
from sago.integrations.copies import may_hold_copies
from sago.integrations.trainer import adapter, synthesizer
from sago.integrations.trainer.losses import without_count
from sago.integrations.trainer.tally import Tally
from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from tests.support.backends import RULES
from tests.support.oracle import rounding_error
from tests.support.trainers import (
    ALPHA,
    DRIFT,
    GAMMA,
    LENGTH,
    LOSSES,
    NPO,
    Collator,
    GradDiff,
    Pairs,
    SimNPO,
    Texts,
    adamw,
    assert_logged,
    by_hand,
    gpt2,
    graddiff_losses,
    llama,
    make,
    text_nll,
    weights,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "_quick_collection")

KINDS = [GradDiff, NPO, SimNPO]
# The newest versions have another name for it, and warn.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(transformers.TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
# transformers 4.45 does not say to torch 2.6 and later that there is a state of numpy's in a checkpoint.
NUMPY = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def _quick_collection():
    """Each training collects garbage, which takes longer than the training: not in what there is already."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def with_mixin(kind, **how):
    bases = (kind,) if issubclass(kind, GradientSynthesisMixin) else (GradientSynthesisMixin, kind)
    return type(f"Synthesizing{kind.__name__}", bases, {"synthesis": Synthesis(**how)})


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch):
    """Of each test: older versions leave that of one trainer to those after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()  # it has the data loader of a training that ended in an error


def steps_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


class Reporting(transformers.TrainerCallback):
    """As those of `report_to`."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


class Looking(transformers.TrainerCallback):
    """Looks at something after each step."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


def assert_unmoved(trainer):
    torch.testing.assert_close(weights(trainer.model), weights(llama()), rtol=0, atol=0)


def assert_trained_alike(model, expected, start=None, exact=True):
    """Within the rounding of a few steps, after having moved by much more.

    In fp32 every element is compared. In less, single elements go other ways where two gradients all but
    cancel, so it is the distance that counts, in that from the start: that of gradients after some 16
    roundings to bf16. With the weights of the two losses swapped, it is 0.3 to 0.7.
    """
    found, expected = weights(model), weights(expected)
    start = weights(llama() if start is None else start)
    flat, other, begin = (
        torch.cat([x[n].double().flatten() for n in start]) for x in (found, expected, start)
    )
    assert (other - begin).abs().max() > 5e-3
    assert (flat - other).norm() < rounding_error(16, BF16) * (other - begin).norm()
    if exact:
        torch.testing.assert_close(found, expected, rtol=0, atol=DRIFT)


def check_by_hand(kind, folder, rule="sago", model=llama, data=None, autocast=None, dtype=FP32, **options):
    """Trains with the mixin and by hand, and returns the trainer and the reports of the reference."""
    data = Pairs(8) if data is None else data
    trainer = make(with_mixin(kind, rule=rule), folder, model(dtype), data, **options)
    trainer.train()
    accumulation = options.get("gradient_accumulation_steps", 1)
    steps = windows(trainer.data_collator.batches, accumulation, len(data))[: trainer.state.max_steps]
    assert trainer.state.global_step == len(steps)
    expected = model(dtype)
    reports = by_hand(
        expected, LOSSES[kind], steps, rule, max_norm=options.get("max_grad_norm", 0.5), autocast=autocast
    )
    assert_trained_alike(trainer.model, expected, model(dtype), exact=dtype == FP32 and autocast is None)
    return trainer, reports


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("kind", "rule"),
    [*((GradDiff, rule) for rule in RULES), (NPO, "sago"), (NPO, "pcgrad"), (SimNPO, "sago")],
)
def test_trains_as_the_reference_by_hand(kind, rule, accumulation, tmp_path):
    """With clipping: at a norm of 0.5 it is active in most steps."""
    trainer, reports = check_by_hand(kind, tmp_path, rule, gradient_accumulation_steps=accumulation)
    norms = [log["grad_norm"] for log in steps_of(trainer)]
    # The gradients change by up to 10 times what the weights do.
    torch.testing.assert_close(
        norms, [report["norm_update"] for report in reports], rtol=10 * DRIFT, atol=DRIFT
    )
    assert max(norms) > 0.5


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "sum"])
@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_trains_as_the_reference_in_bf16(precision, rule, tmp_path):
    options = {"gradient_accumulation_steps": 2, "data": Pairs(4)}
    if precision == "autocast":
        check_by_hand(NPO, tmp_path, rule, autocast=BF16, bf16=True, **options)
    else:
        check_by_hand(NPO, tmp_path, rule, dtype=BF16, **options)


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_trains_as_the_reference_with_checkpointed_activations(reentrant, model, tmp_path):
    """GPT-2 has tied embeddings."""
    check_by_hand(
        SimNPO,
        tmp_path,
        model=model,
        data=Pairs(4),
        **{f"{CHECKPOINTING}": True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}},
    )


@pytest.mark.parametrize(("count", "accumulation"), [(6, 4), (3, 4), (5, 2)])
def test_windows_at_the_end_of_an_epoch(count, accumulation, tmp_path):
    """Shorter in newer versions; in 4.45 the last one goes on, unless the whole epoch is shorter than one."""
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    trainer, _ = check_by_hand(GradDiff, tmp_path, data=Pairs(count), **options)
    if hasattr(trainer, "_run_epoch"):  # older versions stop at the number of full windows
        assert trainer.state.global_step == 2 * -(-count // accumulation)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "fp32") for kind in KINDS), (GradDiff, "weights"), (NPO, "autocast")],
)
def test_the_sum_is_the_training_without_the_mixin(kind, precision, accumulation, tmp_path):
    dtype = BF16 if precision == "weights" else FP32
    options = {"bf16": precision == "autocast", "gradient_accumulation_steps": accumulation}
    count = 8 if precision == "fp32" else 2 * accumulation  # before the rounding of gradients adds up
    if precision == "weights":  # one step, long enough that the rounding of the weights does not show
        count, options["learning_rate"] = accumulation, 2.0**-4
    trainers = [
        make(each, tmp_path, llama(dtype), Pairs(count), **options)
        for each in (with_mixin(kind, rule="sum"), kind)
    ]
    for trainer in trainers:
        trainer.train()
    models = [trainer.model for trainer in trainers]
    assert_trained_alike(*models, llama(dtype), exact=precision == "fp32")
    losses, plain = ([log["loss"] for log in steps_of(trainer)] for trainer in trainers)
    assert len(losses) == count // accumulation
    # A loss changes by up to 10 times what the weights do. In bf16 it ends with a few roundings of its terms.
    rtol = 10 * DRIFT if precision == "fp32" else rounding_error(5, BF16)
    torch.testing.assert_close(losses, plain, rtol=rtol, atol=10 * DRIFT)


def test_resumes_from_a_checkpoint(tmp_path):
    """In the middle of an epoch, with nothing of its own in the checkpoint."""
    kind = with_mixin(NPO, rule="pcgrad")
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make(kind, tmp_path, **options)
    whole.train()
    again = make(kind, tmp_path, llama(seed=1), **options)
    again.ref_model = whole.ref_model
    with torch.serialization.safe_globals(NUMPY):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(again.data_collator.batches) < len(whole.data_collator.batches)
    assert_trained_alike(again.model, whole.model)
    plain = make(NPO, tmp_path / "plain", data=Pairs(4), **options)
    plain.train()
    names = [
        {file.name for file in (path / "checkpoint-2").iterdir()} for path in (tmp_path, tmp_path / "plain")
    ]
    assert names[0] == names[1]


def test_is_as_new_for_a_second_training(tmp_path):
    trainer = make(with_mixin(GradDiff), tmp_path, data=Pairs(3))
    trainer.train()
    assert trainer._synthesizer is None
    trainer.model.load_state_dict(llama().state_dict())
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    expected = llama()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches[3:], 1))
    assert_trained_alike(trainer.model, expected)


def test_logs_both_losses_and_the_last_report(tmp_path):
    reporting = Reporting()
    options = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_grad_norm": 1e9}
    options["callbacks"] = [reporting]
    trainer, reports = check_by_hand(GradDiff, tmp_path, **options)
    logs = steps_of(trainer)
    assert [log["step"] for log in logs] == [2, 4]
    assert reporting.logs[0].items() <= logs[0].items()
    assert "conflict_fraction" in reporting.logs[0]
    model, seen = llama(), []
    optimizer = adamw(model.parameters())
    for step in windows(trainer.data_collator.batches, 2):
        with torch.no_grad():
            each = [torch.stack(graddiff_losses(model, None, batch)) for batch in step[0]]
        seen.append(torch.stack(each).mean(0))
        by_hand(model, graddiff_losses, [step], max_norm=1e9, optimizer=optimizer)
    for i, log in enumerate(logs):
        losses = ((seen[2 * i] + seen[2 * i + 1]) / 2).tolist()
        assert_logged(log, dict(zip(("forget_loss", "retain_loss"), losses, strict=True)))
        report = reports[2 * i + 1]
        expected = {k: v for k, v in report.items() if k not in ("ff", "fr", "rr", "uu", "uf", "ur")}
        assert len(expected) == 9
        assert_logged(log, expected)


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "equal",
            "is_nonzero",
            "nonzero",
        )
        return func(*args, **(kwargs or {}))


def test_waits_for_the_device_only_to_log(tmp_path, monkeypatch):
    """`training_step` waits as often as without the mixin: the model does, for its mask.

    Without statistics, for which the backend of the CPU looks at sums.
    """
    counts = []
    for kind in (GradDiff, with_mixin(GradDiff, stats=False)):
        reads = Reads()

        class Watched(kind):
            def training_step(self, *args):
                with reads:  # noqa: B023
                    return super().training_step(*args)

        make(Watched, tmp_path, gradient_accumulation_steps=2, logging_steps=2).train()
        counts.append(reads.count)
    assert counts[0] == counts[1]

    trainer = make(with_mixin(GradDiff), tmp_path, gradient_accumulation_steps=2, logging_steps=2)
    read, steps = sago.SynthesisReport._read, []
    monkeypatch.setattr(
        sago.SynthesisReport,
        "_read",
        lambda report: (steps.append(trainer.state.global_step), read(report))[1],
    )
    trainer.train()
    assert set(steps) == {2, 4}


def test_logs_what_the_rule_needs_without_statistics(tmp_path):
    trainer = make(with_mixin(GradDiff, rule="pcgrad", stats=False), tmp_path, data=Pairs(2))
    trainer.train()
    logged = set(steps_of(trainer)[0])
    assert {"forget_loss", "retain_loss", "cos_forget_retain", "norm_retain"} <= logged
    assert "conflict_fraction" not in logged


def test_leaves_the_logs_of_others_alone(tmp_path):
    """A trainer may log on one rank alone, where an average over ranks would wait for the others."""

    class Talking(GradDiff):
        def compute_unlearn_loss(self, model, inputs, return_outputs=False):
            self.log({"loss": 1.0, "mine": 2.0})
            return super().compute_unlearn_loss(model, inputs, return_outputs)

    trainer = make(with_mixin(Talking), tmp_path, data=Pairs(4), logging_steps=2)
    trainer.train()
    logs = steps_of(trainer)
    assert ["forget_loss" in log for log in logs] == [False, False, True] * 2
    assert ["mine" in log for log in logs] == [True, True, False] * 2


def test_evaluation_is_the_trainers(tmp_path):
    """Before, between and after steps, with plain numbers as weights and no gradient captured."""
    found = []

    class Evaluated(SimNPO):
        def compute_unlearn_loss(self, model, inputs, return_outputs=False):
            if not model.training:
                found.append((type(self.gamma), type(self.alpha), return_outputs))
            return super().compute_unlearn_loss(model, inputs, return_outputs)

    options = {"eval_dataset": Texts(3), "eval_strategy": "steps", "eval_steps": 1, "data": Pairs(4)}
    trainers = [make(kind, tmp_path, **options) for kind in (with_mixin(Evaluated, rule="sum"), SimNPO)]
    results = []
    for trainer in trainers:
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        results.append([before, *losses, trainer.evaluate()["eval_loss"]])
    assert len(results[0]) == 6
    torch.testing.assert_close(*results, rtol=10 * DRIFT, atol=DRIFT)
    assert set(found) == {(float, float, True)}
    assert all("forget_loss" not in log for log in trainers[0].state.log_history if "eval_loss" in log)


def variant(compute):
    """A trainer with another loss, `compute(self, forget_loss, retain_loss)`."""

    class Variant(GradDiff):
        def compute_unlearn_loss(self, model, inputs, return_outputs=False):
            loss = compute(self, *graddiff_losses(model, None, inputs))
            return (loss, None) if return_outputs else loss

    return Variant


FORMS = {
    "loss first": lambda self, f, r: f * self.gamma + r * self.alpha,
    "times a number": lambda self, f, r: self.alpha * 0.5 * (2.0 * r) + 4 * self.gamma * (f / 4),
    "negated": lambda self, f, r: -self.gamma * -f + (-1 * -self.alpha) * r,
    "numpy": lambda self, f, r: np.float32(2) * self.gamma * (f / 2) + self.alpha * np.float64(0.5) * (2 * r),
    "divided": lambda self, f, r: self.gamma / 2 * (2 * f) + r * (self.alpha / 4 * 4),
    "functions": lambda self, f, r: torch.mul(f, self.gamma) + r.mul(self.alpha),
    "scaled together": lambda self, f, r: (self.gamma * f + self.alpha * r) * 3 / 3,
    "texts": lambda self, f, r: (self.gamma * torch.stack([f, f]) + self.alpha * torch.stack([r, r])).mean(),
    "in parts": lambda self, f, r: self.gamma * (0.25 * f) + self.gamma * (0.75 * f) + self.alpha * r,
    "looked at": lambda self, f, r: (self.gamma * f).detach() * 0 + self.gamma * f + self.alpha * r,
    "counted": lambda self, f, r: self.gamma * torch.arange(2)[0] + self.gamma * f + self.alpha * r,
    "added in place": lambda self, f, r: (self.gamma * f).add_(self.alpha * r),
    "scaled in place": lambda self, f, r: (self.gamma * (2 * f)).div_(2) + (self.alpha * r).mul_(1),
    "integers": lambda self, f, r: self.gamma * (GAMMA * f) + self.alpha * (ALPHA * r),
}


@pytest.mark.parametrize("form", FORMS)
def test_finds_the_losses_in(form, tmp_path):
    trainer = make(with_mixin(variant(FORMS[form])), tmp_path, data=Pairs(4), gradient_accumulation_steps=2)
    if form == "integers":
        trainer.gamma = trainer.alpha = 1
    trainer.train()
    steps = windows(trainer.data_collator.batches, 2)
    expected = llama()
    losses = LOSSES[GradDiff]
    if form == "integers":
        losses = lambda *args: [x * w for x, w in zip(graddiff_losses(*args), (GAMMA, ALPHA), strict=True)]  # noqa: E731
    by_hand(expected, losses, steps, weights=(1, 1) if form == "integers" else (GAMMA, ALPHA))
    assert_trained_alike(trainer.model, expected)


class WithLosses(GradDiff):
    """Uses its weights in no way that could be recognised."""

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        assert not model.training
        return super().compute_unlearn_loss(model, inputs, return_outputs)

    def compute_losses(self, model, inputs):
        assert type(self.gamma) is float
        return graddiff_losses(model, None, inputs)


class OneForward(GradDiff):
    def compute_losses(self, model, inputs):
        both = {k: torch.cat([inputs[side][k] for side in ("forget", "retain")]) for k in inputs["forget"]}
        labels = both.pop("labels")
        forget, retain = text_nll(model(**both).logits, {"labels": labels}).tensor_split(2)
        return -forget.mean() / (LENGTH - 2), retain.mean() / (LENGTH - 2)


def averaged(batches, accumulation):
    """Returns `windows` with averaged losses. transformers 4.51 does not divide other losses."""
    return [(window, len(window)) for window, _ in windows(batches, accumulation)]


@pytest.mark.parametrize("kind", [WithLosses, OneForward])
def test_takes_the_losses_from_compute_losses(kind, tmp_path):
    options = {"data": Pairs(4), "gradient_accumulation_steps": 2}
    trainer = make(with_mixin(kind, rule="pcgrad"), tmp_path, eval_dataset=Texts(2), **options)
    trainer.train()
    expected = llama()
    by_hand(expected, graddiff_losses, averaged(trainer.data_collator.batches, 2), "pcgrad")
    assert_trained_alike(trainer.model, expected)
    trainer.evaluate()
    assert "compute_loss" not in vars(trainer)


class Labelled(Collator):
    """With labels at the top of the batch, which newer versions count the items of a window by."""

    def __call__(self, items):
        batch = super().__call__(items)
        return {**batch, "labels": batch["forget"]["labels"]} if "forget" in batch else batch


@pytest.mark.parametrize("says_scaled", [None, True, False, "by a function"])
def test_losses_from_compute_losses_are_averaged_over_a_window(says_scaled, tmp_path):
    """However the trainer divides: they are means over a micro-batch. Clipped, so that a factor shows.

    A trainer may say of its own `compute_loss`, which does not run, that it divides by the accumulation.
    """
    trainer = make(with_mixin(WithLosses, rule="pcgrad"), tmp_path, gradient_accumulation_steps=4)
    trainer.data_collator = Labelled()
    if says_scaled == "by a function":
        trainer.compute_loss_func = lambda *args, **kwargs: pytest.fail("compute_losses comes first")
    else:
        trainer.loss_is_scaled_for_ga = says_scaled
    trainer.train()
    assert says_scaled == "by a function" or trainer.loss_is_scaled_for_ga is says_scaled
    expected = llama()
    steps = averaged(trainer.data_collator.batches, 4)
    reports = by_hand(expected, graddiff_losses, steps, "pcgrad")
    norms = [log["grad_norm"] for log in steps_of(trainer)]
    torch.testing.assert_close(
        norms, [report["norm_update"] for report in reports], rtol=10 * DRIFT, atol=DRIFT
    )
    assert_trained_alike(trainer.model, expected)


class Older(GradDiff):
    """Has the `compute_loss` of transformers before 4.46, like the trainers of OpenUnlearning."""

    def compute_loss(self, model, inputs, return_outputs=False):
        return self.compute_unlearn_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_without_the_number_of_items_is_averaged_over_a_window(accumulation, tmp_path):
    trainer = make(with_mixin(Older, rule="pcgrad"), tmp_path, gradient_accumulation_steps=accumulation)
    trainer.data_collator = Labelled()
    trainer.train()
    expected = llama()
    steps = averaged(trainer.data_collator.batches, accumulation)
    reports = by_hand(expected, graddiff_losses, steps, "pcgrad")
    norms = [log["grad_norm"] for log in steps_of(trainer)]
    torch.testing.assert_close(
        norms, [report["norm_update"] for report in reports], rtol=10 * DRIFT, atol=DRIFT
    )
    assert_trained_alike(trainer.model, expected)
    assert "compute_loss" not in vars(trainer)


class Renamed(WithLosses):
    """Divides losses as a Trainer would that asks an attribute of another name."""

    factor = 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) * self.factor
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(("factor", "found"), [(1.0, "1"), (0.25, "0.25")])
def test_refuses_losses_that_are_not_averaged_over_a_window(factor, found, tmp_path):
    """Before a gradient is written."""
    trainer = make(with_mixin(Renamed), tmp_path, data=Pairs(4), gradient_accumulation_steps=2)
    trainer.factor = factor
    with pytest.raises(
        RuntimeError, match=rf"the factor 0\.5, .* 2 micro-batches.* Found {found}\. .*accumulation_steps=1"
    ):
        trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert_unmoved(trainer)


def test_the_scale_of_the_losses_is_read_once(tmp_path):
    """A training with `compute_losses` waits for the device in its first micro-batch, and then no more."""
    counts = []
    for kind in (GradDiff, WithLosses):
        reads, each = Reads(), []

        class Watched(with_mixin(kind, stats=False)):
            def training_step(self, *args):
                reads.count = 0  # noqa: B023
                with reads:  # noqa: B023
                    loss = super().training_step(*args)
                each.append(reads.count)  # noqa: B023
                return loss

        make(Watched, tmp_path, data=Pairs(8), gradient_accumulation_steps=2).train()
        counts.append(each)
    plain, own = counts
    assert len(plain) == 8
    assert own[0] > plain[0]
    assert own[1:] == plain[1:]


class Apart(GradientSynthesisMixin, GradDiff):
    """Computes its losses apart, the retain loss by the method that it inherits."""

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        assert not model.training
        return super().compute_unlearn_loss(model, inputs, return_outputs)

    def compute_forget_loss(self, model, forget_inputs):
        assert type(self.gamma) is float
        return -model(**forget_inputs).loss


def with_dropout(dtype=FP32):
    model = llama(dtype)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def assert_same_training(kinds, folder, model=llama, count=3, **options):
    """Weights, losses, norms and reports, bit for bit. Clipped, and after several steps."""
    trainers = []
    for kind in kinds:
        trainer = make(kind, folder, model(), Pairs(count), **options)
        transformers.set_seed(0)
        trainer.train()
        trainers.append(trainer)
    first, other = trainers
    assert max(log["grad_norm"] for log in steps_of(first)) > 0.5
    times = {"epoch", "step", "learning_rate", "loss"}
    logs = [[{k: v for k, v in log.items() if k not in times} for log in steps_of(t)] for t in trainers]
    assert {"forget_loss", "retain_loss", "grad_norm"} <= set(logs[0][0])
    assert logs[0] == logs[1]
    losses = [[log["loss"] for log in steps_of(t)] for t in trainers]
    # With accumulation the losses are divided before they are added, or afterwards.
    torch.testing.assert_close(*losses, rtol=rounding_error(4, FP32), atol=rounding_error(4, FP32))
    torch.testing.assert_close(weights(first.model), weights(other.model), rtol=0, atol=0)
    assert any(
        not torch.equal(p, q) for p, q in zip(first.model.parameters(), model().parameters(), strict=True)
    )


@pytest.mark.parametrize(("accumulation", "autocast"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_losses_apart_train_with_the_bits_of_losses_together(rule, accumulation, autocast, tmp_path):
    """The model has dropout. Both trainers draw its random numbers in the same order."""
    kinds = [with_mixin(kind, rule=rule) for kind in (WithLosses, Apart)]
    options = {"count": 4, "gradient_accumulation_steps": accumulation, "bf16": autocast}
    assert_same_training(kinds, tmp_path, with_dropout, **options)


@pytest.mark.parametrize(
    ("kind", "dtype", "how", "options"),
    [
        (GradDiff, FP32, {"rule": "sago"}, {}),
        (NPO, BF16, {"rule": "sago_prefer_retain", "stats": False}, {}),
        (SimNPO, FP32, {"rule": "pcgrad", "groups": lambda name: name[:14]}, {}),
        (Apart, BF16, {"rule": "pcgrad"}, {"max_grad_norm": 0.25}),
        (Apart, FP32, {"rule": "sago"}, {"bf16": True}),
        (WithLosses, FP32, {"rule": "ties"}, {"bf16": True}),
        (Apart, FP32, {"rule": "sago"}, {f"{CHECKPOINTING}": True}),
        (Apart, FP32, {"rule": "sago", "retain_floor": 0.5}, {}),
    ],
)
def test_one_copy_trains_with_the_bits_of_two(kind, dtype, how, options, tmp_path):
    sizes = []

    def sized(**how):
        class Sized(with_mixin(kind, **how)):
            def log(self, *args):
                sizes.append(self._synthesizer and self._synthesizer._buckets.nbytes)
                super().log(*args)

        return Sized

    kinds = [sized(**how), sized(one_copy=True, **how)]
    model = gpt2 if CHECKPOINTING in options else llama  # whose embeddings are tied
    assert_same_training(kinds, tmp_path, lambda: model(dtype), **options)
    two, one = dict.fromkeys(filter(None, sizes))
    assert two == 2 * one


@pytest.mark.parametrize(
    ("rule", "warns"),
    [("sago", True), ("pcgrad", True), ("ties", True), ("sum", False), ("ngdiff", False), ("blur", False)],
)
def test_a_retain_weight_of_0_is_reported_once_if_the_rule_reads_the_retain_gradient(
    rule, warns, tmp_path, caplog
):
    """OpenUnlearning's UNDIAL is configured with 0. `ngdiff` and `blur` are then multiples of f."""
    once.warned.clear()
    trainer = make(with_mixin(GradDiff, rule=rule), tmp_path, data=Pairs(4))
    trainer.alpha = 0.0
    trainer.train()
    assert trainer.state.global_step > 1
    told = [record.message for record in caplog.records if "`self.alpha` is 0" in record.message]
    assert len(told) == warns
    assert all(f"{rule!r}" in text and "rule='sum'" in text for text in told)


@pytest.mark.parametrize("one_copy", [False, True])
def test_no_element_conflicts_below_a_high_floor(one_copy, tmp_path):
    trainer = make(with_mixin(Apart, retain_floor=1e6, one_copy=one_copy), tmp_path)
    trainer.train()
    assert [log["conflict_fraction"] for log in steps_of(trainer)] == [0.0] * trainer.state.max_steps


def fail(gradient=None):
    raise torch.OutOfMemoryError("The texts are too long.")


class Skipping:
    """Skips a batch whose retain loss, or its backward, is too large for the memory: the second one."""

    calls = 0
    place: str

    def compute_retain_loss(self, model, retain_inputs):
        self.calls += 1
        if self.calls == 2 and self.place == "forward":
            fail()
        loss = super().compute_retain_loss(model, retain_inputs)
        if self.calls == 2:
            loss.register_hook(fail)  # before the backward reaches a parameter
        return loss

    def training_step(self, *args):
        try:
            return super().training_step(*args)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            return torch.zeros(())


class Together(Apart):
    def compute_losses(self, model, inputs):
        forget_loss = self.compute_forget_loss(model, inputs["forget"])
        return forget_loss, self.compute_retain_loss(model, inputs["retain"])


def skipping(kind, place, **how):
    return type("Trainer", (Skipping, with_mixin(kind, **how)), {"place": place})


FAILURES = [(Apart, "forward"), (Apart, "backward"), (Together, "backward")]


@pytest.mark.parametrize("one_copy", [False, True])
@pytest.mark.parametrize(("kind", "place"), FAILURES)
def test_a_batch_is_skipped_after_an_error_on_the_retain_side(kind, place, one_copy, tmp_path):
    """Nothing of it is left: an error in `compute_losses` comes before the first gradient of the batch."""
    trainers = []
    for case in ((Together, "forward"), (kind, place)):
        # There is a batch since the last log when the second one fails.
        trainer = make(skipping(*case, one_copy=one_copy), tmp_path, data=Pairs(3), logging_steps=3)
        trainer.train()
        assert trainer.calls == trainer.state.global_step == 3
        trainers.append(trainer)
    expected, found = trainers
    assert steps_of(found)[-1] == steps_of(expected)[-1]
    torch.testing.assert_close(weights(found.model), weights(expected.model), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "place"), FAILURES)
def test_the_first_micro_batch_of_a_window_can_be_skipped(kind, place, tmp_path):
    reports = []
    for case in ((Together, "forward"), (kind, place)):
        trainer = make(skipping(*case), tmp_path, data=Pairs(3), gradient_accumulation_steps=3)
        trainer.calls = 1  # so that the first one is skipped
        trainer.train()
        reports.append(trainer.synthesis_report.summary())
    assert reports[0] == reports[1]


@pytest.mark.parametrize(("kind", "place"), FAILURES)
def test_a_later_micro_batch_of_a_window_cannot_be_skipped(kind, place, tmp_path):
    trainer = make(skipping(kind, place), tmp_path, data=Pairs(6), gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"after the first one of its window ended in OutOfMemoryError"):
        trainer.train()
    assert trainer.calls == 2
    assert_unmoved(trainer)


class Saved:
    """A tensor that is saved for a backward."""

    def __init__(self, tensor):
        self.tensor = tensor


def peak_of_activations(kind, folder):
    """The largest number of bytes that was saved for backwards at a time, without the parameters."""
    model, live, found = llama(), weakref.WeakSet(), []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        live.add(saved := Saved(tensor))
        storages = {s.data_ptr(): s.nbytes() for s in (x.tensor.untyped_storage() for x in live)}
        found.append(sum(n for pointer, n in storages.items() if pointer not in own))
        return saved

    class Measured(kind):
        def training_step(self, *args):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
                return super().training_step(*args)

    make(Measured, folder, model, Pairs(2)).train()
    assert not live
    return max(found)


@pytest.mark.parametrize("one_copy", [False, True])
def test_the_activations_of_one_loss_are_held_at_a_time(one_copy, tmp_path):
    """The larger of the two, and not their sum. The forget texts are shorter here."""

    class Shorter(Apart):
        def compute_forget_loss(self, model, forget_inputs):
            return -model(**{k: v[:, :4] for k, v in forget_inputs.items()}).loss

    class Together(Shorter):
        def compute_losses(self, model, inputs):
            retain_loss = self.compute_retain_loss(model, inputs["retain"])
            return self.compute_forget_loss(model, inputs["forget"]), retain_loss

    class RetainAlone(Apart):
        def compute_forget_loss(self, model, forget_inputs):
            return model.lm_head.weight.sum()  # saves nothing

    apart, together, retain = (
        peak_of_activations(with_mixin(kind, rule="sago", one_copy=one_copy), tmp_path)
        for kind in (Shorter, Together, RetainAlone)
    )
    assert apart == retain
    assert together > 1.4 * retain


class Fork(GradDiff):
    """Has methods of these names that do not follow the mixin, as some forks of OpenUnlearning do."""

    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        forget_loss, outputs = self.compute_forget_loss(model, inputs["forget"])
        retain_loss = self.compute_retain_loss(model, inputs["retain"])
        loss = self.gamma * -forget_loss + self.alpha * retain_loss
        return (loss, outputs) if return_outputs else loss

    def compute_forget_loss(self, model, forget_inputs):
        outputs = model(**forget_inputs)
        return outputs.loss, outputs


def test_methods_of_a_trainer_that_does_not_know_the_mixin_are_its_own(tmp_path):
    """`compute_loss` calls them, with the sign and the outputs that it expects."""
    assert_same_training([with_mixin(kind) for kind in (Fork, GradDiff)], tmp_path)

    class Both(Apart):
        def compute_losses(self, model, inputs):
            return graddiff_losses(model, None, inputs)

        def compute_forget_loss(self, model, forget_inputs):
            raise AssertionError

    assert_same_training([Both, Apart], tmp_path)


def returning(forget=lambda loss: loss, retain=lambda loss: loss):
    class Returning(Apart):
        def compute_forget_loss(self, model, forget_inputs):
            return forget(super().compute_forget_loss(model, forget_inputs))

        def compute_retain_loss(self, model, retain_inputs):
            return retain(super().compute_retain_loss(model, retain_inputs))

    return Returning


class Merged(Collator):
    """One batch of both texts."""

    def __call__(self, items):
        return super().__call__(items)["forget"]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            returning(lambda x: (x, None)),
            TypeError,
            r"compute_forget_loss should return a tensor.*Found tuple",
        ),
        (
            returning(retain=lambda x: x.detach()),
            TypeError,
            r"compute_retain_loss .*Found one without a gradient",
        ),
        (returning(retain=lambda x: x[None]), ValueError, r"the shape \(\), as .*Found \(1,\)"),
        (None, ValueError, r'the keys "forget" and "retain".*Found \[.attention_mask.*compute_losses'),
    ],
)
def test_says_what_losses_apart_should_be(kind, error, message, tmp_path):
    trainer = make(Apart if kind is None else kind, tmp_path, data=Pairs(2))
    if kind is None:
        trainer.data_collator = Merged()
    with pytest.raises(error, match=message):
        trainer.train()
    assert_unmoved(trainer)


def test_weights_are_1_where_a_trainer_with_compute_losses_has_none(tmp_path):
    class Weightless(WithLosses):
        def compute_losses(self, model, inputs):
            return graddiff_losses(model, None, inputs)

    trainer = make(with_mixin(Weightless), tmp_path, data=Pairs(2))
    del trainer.gamma, trainer.alpha
    trainer.train()
    expected = llama()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, 1), weights=(1, 1))
    assert_trained_alike(trainer.model, expected)


def test_a_weight_of_0_switches_a_side_off(tmp_path):
    trainer = make(with_mixin(GradDiff, rule="sum"), tmp_path, data=Pairs(2))
    trainer.gamma = 0
    trainer.train()
    expected = llama()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, 1), "sum", weights=(0, ALPHA))
    assert_trained_alike(trainer.model, expected)


def test_weights_that_a_trainer_changes_stay_changed(tmp_path):
    """Between the windows; and the first one's is a class attribute again."""

    class Scheduled(variant(FORMS["loss first"])):
        alpha = 2.0

        def compute_unlearn_loss(self, model, inputs, return_outputs=False):
            loss = super().compute_unlearn_loss(model, inputs, return_outputs)
            self.gamma = self.gamma * 0.5
            return loss

    trainer = make(with_mixin(Scheduled), tmp_path, data=Pairs(3))
    del trainer.alpha
    trainer.train()
    assert trainer.gamma == GAMMA / 8
    assert type(trainer.gamma) is float
    assert "alpha" not in vars(trainer)
    assert trainer.alpha == 2.0


def test_a_weight_that_was_kept_is_a_number(tmp_path):
    """It holds on to no graph, and cuts none in the next step."""
    kept = []

    def compute(self, f, r):
        kept.append(self.gamma)
        return kept[0] * f + self.alpha * r if len(kept) == 2 else self.gamma * f + self.alpha * r

    trainer = make(with_mixin(variant(compute)), tmp_path, data=Pairs(2))
    with pytest.raises(ValueError, match=r"no product.*`self.gamma`"):
        trainer.train()
    assert kept[0] == GAMMA
    assert kept[0].products is None


NOT_SEEN = {
    "added to": (lambda self, f, r: (self.gamma + 1.0) * f + self.alpha * r, r"no product.*`self.gamma`"),
    "forget alone": (lambda self, f, r: f + self.alpha * r, r"no product.*`self.gamma`.*leaves the forget"),
    "shortcut": (
        lambda self, f, r: self.gamma * f if self.state.global_step < 1 else self.gamma * f + self.alpha * r,
        r"no product.*`self.alpha`.*leaves the retain loss out.*compute_losses",
    ),
    "in place": (lambda self, f, r: (f * 1).mul_(self.gamma) + self.alpha * r, r"no product.*`self.gamma`"),
    "alpha of add": (lambda self, f, r: torch.add(self.gamma * f, r, alpha=self.alpha), r"`self.alpha`"),
    "constant": (lambda self, f, r: self.gamma * f + self.alpha * r.detach(), r"no product.*`self.alpha`"),
    "not used": (
        lambda self, f, r: (self.gamma * f).detach() + self.alpha * r,
        r"the loss does not contain the product with `self.gamma`",
    ),
    "regularised": (
        lambda self, f, r: self.gamma * f + self.alpha * r + next(self.model.parameters()).square().sum(),
        r"embed_tokens.*should be None.*Either the loss has another term",
    ),
    "weight inside": (
        lambda self, f, r: self.gamma * (f + self.gamma * f * f) + self.alpha * r,
        r"inside a loss, which cuts its gradient off",
    ),
    "third task": (
        lambda self, f, r: self.gamma * f + self.alpha * r + 0.5 * r,
        r"Either the loss has another term",
    ),
    "no parameter": (
        lambda self, f, r: self.gamma * torch.ones((), requires_grad=True) + self.alpha * r,
        r"A forget capture should have a backward in it that reaches a parameter",
    ),
}


@pytest.mark.parametrize("form", NOT_SEEN)
def test_says_which_loss_it_did_not_find(form, tmp_path):
    compute, message = NOT_SEEN[form]
    trainer = make(with_mixin(variant(compute)), tmp_path, data=Pairs(2))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert (type(trainer.gamma), type(trainer.alpha)) == (float, float)
    assert_unmoved(trainer)


class Probing(transformers.TrainerCallback):
    """Computes a gradient, and leaves it there."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        next(model.parameters()).sum().backward()


def test_says_that_a_callback_left_a_gradient(tmp_path):
    trainer = make(with_mixin(GradDiff), tmp_path, data=Pairs(2), callbacks=[Probing()])
    with pytest.raises(ValueError, match=r"or other code ran a backward, for example a callback"):
        trainer.train()
    assert_unmoved(trainer)


def test_refuses_weights_that_are_no_numbers(tmp_path):
    trainer = make(with_mixin(GradDiff), tmp_path)
    trainer.alpha = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"`self.alpha` should be a number.*Found Tensor"):
        trainer.train()
    del trainer.gamma
    with pytest.raises(ValueError, match=r"`self.gamma` should be a number.*Found none.*compute_losses"):
        trainer.train()


def test_refuses_a_weight_that_is_replaced_before_its_product(tmp_path):

    class Restless(GradDiff):
        def compute_unlearn_loss(self, model, inputs, return_outputs=False):
            self.gamma = self.gamma + 0.5
            return super().compute_unlearn_loss(model, inputs, return_outputs)

    kind = with_mixin(Restless)
    with pytest.raises(ValueError, match=r"`self.gamma` should be multiplied|no product"):
        make(kind, tmp_path).train()  # it is no longer the one that notes


def halved(self):
    """Halves gamma after the first micro-batch of two, and restores it after the second."""
    self.gamma = 0.5 * GAMMA if self.gamma == GAMMA else GAMMA


class Halving(variant(lambda self, f, r: (self.gamma * f + self.alpha * r, halved(self))[0])):
    pass


class HalvingInLosses(GradDiff):
    """Sets the weights of a micro-batch in the method that computes its losses."""

    seen = 0

    def compute_losses(self, model, inputs):
        self.gamma = GAMMA if self.seen % 2 == 0 else 0.5 * GAMMA
        self.seen += 1
        return graddiff_losses(model, None, inputs)


class HalvingApart(Apart):
    seen = 0

    def compute_forget_loss(self, model, forget_inputs):
        self.gamma = GAMMA if self.seen % 2 == 0 else 0.5 * GAMMA
        self.seen += 1
        return super().compute_forget_loss(model, forget_inputs)


class HalvedLosses(GradDiff):
    """The same with constant weights: half of the forget loss of every second micro-batch."""

    seen = 0

    def compute_losses(self, model, inputs):
        forget, retain = graddiff_losses(model, None, inputs)
        self.seen += 1
        return forget * (1.0 if self.seen % 2 else 0.5), retain


@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
@pytest.mark.parametrize("kind", [Halving, HalvingInLosses, HalvingApart])
def test_weights_that_change_within_a_window(kind, rule, tmp_path):
    """The weights of each micro-batch are in its gradients, relative to those of the first one."""
    found = []
    for other in (kind, HalvedLosses):
        trainer = make(with_mixin(other, rule=rule), tmp_path, data=Pairs(4), gradient_accumulation_steps=2)
        trainer.train()
        found.append(trainer)
    assert_trained_alike(found[0].model, found[1].model)


def test_a_weight_that_is_0_first_cannot_become_another_within_a_window(tmp_path):
    kind = variant(lambda self, f, r: (self.gamma * f + self.alpha * r, setattr(self, "gamma", 0.5))[0])
    trainer = make(with_mixin(kind), tmp_path, gradient_accumulation_steps=2)
    trainer.gamma = 0.0
    with pytest.raises(ValueError, match=r"`self.gamma` should not become 0\.5 in a later micro-batch"):
        trainer.train()


def test_a_weight_that_changes_in_the_retain_loss_is_refused(tmp_path):
    class Late(Apart):
        def compute_retain_loss(self, model, retain_inputs):
            self.alpha = 2.0
            return super().compute_retain_loss(model, retain_inputs)

    with pytest.raises(
        ValueError, match=r"`self.alpha` should not change in compute_retain_loss.*Found 2\.0"
    ):
        make(with_mixin(Late), tmp_path).train()


def test_refuses_a_trainer_whose_private_loop_was_renamed():
    class Renamed:
        def training_step(self, model, inputs):
            raise AssertionError

    trainer = type("Trainer", (GradientSynthesisMixin, Renamed), {})()
    with pytest.raises(RuntimeError, match=r"`_inner_training_loop` of transformers\.Trainer.* Found none"):
        trainer.training_step(torch.nn.Linear(1, 1), {})


def test_refuses_a_step_without_synthesis(tmp_path):
    """Where a training loop does not say that a window ends, the optimizer would step without gradients."""
    trainer = make(with_mixin(GradDiff), tmp_path)

    class Silent(type(trainer)):
        def training_step(self, *args):
            self.accelerator.gradient_state._set_sync_gradients(False)
            return super().training_step(*args)

    trainer.__class__ = Silent
    with pytest.raises(ValueError, match=r"`accelerator.sync_gradients`.*Found that step 0 ended without it"):
        trainer.train()


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo"])
def test_refuses_optimizers_that_step_in_the_backward(optim, tmp_path):
    trainer = make(with_mixin(GradDiff), tmp_path)
    trainer.args.optim = optim
    trainer.create_optimizer = lambda *args: setattr(
        trainer, "optimizer", torch.optim.SGD(trainer.model.parameters(), 0.1)
    )
    with pytest.raises(ValueError, match=rf"`optim` should step after the backward.*{optim}"):
        trainer.train()


def test_refuses_context_parallelism(tmp_path, monkeypatch):
    """Its backward belongs in its context, and the two of the mixin come behind it."""
    parallelism = pytest.importorskip("accelerate.parallelism_config", reason="accelerate before 1.10")
    trainer = make(with_mixin(GradDiff), tmp_path)
    state = trainer.accelerator.state
    monkeypatch.setattr(state, "parallelism_config", parallelism.ParallelismConfig(cp_size=1))
    adapter.check_supported(trainer)
    monkeypatch.setattr(state, "parallelism_config", parallelism.ParallelismConfig(cp_size=2))
    with pytest.raises(ValueError, match=r"without context parallelism.*Found cp_size > 1"):
        synthesizer.Synthesizer(trainer, trainer.model, Tally())


def trainer_with(**accelerator):
    return SimpleNamespace(
        args=SimpleNamespace(optim="adamw_torch"), accelerator=SimpleNamespace(**accelerator)
    )


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [("parallelism_config", {}), ("cp_enabled", {"parallelism_config": SimpleNamespace()})],
)
def test_context_parallelism_that_cannot_be_recognised_is_an_error(name, accelerator, monkeypatch):
    """In accelerate 1.10 and later, which has it."""
    monkeypatch.setattr(accelerate, "__version__", "1.10.0.dev0")
    with pytest.raises(RuntimeError, match=rf"accelerate should have .*SimpleNamespace\.{name}`"):
        adapter.check_supported(trainer_with(**accelerator))
    monkeypatch.setattr(accelerate, "__version__", "1.9.1")
    adapter.check_supported(trainer_with())
    adapter.check_supported(trainer_with(parallelism_config=None))


def test_an_engine_without_the_wrapper_of_accelerate_is_an_error(monkeypatch):
    """The engine would otherwise step in each backward of the trainer."""

    class Engine:
        pass

    plain, name = torch.nn.Linear(1, 1), "deepspeed_engine_wrapped"
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=Engine))
    assert adapter.engine_of(SimpleNamespace(), plain) is None
    assert adapter.engine_of(SimpleNamespace(**{name: None}), plain) is None
    assert adapter.engine_of(SimpleNamespace(**{name: "wrapper"}), Engine()) == "wrapper"
    with pytest.raises(RuntimeError, match=rf"accelerate should have .*SimpleNamespace\.{name}`"):
        adapter.engine_of(SimpleNamespace(), Engine())
    with pytest.raises(ValueError, match=rf"{name}` should be.*Found None.*accelerator\.prepare"):
        adapter.engine_of(SimpleNamespace(**{name: None}), Engine())


def test_the_backward_of_accelerate_calls_the_wrapper():
    assert "self.deepspeed_engine_wrapped.backward(" in inspect.getsource(accelerate.Accelerator.backward)


def test_a_term_that_reaches_a_parameter_of_an_engine_is_found():
    """In the graph that torch makes, because the engine's hooks would run in a backward."""
    free, p, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    engineless = synthesizer._Engineless([("layer.p", p), ("frozen", frozen)], {})
    cut = torch.ones(2, requires_grad=True)
    engineless.backward((cut * free.detach()).sum())
    assert (cut.grad == 1.0).all()
    for loss in (p.sum(), (cut + p * 2.0).sum(), (cut * p.view_as(cut).exp()).sum()):
        with pytest.raises(ValueError, match=r"another term, which reaches parameter `layer\.p`"):
            engineless.backward(loss)
    assert p.grad is None


def test_the_trainer_has_the_names_that_the_mixin_replaces():
    """In `training_step`, which decides by them whether it divides the loss."""
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    code = inspect.getsource(transformers.Trainer.training_step)
    assert callable(transformers.Trainer._inner_training_loop)
    assert "with self.compute_loss_context_manager():" in code
    assert "self.compute_loss(" in code
    assert hasattr(transformers.Trainer, "get_batch_samples") is (version > (4, 45))
    if version > (4, 46):
        assert "self.model_accepts_loss_kwargs" in code
        assert "self.compute_loss_func" in code
    if version >= (4, 55):
        assert "self.current_gradient_accumulation_steps" in code
    if version >= (5, 20):
        assert "self.loss_is_scaled_for_ga" in code


def test_refuses_to_be_the_last_of_the_bases():
    """Its methods would never be called, and the training would be that without it."""
    with pytest.raises(TypeError, match=r"before the trainer in the bases of Behind. Found Trainer before"):

        class Behind(GradDiff, GradientSynthesisMixin):
            pass

    class Alone(GradientSynthesisMixin):
        pass

    class Ahead(Alone, GradDiff):
        pass


def test_options_are_checked_when_they_are_written():
    with pytest.raises(ValueError, match=r"`rule` should be"):
        Synthesis(rule="sagoo")
    with pytest.raises(TypeError, match=r"`groups` should be None or a function"):
        Synthesis(groups=["a"])
    with pytest.raises(ValueError, match=r"`nonfinite` should be 'propagate' or"):
        Synthesis(nonfinite="zero")
    for name in ("stats", "one_copy"):
        with pytest.raises(TypeError, match=rf"`{name}` should be True or False\. Found 'false'"):
            Synthesis(**{name: "false"})
    with pytest.raises(ValueError, match=r"`retain_floor` should be 0 for a rule without a gate"):
        Synthesis(rule="pcgrad", retain_floor=0.1)
    refused = {
        "rule='pcgrad_global'": {"rule": "pcgrad_global"},
        "rule='gradvac'": {"rule": "gradvac"},
        "nonfinite='zero_update'": {"nonfinite": "zero_update"},
        "accumulate_dtype=torch.float32": {"accumulate_dtype": FP32},
    }
    for found, how in refused.items():
        Synthesis(**how)
        with pytest.raises(
            ValueError, match=rf"`one_copy` should be False with {found}.*Leave `one_copy` out"
        ):
            Synthesis(one_copy=True, **how)


def test_options_from_a_configuration(tmp_path):
    """The mapping is an argument of the constructor, or an attribute of the class."""
    options = {"rule": "pcgrad", "groups": "layer", "stats": False}

    class Configured(GradientSynthesisMixin, GradDiff):
        pass

    class Named(Configured):
        synthesis = options

    by_hand = with_mixin(GradDiff, rule="pcgrad", groups=lambda name: re.sub(r"(\.\d+)\..*", r"\1", name))
    trainers = [make(kind, tmp_path) for kind in (by_hand, partial(Configured, synthesis=options), Named)]
    for trainer in trainers:
        trainer.train()
    expected, *found = (weights(trainer.model) for trainer in trainers)
    for other in found:
        torch.testing.assert_close(other, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Found 'rulle'"):
        make(partial(Configured, synthesis={"rulle": "sago"}), tmp_path)


@pytest.mark.parametrize("one_copy", [False, True])
def test_reports_of_each_group_in_a_file(one_copy, tmp_path):
    kind = with_mixin(GradDiff, groups=lambda name: name.rpartition(".")[2], one_copy=one_copy)
    trainer, path, reports = make(kind, tmp_path, data=Pairs(3)), tmp_path / "new" / "reports.csv", []
    trainer.add_callback(Looking(lambda: reports.append(trainer.synthesis_report)))
    trainer.add_callback(ReportWriter(trainer, path))
    assert trainer.synthesis_report is None
    trainer.train()
    trainer.log({"loss": 0.0})  # of the same report
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in (1, 2, 3) for _ in reports[0].groups]
    for report, step in zip(reports, (1, 2, 3), strict=True):
        values = report.to_dict()
        of_step = [row for row in rows if row["step"] == str(step)]
        assert [row["group"] for row in of_step] == list(report.groups)
        for name, expected in values.items():
            assert [float(row[name]) for row in of_step] == expected
    assert reports[-1] is trainer.synthesis_report


@pytest.mark.parametrize(
    ("rule", "warns"), [("sago", 0), (sago.rules.gradvac(decay=0.9), 1), ("graddrop", 1)]
)
def test_a_resumed_training_reports_that_the_memory_of_its_rule_was_reset(rule, warns, tmp_path, caplog):
    once.warned.clear()
    for checkpoint, count in ((None, 0), (str(tmp_path / "checkpoint-1"), warns)):
        trainer = make(
            with_mixin(GradDiff, rule=rule), tmp_path, data=Pairs(2), save_strategy="steps", save_steps=1
        )
        with torch.serialization.safe_globals(NUMPY):
            trainer.train(resume_from_checkpoint=checkpoint)
        told = [r.getMessage() for r in caplog.records if "was reset" in r.getMessage()]
        assert len(told) == count
        assert all("at step 1" in text for text in told)


def test_a_monitor_has_the_report_of_every_step(tmp_path):
    monitor, reports = sago.monitor.ConflictMonitor(), []
    for steps in (3, 2):  # the second training starts at step 0
        reports.clear()
        kind = with_mixin(GradDiff, stats=True)
        trainer = make(kind, tmp_path, data=Pairs(2 * steps), gradient_accumulation_steps=2, logging_steps=10)
        trainer.add_callback(MonitorCallback(trainer, monitor))
        trainer.add_callback(Looking(lambda: reports.append(trainer.synthesis_report)))  # noqa: B023
        trainer.train()
        assert list(monitor.reports) == list(range(1, steps + 1))
        assert len(reports) == steps
        for kept, report in zip(monitor.reports.values(), reports, strict=True):
            assert kept.to_dict() == report.to_dict()
    with pytest.raises(TypeError, match="`trainer` should have GradientSynthesisMixin"):
        MonitorCallback(make(GradDiff, tmp_path), monitor)


def test_groups_by_an_expression_that_matches_no_parameter_are_refused(tmp_path):
    kind = type("Trainer", (GradientSynthesisMixin, GradDiff), {"synthesis": {"groups": r"expert\.\d+"}})
    with pytest.raises(ValueError, match=r"`groups` should be a regular expression that matches.*expert"):
        make(kind, tmp_path).train()


def test_a_multiple_of_a_weight_of_0_is_found(tmp_path):
    """Two terms of the retain loss, of which the second has a factor: both are captured."""
    norms = []
    for alpha in (0.0, 1.5):
        for compute in (
            lambda self, f, r: -self.gamma * -f + self.alpha * r + self.alpha * 2.0 * (0.5 * r),
            lambda self, f, r: self.gamma * f + self.alpha * (2.0 * r),
        ):
            trainer = make(with_mixin(variant(compute)), tmp_path, data=Pairs(1))
            trainer.alpha = alpha
            trainer.train()
            norms.append(steps_of(trainer)[0]["norm_retain"])
    assert norms == [norms[0]] * 4  # all factors are powers of two, so nothing rounds


def test_a_writer_continues_its_file_and_leaves_out_what_is_absent(tmp_path):
    path = tmp_path / "reports.csv"
    for _ in range(2):
        trainer = make(with_mixin(GradDiff, stats=False), tmp_path, data=Pairs(1))
        trainer.add_callback(ReportWriter(trainer, path))
        trainer.train()
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 2 * len(trainer.synthesis_report.groups)
    assert lines[0].startswith("step,group,ff,fr,rr,")
    assert lines[1].endswith(",,,,")
    with pytest.raises(TypeError, match="`trainer` should have GradientSynthesisMixin"):
        ReportWriter(make(GradDiff, tmp_path), path)


def test_a_writer_of_another_process_leaves_the_file_and_an_empty_file_is_continued(tmp_path):
    path = tmp_path / "reports.csv"
    trainer = make(with_mixin(GradDiff), tmp_path, data=Pairs(1))
    writer = ReportWriter(trainer, path)
    trainer.train()
    state = mock.Mock(global_step=1, is_world_process_zero=False)
    path.write_text("step,group\n7,x\n")
    writer.on_train_begin(None, state, None)
    writer.on_log(None, state, None)
    assert path.read_text() == "step,group\n7,x\n"
    state.is_world_process_zero = True
    path.write_text("")
    writer._last = None
    writer.on_log(None, state, None)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == list(trainer.synthesis_report.groups)


def test_a_loss_with_any_arguments_takes_the_count():
    def known(model, inputs, return_outputs=False, num_items_in_batch=None):
        pass

    assert without_count(known) is None
    assert without_count(lambda model, inputs, **kwargs: None) is None
    assert without_count(lambda model, inputs: (model, inputs))(1, 2, num_items_in_batch=3) == (1, 2)


def test_a_writer_repeats_no_step_after_a_checkpoint(tmp_path):
    path = tmp_path / "reports.csv"
    options = {"data": Pairs(4), "save_strategy": "steps", "save_steps": 2}
    files = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make(with_mixin(GradDiff), tmp_path, **options)
        trainer.add_callback(ReportWriter(trainer, path))
        with torch.serialization.safe_globals(NUMPY):
            trainer.train(resume_from_checkpoint=checkpoint)
        files.append(path.read_text())
    assert files[0] == files[1]
    steps = [int(line.partition(",")[0]) for line in files[1].splitlines()[1:]]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2, 3, 4}


def test_a_cosine_that_is_not_defined_is_not_logged(tmp_path):
    trainer = make(with_mixin(variant(lambda self, f, r: self.gamma * f + self.alpha * (0 * r))), tmp_path)
    trainer.train()
    for log in steps_of(trainer):
        assert log["norm_retain"] == 0.0
        assert "cos_update_forget" in log
        assert not {"cos_forget_retain", "cos_update_retain"} & set(log)


def test_one_copy_of_several_micro_batches_is_refused(tmp_path):
    """Before a gradient is written."""
    trainer = make(with_mixin(GradDiff, one_copy=True), tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(
        ValueError, match=r"`one_copy` should be False .*2 micro-batches.*accumulation_steps=1"
    ):
        trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert_unmoved(trainer)


def test_groups_are_made_of_the_names_of_parameters(tmp_path):
    def block(name):
        return ".".join(name.split(".")[:3])

    trainer = make(with_mixin(GradDiff, rule="pcgrad", groups=block), tmp_path, data=Pairs(3))
    seen = set()
    trainer.add_callback(Looking(lambda: seen.update(trainer.synthesis_report.groups)))
    trainer.train()
    assert seen == {block(name) for name, _ in trainer.model.named_parameters()}
    assert len(seen) == 5
    expected = llama()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, 1), "pcgrad", groups=block)
    assert_trained_alike(trainer.model, expected)


class Few(GradDiff):
    """Like RMU: the optimizer has few of the parameters, and all parameters require grad."""

    trained = "down_proj"

    def create_optimizer(self, *args):
        if self.optimizer is not None:
            return self.optimizer
        chosen = [p for n, p in self.model.named_parameters() if self.trained in n]
        self.optimizer = torch.optim.AdamW([{"params": chosen}], lr=1e-2, eps=1e-3, weight_decay=0.0)
        return self.optimizer


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("pcgrad_global", {}),
        ("pcgrad", {"groups": lambda name: "0 and 1" if "down_proj" in name else name}),
        ("sago", {}),
        ("sago", {"one_copy": True}),
    ],
)
@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}], ids=["plain", "checkpointing"])
def test_parameters_outside_of_the_optimizer_have_no_gradients(rule, how, options, tmp_path, caplog):
    """They count in no inner product, norm or log, also in the trainer's norm, and need no memory."""
    trainer = make(with_mixin(Few, rule=rule, **how), tmp_path, data=Pairs(4), **options)
    sizes, grads = [], []

    def look(*args):
        sizes.append(trainer._synthesizer._buckets.nbytes)
        grads.append({n for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(look)
    trainer.train()
    expected = llama()
    for name, p in expected.named_parameters():
        p.requires_grad_("down_proj" in name)
    steps = windows(trainer.data_collator.batches, 1)
    reports = by_hand(expected, graddiff_losses, steps, rule, groups=how.get("groups"))
    assert_trained_alike(trainer.model, expected)
    for found, report in zip(steps_of(trainer), reports, strict=True):
        for name in ("norm_forget", "norm_retain", "norm_update", "cos_forget_retain"):
            assert found[name] == pytest.approx(report[name], rel=DRIFT, abs=DRIFT)
        assert found["grad_norm"] == pytest.approx(found["norm_update"], rel=DRIFT)
    trained = {n: p for n, p in trainer.model.named_parameters() if "down_proj" in n}
    assert grads == [set(trained)] * 4
    if "groups" in how:
        assert trainer.synthesis_report.groups == ("0 and 1",)
    told = [r.getMessage() for r in caplog.records if "not in the optimizer" in r.getMessage()]
    outside = [n for n, _ in trainer.model.named_parameters() if n not in trained]
    assert len(told) == 1
    assert f"{len(outside)} of the {len(outside) + len(trained)} parameters" in told[0]
    assert f"The first of them is `{outside[0]}`" in told[0]
    copies = 1 if "one_copy" in how else 2
    assert set(sizes) == {copies * sum(p.nbytes for p in trained.values())}
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


def test_an_optimizer_without_parameters_is_refused(tmp_path):
    trainer = make(with_mixin(Few), tmp_path)
    trainer.trained = "expert"
    with pytest.raises(ValueError, match=r"optimizer should have at least one parameter.*Found none"):
        trainer.train()


def test_groups_by_an_expression_that_matches_no_trained_parameter_are_refused(tmp_path):
    trainer = make(partial(with_mixin(Few), synthesis={"groups": r"(q_proj)"}), tmp_path)
    with pytest.raises(ValueError, match=r"`groups` should be a regular expression that matches.*q_proj"):
        trainer.train()


def optimize_layers(trainer):
    """Gives the trainer an optimizer that has only the parameters of the layers."""
    of_layers = [p for n, p in trainer.model.named_parameters() if "layers" in n]
    trainer.optimizer = torch.optim.SGD(of_layers, lr=1e-2)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)


class Unfreezing(transformers.TrainerCallback):
    """Adds the head to the optimizer after the second step."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.requires_grad_()
            optimizer.add_param_group({"params": [model.lm_head.weight], "initial_lr": 1e-2})
            lr_scheduler.base_lrs.append(1e-2)
            lr_scheduler.lr_lambdas.append(lambda _: 1.0)


@pytest.mark.parametrize(("accumulation", "frozen"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_parameter_that_enters_the_optimizer_is_trained_from_the_next_window_on(
    accumulation, frozen, tmp_path
):
    states = []
    for kind in (GradDiff, with_mixin(GradDiff, rule="sum")):
        data = Pairs(4 * accumulation)
        options = {"gradient_accumulation_steps": accumulation, "data": data, "max_grad_norm": 0.0}
        trainer = make(kind, tmp_path, callbacks=[Unfreezing()], **options)
        trainer.model.lm_head.weight.requires_grad_(not frozen)
        optimize_layers(trainer)
        head = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.lm_head.weight, head)
        states.append(weights(trainer.model))
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=DRIFT)


def test_a_step_of_another_model_has_accumulators_of_its_own(tmp_path):
    class Turning(with_mixin(GradDiff)):
        other = None

        def training_step(self, model, inputs, *arguments):
            if self.other is not None:
                super().training_step(self.other, inputs, *arguments)
                assert any(p.grad is not None for p in self.other.parameters())
                self.other.zero_grad()
            return super().training_step(model, inputs, *arguments)

    states = []
    for other in (None, llama()):
        trainer = make(Turning, tmp_path)
        trainer.other = other
        trainer.train()
        states.append(weights(trainer.model))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


class UnfreezingInside(Unfreezing):
    """Adds the head after the first micro-batch of the third window."""

    def on_step_end(self, args, state, control, **kwargs):
        pass

    on_substep_end = Unfreezing.on_step_end


class UnfreezingLater(Unfreezing):
    """Adds the head after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            state = SimpleNamespace(global_step=2)
            super().on_step_end(args, state, control, **kwargs)


def test_a_parameter_that_enters_the_optimizer_inside_a_window_waits_for_the_next_one(tmp_path):
    """The gradients of the open window are kept."""
    states = []
    for callback in (UnfreezingInside(), UnfreezingLater()):
        options = {"gradient_accumulation_steps": 2, "data": Pairs(10), "max_grad_norm": 0.0}
        trainer = make(with_mixin(GradDiff, rule="sum"), tmp_path, callbacks=[callback], **options)
        optimize_layers(trainer)
        head = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.lm_head.weight, head)
        states.append(weights(trainer.model))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_training_that_ends_inside_a_window_drops_its_gradients(tmp_path):
    found = []

    class Stopped(GradDiff):
        def compute_losses(self, model, inputs):
            if found:
                raise KeyboardInterrupt
            found.append(self._synthesizer._buckets)
            return graddiff_losses(model, None, inputs)

    trainer = make(with_mixin(Stopped), tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (buckets,) = found
    assert set(buckets.forget_grads + buckets.retain_grads) == {None}


def test_a_trainer_that_is_dropped_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """A loop of one's own calls `training_step`, so that no training of the Trainer ends."""
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(ddp)
    ddp.require_backward_grad_sync = True
    monkeypatch.setattr(synthesizer, "_reducing", lambda model: iter([ddp]))
    model = llama()
    trainer = make(with_mixin(Few), tmp_path, model, data=Pairs(1))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = trainer.get_train_dataloader()
    trainer.training_step(model, batch)
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not ddp.require_backward_grad_sync
    del trainer
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert ddp.require_backward_grad_sync


class UnfreezingAlone(transformers.TrainerCallback):
    """Unfreezes the head, which is not in the optimizer."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.lm_head.weight.requires_grad_()


class UnfreezingAloneInside(UnfreezingAlone):
    def on_step_end(self, *args, **kwargs):
        pass

    on_substep_end = UnfreezingAlone.on_step_end


def test_a_parameter_that_is_unfrozen_but_not_in_the_optimizer_has_no_gradients(tmp_path):
    states = []
    for callbacks in ([], [UnfreezingAlone()]):
        trainer = make(with_mixin(Few), tmp_path, data=Pairs(3), callbacks=callbacks)
        trainer.model.lm_head.weight.requires_grad_(False)
        trainer.train()
        states.append(weights(trainer.model))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_parameter_that_is_unfrozen_inside_a_window_is_refused(tmp_path):
    options = {"gradient_accumulation_steps": 2, "callbacks": [UnfreezingAloneInside()]}
    trainer = make(with_mixin(GradDiff), tmp_path, **options)
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`lm_head.weight` should be unfrozen between two .*on_step_end"):
        trainer.train()


def test_the_logged_losses_go_back_to_the_last_log_where_a_parameter_enters_the_optimizer(tmp_path):
    seen = []

    class Recording(GradDiff):
        def compute_losses(self, model, inputs):
            losses = graddiff_losses(model, None, inputs)
            seen.append(torch.stack(losses).detach())
            return losses

    options = {"data": Pairs(4), "callbacks": [Unfreezing()], "logging_steps": 4}
    trainer = make(with_mixin(Recording), tmp_path, **options)
    optimize_layers(trainer)
    trainer.train()
    (log,) = steps_of(trainer)
    found = torch.tensor([log["forget_loss"], log["retain_loss"]])
    torch.testing.assert_close(found, sum(seen) / 4, rtol=rounding_error(4, FP32), atol=0)


class InFp32(torch.optim.SGD):
    """Steps on copies in fp32 of the parameters in bf16, and on the other parameters themselves."""

    def __init__(self, params, lr):
        self.pairs = [(p, p.detach().float().clone() if p.dtype == BF16 else p) for p in params]
        super().__init__([q for _, q in self.pairs], lr=lr)

    def step(self, closure=None):
        for p, q in self.pairs:
            q.grad = None if p.grad is None else p.grad.float()
        super().step(closure)
        with torch.no_grad():
            for p, q in self.pairs:
                p.copy_(q)


def told_of_copies(caplog):
    return [r.getMessage() for r in caplog.records if "treated as trained" in r.getMessage()]


@pytest.mark.parametrize(("size", "count"), [(7, 6), (8, 21)])  # the smallest parameters have 8 elements
def test_only_tensors_of_the_size_of_a_parameter_may_be_copies(size, count, tmp_path, caplog):
    once.warned.clear()
    learned = torch.ones(size, requires_grad=True)

    class Learned(Few):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            optimizer.param_groups[0]["params"].append(learned)
            return optimizer

    trainer = make(with_mixin(Learned), tmp_path, data=Pairs(2))
    trainer.trained = "mlp"
    trainer.train()
    assert len(trainer.synthesis_report.groups) == count
    told = told_of_copies(caplog)
    assert len(told) == (size == 8)
    assert all("has 1 tensors" in text and "does not have 15 of the parameters" in text for text in told)
    assert (learned == 1.0).all()


def test_an_optimizer_without_parameters_of_the_model_may_hold_copies_of_any_size():
    model, learned = torch.nn.Linear(3, 2), torch.ones(1)
    assert may_hold_copies([learned], model.parameters())
    assert not may_hold_copies([learned, model.weight], model.parameters())


def test_an_optimizer_that_holds_copies_of_some_parameters_trains_all_of_them(tmp_path, caplog):
    once.warned.clear()
    model = llama(BF16)
    model.model.norm.float()
    model.model.norm.register_forward_hook(lambda module, args, output: output.bfloat16())
    start = weights(model)
    trainer = make(with_mixin(GradDiff, rule="sum"), tmp_path, model, data=Pairs(4))
    trainer.optimizer = InFp32(list(model.parameters()), lr=0.5)
    trainer.train()
    assert [n for n, p in model.named_parameters() if torch.equal(p, start[n])] == []
    assert len(told_of_copies(caplog)) == 1


def test_an_optimizer_that_holds_copies_trains_all_parameters(tmp_path):
    """Like an optimizer on another device: no parameter of the model is in its groups."""

    class Copies(torch.optim.SGD):
        def __init__(self, params, lr):
            self.own = list(params)
            super().__init__([p.detach().clone() for p in self.own], lr=lr)

        def step(self, closure=None):
            for p, copied in zip(self.own, self.param_groups[0]["params"], strict=True):
                copied.grad = p.grad
            super().step(closure)
            with torch.no_grad():
                for p, copied in zip(self.own, self.param_groups[0]["params"], strict=True):
                    p.copy_(copied)

    states = []
    for kind in (torch.optim.SGD, Copies):
        trainer = make(with_mixin(GradDiff), tmp_path, data=Pairs(2))
        trainer.optimizer = kind(trainer.model.parameters(), lr=1e-2)
        trainer.train()
        states.append(weights(trainer.model))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not torch.equal(states[0]["lm_head.weight"], llama().lm_head.weight)


@pytest.mark.parametrize(
    ("dtype", "how", "accumulation", "warns"),
    [
        (BF16, {}, 4, 1),
        (BF16, {}, 1, 0),
        (BF16, {"accumulate_dtype": FP32}, 4, 0),
        (FP32, {}, 4, 0),
        ("only the rest", {}, 4, 0),
    ],
)
def test_accumulation_in_bf16_is_reported_once(dtype, how, accumulation, warns, tmp_path, caplog):
    once.warned.clear()
    for _ in range(2):
        options = {"data": Pairs(4), "gradient_accumulation_steps": accumulation}
        kind = Few if dtype == "only the rest" else GradDiff
        model = llama(BF16 if kind is Few else dtype)
        if kind is Few:  # which trains these parameters
            for layer in model.model.layers:
                layer.mlp.down_proj.float()
                layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: args[0].float())
                layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output.bfloat16())
        make(with_mixin(kind, **how), tmp_path, model, **options).train()
    told = [r.getMessage() for r in caplog.records if "are added up in" in r.getMessage()]
    assert len(told) == warns
    for text in told:
        assert "the gradients of 4 micro-batches are added up in bfloat16" in text
        assert "accumulate_dtype=torch.float32" in text


@pytest.mark.parametrize("divides", [True, None])
def test_losses_that_the_engine_does_not_divide_are_divided(divides):
    """DeepSpeed 0.17 leaves the division out inside `no_sync`, where `engine.scale_wrt_gas` is None."""
    engine = SimpleNamespace(scale_wrt_gas=divides, gradient_accumulation_steps=lambda: 4)
    wrapper = mock.Mock(engine=engine)
    trained = SimpleNamespace(_engine=wrapper, _backward_options={"scale_wrt_gas": True})
    side = [(torch.tensor(3.0), torch.tensor(2.0)), (torch.tensor(1.0), torch.tensor(2.0))]
    synthesizer.Synthesizer._backward(trained, side, retain_graph=False)
    ((total,), options) = wrapper.backward.call_args
    assert (float(total), options["scale_wrt_gas"]) == ((8.0, True) if divides else (2.0, False))


def test_bf16_gradients_accumulate_in_fp32(tmp_path):
    kind = with_mixin(GradDiff, accumulate_dtype=FP32)
    trainer = make(kind, tmp_path, llama(BF16), data=Pairs(4), gradient_accumulation_steps=4)
    sizes = [sago.GradientBuckets(trainer.model, accumulate_dtype=FP32).nbytes]
    trainer.add_callback(Looking(lambda: sizes.append(trainer._synthesizer._buckets.nbytes)))
    trainer.train()
    assert sizes[0] == sizes[1]
    expected = llama(BF16)
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, 4), wide=True)
    assert_trained_alike(trainer.model, expected, llama(BF16), exact=False)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero_update"])
def test_a_gradient_that_is_not_finite(nonfinite, tmp_path):
    """Of the forget loss in the first step."""

    def compute(self, f, r):
        return self.gamma * (f * float("inf") if self.state.global_step == 0 else f) + self.alpha * r

    trainer = make(with_mixin(variant(compute), nonfinite=nonfinite), tmp_path, data=Pairs(2))
    trainer.train()
    assert steps_of(trainer)[0]["nonfinite_forget"] > 0
    finite = all(p.isfinite().all() for p in trainer.model.parameters())
    assert finite is (nonfinite == "zero_update")
    if finite:
        expected = llama()
        optimizer = adamw(expected.parameters())
        for p in expected.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches[1:], 1), optimizer=optimizer)
        assert_trained_alike(trainer.model, expected)


@pytest.mark.parametrize(
    ("kind", "rule", "accumulation"),
    [(GradDiff, "sago", 2), (GradDiff, "pcgrad", 2), (WithLosses, "sago", 2), (Apart, "pcgrad", 1)],
)
def test_fp16_with_a_gradient_scaler(kind, rule, accumulation, tmp_path, monkeypatch):
    """accelerate has no GradScaler on a CPU, but torch has. The first scale overflows: a step is skipped."""
    monkeypatch.setattr(AcceleratorState, "mixed_precision", property(lambda self: "fp16"))
    kind = with_mixin(kind, rule=rule, one_copy=accumulation == 1)
    options = {"data": Pairs(8 * accumulation), "gradient_accumulation_steps": accumulation}
    trainer = make(kind, tmp_path, **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**17) for _ in range(2)]
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scalers[0], True
    trainer.train()
    expected = llama()
    own = hasattr(trainer, "compute_losses")
    steps = (averaged if own else windows)(trainer.data_collator.batches, accumulation)
    reports = by_hand(expected, graddiff_losses, steps, rule, autocast=FP16, scaler=scalers[1])
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**17
    assert_trained_alike(trainer.model, expected, exact=False)
    for name in ("norm_forget", "norm_retain", "norm_update", "cos_forget_retain"):
        # Bit for bit but for the sums: both sides run the same forwards and backwards.
        torch.testing.assert_close(
            steps_of(trainer)[-1][name], reports[-1][name], rtol=10 * DRIFT, atol=DRIFT
        )


class OfArguments(GradDiff):
    """A trainer that reads a weight from elsewhere, and cannot set it."""

    gamma = property(lambda self: GAMMA)

    def __init__(self, gamma, alpha, **options):
        transformers.Trainer.__init__(self, **options)
        self.alpha, self.ref_model = alpha, None


def test_a_weight_that_is_a_property_needs_compute_losses(tmp_path):
    trainer = make(with_mixin(OfArguments), tmp_path, data=Pairs(4))
    with pytest.raises(ValueError, match=r"`self\.gamma` should be an attribute.*property.*compute_losses"):
        trainer.train()
    assert_unmoved(trainer)

    class WithLosses(with_mixin(OfArguments)):
        def compute_losses(self, model, inputs):
            return graddiff_losses(model, None, inputs)

    trainer = make(WithLosses, tmp_path, data=Pairs(4))
    trainer.train()
    expected = llama()
    by_hand(expected, graddiff_losses, windows(trainer.data_collator.batches, 1))
    assert_trained_alike(trainer.model, expected)


def test_a_trainer_is_copied_between_trainings_and_refuses_it_within(tmp_path):
    trainer, refused = make(with_mixin(GradDiff), tmp_path, data=Pairs(2)), []

    def look():
        with pytest.raises(TypeError, match="GradientBuckets should not be copied"):
            copy.deepcopy(trainer)
        refused.append(True)

    copy.deepcopy(trainer).train()
    trainer.add_callback(Looking(look))
    trainer.train()
    assert refused
    assert copy.deepcopy(trainer)._synthesizer is None


def test_importing_it_imports_no_framework():
    code = (
        "import sys, sago.integrations.transformers\n"
        "found = {'transformers', 'accelerate', 'deepspeed', 'triton'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
