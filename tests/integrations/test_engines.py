"""Engines like those of DeepSpeed at stage 0: the methods that buckets replace, and trained parameters."""

import gc

import pytest
import torch

import sago
from sago.integrations import deepspeed
from tests.test_private import Owner, engine_of_stage_0

REPLACED = {"step", "allreduce_gradients"}


class Engine(Owner):
    def step(self):
        pass

    def allreduce_gradients(self):
        pass


@pytest.fixture
def engine():
    core = engine_of_stage_0(None)
    core.__class__ = Engine
    del core.allreduce_gradients
    core.optimizer = torch.optim.SGD(core.module.parameters(), lr=1.0)
    return core


def run(engine):
    engine.module(torch.ones(1, 2)).sum().backward()


def test_buckets_that_are_dropped_inside_a_window_give_the_engine_its_methods_back(engine):
    buckets = sago.GradientBuckets(engine)
    with buckets.forget():
        run(engine)
    assert vars(engine).keys() >= REPLACED
    del buckets
    gc.collect()
    assert not vars(engine).keys() & REPLACED


def test_an_open_capture_keeps_the_methods_of_the_engine(engine):
    with sago.GradientBuckets(engine).forget():
        gc.collect()
        assert vars(engine).keys() >= REPLACED
        run(engine)
    gc.collect()
    assert not vars(engine).keys() & REPLACED


def test_buckets_that_are_dropped_leave_the_methods_of_later_ones(engine):
    first = sago.GradientBuckets(engine)
    with first.forget():
        run(engine)
    second = sago.GradientBuckets(engine)
    with second.forget():
        del first
        gc.collect()
        assert vars(engine).keys() >= REPLACED
        run(engine)


@pytest.mark.parametrize(("size", "all_of_them"), [(1, False), (2, True)])  # the bias has 2 elements
def test_a_small_tensor_in_the_optimizer_trains_no_parameter(size, all_of_them, engine):
    engine.optimizer = torch.optim.SGD([engine.module.weight, torch.ones(size, requires_grad=True)], lr=1.0)
    trained = deepspeed.trained(engine)
    assert trained(engine.module.weight)
    assert trained(engine.module.bias) is all_of_them
