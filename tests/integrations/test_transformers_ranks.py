"""Two ranks under DDP and FSDP2, against one process that has the batches of both."""

import os
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from sago.ranks.fsdp import reshard
from tests.support.ranks import Ranks
from tests.support.trainers import (
    DRIFT,
    NEWER,
    NPO,
    GradDiff,
    Pairs,
    Texts,
    assert_logged,
    graddiff_losses,
    llama,
    make,
)

pytestmark = pytest.mark.usefixtures("one_thread")

needs_fsdp2 = pytest.mark.skipif(not NEWER, reason="transformers 4.45 has no FSDP2")
fsdp2 = pytest.param("fsdp2", marks=needs_fsdp2)
FIELDS = ("loss", "grad_norm", "forget_loss", "retain_loss", "cos_forget_retain", "conflict_fraction")


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2)
    yield pool
    pool.stop()


class Fsdp2:
    """accelerate takes FSDP for accelerators only. Told that it has one, it does all the rest on a CPU."""

    plugin: ClassVar = {
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
    }

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, **self.plugin
        )
        self.accelerator.state.fsdp_plugin = plugin
        for state in (self.accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        assert self.accelerator.is_fsdp2
        self.is_fsdp_enabled = True


class Fsdp2AsAWhole(Fsdp2):
    plugin: ClassVar = {"auto_wrap_policy": None}


class Fsdp2Kept(Fsdp2):
    """The parameters stay unsharded from the forward to the backward."""

    plugin: ClassVar = {**Fsdp2.plugin, "reshard_after_forward": False}


FSDP2 = {"fsdp2": Fsdp2, "fsdp2 as a whole": Fsdp2AsAWhole, "fsdp2 kept": Fsdp2Kept}


def train(folder, kind, engine, how, options):
    """Weights and logs of a training; without an engine in one process, without `how` without the mixin."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if engine is None:
        own = {"per_device_train_batch_size": 2}
    else:
        own = {"ddp_backend": "gloo"}
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # looked at, but there is a group already
    bases = (
        Watched,
        *([] if how is None or issubclass(kind, GradientSynthesisMixin) else [GradientSynthesisMixin]),
        *([FSDP2[engine]] if engine in FSDP2 else []),
        kind,
    )
    trainer = type("Trained", bases, {} if how is None else {"synthesis": Synthesis(**how)})
    trainer = make(trainer, folder, llama(), Pairs(16), **own, **options)
    trainer.train()
    (wrapped,) = trainer.wrapped
    assert issubclass(wrapped, {None: nn.Module, "ddp": DistributedDataParallel}.get(engine, FSDPModule))
    assert how is None or len(trainer.synthesizers) == 1
    assert how is None or trainer.syncing == {False}  # the buckets do, once a window
    assert how is None or getattr(
        trainer.model_wrapped, "require_backward_grad_sync", True
    )  # but not for good
    reshard(trainer.model)
    params = dict(trainer.model.named_parameters())
    assert all(isinstance(p, DTensor) is (engine in FSDP2) for p in params.values())
    found = {n: (p.full_tensor() if engine in FSDP2 else p).detach().clone() for n, p in params.items()}
    logs = [{k: log[k] for k in FIELDS if k in log} for log in trainer.state.log_history if "loss" in log]
    return found, logs


class Watched:
    """Remembers what the model was wrapped in, and whether DDP would have reduced."""

    wrapped = syncing = frozenset()
    synthesizers = ()

    def training_step(self, model, *args):
        loss = super().training_step(model, *args)
        self.wrapped |= {type(model)}
        made = getattr(self, "_synthesizer", None)
        if made not in self.synthesizers:
            self.synthesizers += (made,)
        self.syncing |= {getattr(model, "require_backward_grad_sync", False)}
        return loss


def assert_alike(found, expected):
    assert len(expected[1]) > 0
    for weights, logs in found:
        torch.testing.assert_close(weights, expected[0], rtol=0, atol=DRIFT)
        for log, other in zip(logs, expected[1], strict=True):
            assert_logged(log, other)


class Apart(GradientSynthesisMixin, GradDiff):
    """Its forward of the retain loss comes after the backward of the forget loss."""

    def compute_forget_loss(self, model, forget_inputs):
        return -model(**forget_inputs).loss


class Few(GradDiff):
    """Like RMU: few parameters are in the optimizer, and all require grad."""

    def create_optimizer(self, *args):
        for name, p in self.model.named_parameters():
            p.requires_grad_("down_proj" in name)
        super().create_optimizer(*args)
        for p in self.model.parameters():
            p.requires_grad_()
        return self.optimizer


@pytest.mark.parametrize(
    ("kind", "engine", "how", "accumulation"),
    [
        (NPO, "ddp", {"rule": "sago"}, 1),
        (Few, "ddp", {"rule": "pcgrad_global"}, 2),
        pytest.param(Few, "fsdp2", {"rule": "pcgrad_global"}, 2, marks=needs_fsdp2),
        (Apart, "ddp", {"rule": "pcgrad"}, 4),
        pytest.param(NPO, "fsdp2", {"rule": "pcgrad_global"}, 4, marks=needs_fsdp2),
        pytest.param(Apart, "fsdp2", {"rule": "pcgrad", "one_copy": True}, 1, marks=needs_fsdp2),
    ],
)
def test_ranks_are_one_process(ranks, kind, engine, how, accumulation, tmp_path):
    """Without reduction in all but the last micro-batch of a window, if accelerate had its way."""
    rest = how, {"gradient_accumulation_steps": accumulation}
    found = ranks(train, str(tmp_path), kind, engine, *rest)
    expected = train(str(tmp_path), kind, None, *rest)
    assert set(expected[1][0]) == set(FIELDS)
    assert_alike(found, expected)


@pytest.mark.parametrize("engine", ["ddp", fsdp2])
def test_the_sum_is_the_training_of_the_ranks_without_the_mixin(ranks, engine, tmp_path):
    rest = str(tmp_path), GradDiff, engine
    options = {"gradient_accumulation_steps": 4}
    found = ranks(train, *rest, {"rule": "sum"}, options)
    assert_alike(found, ranks(train, *rest, None, options)[0])


def test_ddp_where_every_parameter_has_to_be_reached(ranks, tmp_path):
    """So the Trainer makes it if activations are checkpointed, or if it is asked to."""
    options = {"ddp_find_unused_parameters": False, "gradient_accumulation_steps": 2}
    found = ranks(train, str(tmp_path), GradDiff, "ddp", {}, options)
    assert_alike(found, train(str(tmp_path), GradDiff, None, {}, options))


@needs_fsdp2
@pytest.mark.parametrize(
    ("kind", "engine"), [*((GradDiff, engine) for engine in FSDP2), (Few, "fsdp2 as a whole")]
)
def test_evaluations_of_fsdp2_before_and_in_the_training(ranks, kind, engine, tmp_path):
    """A forward without a backward leaves parameters unsharded, which are not those of the optimizer."""
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Texts(2)}
    found = ranks(train, str(tmp_path), kind, engine, {"rule": "sum"}, options)
    assert_alike(found, train(str(tmp_path), kind, None, {"rule": "sum"}, {}))


class Unweighted(GradDiff):
    def compute_unlearn_loss(self, model, inputs, return_outputs=False):
        return model(**inputs["forget"]).loss + self.alpha * model(**inputs["retain"]).loss


def error_of(folder, engine):
    with pytest.raises(ValueError, match=r"no product of `self.gamma` and a loss"):
        train(folder, Unweighted, engine, {}, {})
    if engine == "ddp":
        with pytest.raises(ValueError, match=r"`one_copy` should be False for DistributedDataParallel"):
            train(folder, GradDiff, engine, {"one_copy": True}, {})


@pytest.mark.parametrize("engine", ["ddp", fsdp2])
def test_every_rank_says_which_loss_it_did_not_find(ranks, engine, tmp_path):
    ranks(error_of, str(tmp_path), engine)


class OwnWeight(GradDiff):
    """Computes gamma from the loss of its own rank."""

    first = 0

    def compute_losses(self, model, inputs):
        forget, retain = graddiff_losses(model, None, inputs)
        if self.state.global_step >= self.first:
            self.gamma = abs(float(forget.detach()))
        return forget, retain


class OwnWeightLater(OwnWeight):
    first = 2


def refusal_of_own_weights(folder):
    """In the first window, and when the weight of a later one is logged."""
    with pytest.raises(ValueError, match=r"Parameter `gamma` should be the same on every rank.*Average"):
        train(folder, OwnWeight, "ddp", {}, {})
    with pytest.raises(ValueError, match=r"`self.gamma` should be the same on every rank.*Average") as error:
        train(folder, OwnWeightLater, "ddp", {}, {})
    return str(error.value)


def test_weights_that_differ_between_ranks_are_noticed(ranks, tmp_path):
    first, second = ranks(refusal_of_own_weights, str(tmp_path))
    assert first == second
