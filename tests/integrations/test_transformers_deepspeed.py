"""Two ranks of DeepSpeed through the Trainer, against one process that has the batches of both."""

import logging
import os
import warnings
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState

from sago.integrations import once
from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from tests.support.ranks import Ranks
from tests.support.trainers import (
    ALPHA,
    DRIFT,
    GAMMA,
    Collator,
    GradDiff,
    Pairs,
    arguments,
    assert_logged,
    graddiff_losses,
    llama,
    make,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2)
    yield pool
    pool.stop()


class WithLosses(GradDiff):
    """Says of a loss of its own, which does not run, that it divides by the accumulation."""

    loss_is_scaled_for_ga = True

    def compute_losses(self, model, inputs):
        return graddiff_losses(model, None, inputs)


class Apart(GradientSynthesisMixin, GradDiff):
    """Its forward of the retain loss comes after the engine's backward of the forget loss."""

    def compute_forget_loss(self, model, forget_inputs):
        return -model(**forget_inputs).loss


class Few(GradDiff):
    """Like RMU: few parameters are in the optimizer, and all require grad."""

    trained = "down_proj"

    def create_optimizer(self, *args):
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.trained in name)
        super().create_optimizer(*args)
        for p in self.model.parameters():
            p.requires_grad_()
        return self.optimizer


class NoneTrained(Few):
    trained = "expert"


class Regularised(GradDiff):
    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        loss = super().compute_unlearn_loss(model, inputs)
        return loss + 0.1 * model(**inputs["retain"]).loss


def trainer_of(how, kind=GradDiff):
    bases = (kind,) if issubclass(kind, GradientSynthesisMixin) else (GradientSynthesisMixin, kind)
    return type("Trained", bases, {"synthesis": Synthesis(**how)})


def train(folder, how, stage, accumulation, kind=GradDiff, dtype=torch.float32):
    """Weights and logs of a training on this rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")  # of which DeepSpeed gives many
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of C++, for what gloo does
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # looked at, but there is a group already
    AcceleratorState._reset_state(reset_partial_state=True)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    options = {"use_cpu": False, "deepspeed": config, "gradient_accumulation_steps": accumulation}
    options["bf16"] = dtype == torch.bfloat16
    args = arguments(folder, ddp_backend="gloo", **options)
    assert args.device.type == "cpu"
    # Without an accelerator, accelerate gives DeepSpeed one process. Told of both, it does all the rest.
    PartialState._shared_state.update(num_processes=world, process_index=rank, local_process_index=rank)
    trainer = trainer_of(how, kind)(
        gamma=GAMMA,
        alpha=ALPHA,
        model=llama(dtype),
        args=args,
        train_dataset=Pairs(8),
        data_collator=Collator(),
    )
    trainer.train()
    engine = trainer.model_wrapped
    assert engine.zero_optimization_stage() == stage
    if stage == 3:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            found = weights(engine.module)
    else:
        found = weights(engine.module)
    return found, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("kind", "stage", "rule", "accumulation"),
    [
        (GradDiff, 3, "pcgrad", 1),
        (GradDiff, 3, "sago", 4),
        (GradDiff, 0, "pcgrad", 2),
        (WithLosses, 3, "sago", 4),
        (Apart, 3, "sago", 2),
        (WithLosses, 0, "sago", 2),
        (Few, 3, "pcgrad_global", 2),
        (Few, 0, "pcgrad_global", 2),
        (Few, 0, "sago", 1),
    ],
)
def test_ranks_of_deepspeed_are_one_process(ranks, kind, stage, rule, accumulation, tmp_path):
    """The engine clips, and steps in accelerate's backward if it is let."""
    how = {"rule": rule}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    alone = make(trainer_of(how, Few if kind is Few else GradDiff), tmp_path, **options)
    alone.train()
    expected = [log for log in alone.state.log_history if "loss" in log]
    fields = ["forget_loss", "retain_loss", "norm_update", "cos_forget_retain", "conflict_fraction"]
    for found, logs in ranks(train, str(tmp_path), how, stage, accumulation, kind):
        torch.testing.assert_close(found, weights(alone.model), rtol=0, atol=DRIFT)
        assert len(logs) == 4 // accumulation
        for log, other in zip(logs, expected, strict=True):
            wanted = fields if stage == 0 else [*fields, "grad_norm"]
            assert_logged(log, {k: other[k] for k in wanted})


class Undivided(WithLosses):
    """Divides losses as a Trainer would that asks attributes of other names."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss, scale_wrt_gas=False)
        return loss.detach()


@pytest.mark.parametrize("stage", [3, 0])
def test_losses_that_are_not_averaged_over_a_window_are_refused(ranks, stage, tmp_path):
    for text in ranks(refused, str(tmp_path), stage, Undivided, 2, RuntimeError):
        assert "with the factor 0.5, because a window has 2 micro-batches. Found 1." in text


@pytest.mark.parametrize("stage", [3, 0])
def test_an_optimizer_without_parameters_is_refused_before_the_engine_is_made(ranks, stage, tmp_path):
    for text in ranks(refused, str(tmp_path), stage, NoneTrained):
        assert "optimizer should have at least one parameter" in text


@pytest.mark.parametrize(
    ("stage", "remedy"), [(3, "`data_types.grad_accum_dtype: fp32`"), (0, "`accumulate_dtype=torch.float32`")]
)
def test_accumulation_in_bf16_is_reported(ranks, stage, remedy, tmp_path):
    for told in ranks(reported, str(tmp_path), stage):
        assert len(told) == 1
        assert "the gradients of 2 micro-batches are added up in bfloat16" in told[0]
        assert f"{remedy}" in told[0]


def reported(folder, stage):
    """The warnings of a training in bf16 with two micro-batches."""
    found = []
    once.warned.clear()
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("sago").addHandler(handler)
    try:
        with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
            train(folder, {}, stage, 2, dtype=torch.bfloat16)
    finally:
        logging.getLogger("sago").removeHandler(handler)
    return [text for text in found if "added up" in text]


def test_stages_that_mix_the_gradients_are_refused(ranks, tmp_path):
    for text in ranks(refused, str(tmp_path), 2, GradDiff):
        assert "ZeRO stage 3 or 0. Found stage 2" in text


def test_a_third_term_is_found_before_the_engine_takes_its_gradients(ranks, tmp_path):
    for text in ranks(refused, str(tmp_path), 3, Regularised):
        assert "and nothing else. Found another term, which reaches parameter" in text


def refused(folder, stage, kind, accumulation=1, error=ValueError):
    with pytest.raises(error, match="Found") as raised:
        train(folder, {}, stage, accumulation, kind)
    return str(raised.value)
