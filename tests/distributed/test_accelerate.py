"""Loops of accelerate, with its accumulation, on DDP and FSDP2: as on one process."""

import pytest
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import sago
from tests.support.training import (
    FORWARDS_FIRST,
    INTERLEAVED,
    STEPS,
    WEIGHTS,
    Result,
    Run,
    assert_equal_results,
    batches,
    fields,
    losses_of,
    optimizer_of,
    parameters,
    share,
    single,
    transformer,
)

RUN = Run("pcgrad", "adamw", accumulation=3)


def trained(kind, order, sync_each_batch=False):
    """The run as a loop of accelerate: the error that ended it, or its result."""
    accelerator = accelerator_of(kind, sync_each_batch)
    model = transformer()
    model, optimizer = accelerator.prepare(model, optimizer_of(model, RUN))
    assert isinstance(model, DistributedDataParallel if kind == "ddp" else FSDPModule)
    buckets, reports = sago.GradientBuckets(model), []
    try:
        for step in range(STEPS):
            for micro in range(RUN.accumulation):
                with accelerator.accumulate(model):
                    backwards(accelerator, model, buckets, order, batches(step, micro, *share()))
                    if accelerator.sync_gradients:
                        reports.append(fields(buckets.synthesize_(RUN.rule, **WEIGHTS)))
                        optimizer.step()
                        buckets.zero_()
    except ValueError as error:
        return str(error)
    return Result(*parameters(model), reports)


def backwards(accelerator, model, buckets, order, batch):
    # accelerate divides by the number of micro-batches.
    losses = losses_of(model, RUN._replace(mean=True), batch)
    if order == FORWARDS_FIRST:
        computed = [loss() for loss in losses]
        losses = [lambda: computed[0], lambda: computed[1]]
    for capture, loss in zip((buckets.forget, buckets.retain), losses, strict=True):
        with capture():
            accelerator.backward(loss())


def accelerator_of(kind, sync_each_batch):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accumulation = GradientAccumulationPlugin(RUN.accumulation, sync_each_batch=sync_each_batch)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=accumulation)
    if kind == "fsdp":
        # accelerate itself gives FSDP to accelerators only; the rest is as on those.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
    return accelerator


@pytest.mark.parametrize("order", [INTERLEAVED, FORWARDS_FIRST])
@pytest.mark.parametrize(("kind", "sync_each_batch"), [("ddp", False), ("ddp", True), ("fsdp", True)])
def test_as_on_one_process(ranks2, kind, sync_each_batch, order):
    for result in ranks2(trained, kind, order, sync_each_batch):
        assert_equal_results(result, single(RUN))


def test_fsdp_that_holds_gradients_back_is_asked_to_sync_each_batch(ranks2):
    for text in ranks2(trained, "fsdp", INTERLEAVED):
        assert "sync_each_batch=True" in text
