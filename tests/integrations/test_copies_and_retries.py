"""Copies of a model in training, such as an EMA, and trainings that start again with a smaller batch."""

import copy
import gc

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

import sago
from sago.integrations.transformers import GradientSynthesisMixin, Synthesis
from tests.support.trainers import (
    DRIFT,
    Collator,
    GradDiff,
    Pairs,
    adamw,
    by_hand,
    graddiff_losses,
    llama,
    make,
    weights,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collection")

BATCHES = [Collator()([pair]) for pair in Pairs(6)]
PLACES = ["before the buckets", "before", "forget", "between", "retain", "synthesized", "after"]
MADE = [{}, {"accumulate_dtype": torch.float64}, {"retain_decay": 0.5}]
DECAY = 0.75


class SAGO(GradientSynthesisMixin, GradDiff):
    synthesis = Synthesis("sago")


@pytest.fixture(autouse=True)
def _own_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(model, look=lambda place: None, **made):
    """Three steps of two micro-batches, in which `look` is called at all places. Returns the updates."""
    look("before the buckets")
    buckets, optimizer, updates = sago.GradientBuckets(model, **made), adamw(model.parameters()), []
    for step in range(3):
        look("before")
        for batch in BATCHES[2 * step : 2 * step + 2]:
            losses = graddiff_losses(model, None, batch)
            with buckets.forget():
                losses[0].backward()
                look("forget")
            look("between")
            with buckets.retain():
                losses[1].backward()
                look("retain")
        buckets.synthesize_()
        updates.append([p.grad.clone() for p in model.parameters()])
        look("synthesized")
        optimizer.step()
        buckets.zero_()
        look("after")
    return updates


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def everything(model):
    return [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("made", MADE, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_a_copy_is_apart_from_the_buckets(place, made):
    """A copy has no gradient, and one that a backward gives it stays as it is."""
    model, copies, used = llama(), [], set()

    def look(now):
        used.update(storages(everything(model)))
        if now == place:
            copied = copy.deepcopy(model)
            assert all(p.grad is None for p in copied.parameters())
            if place not in ("forget", "retain"):
                copied(**BATCHES[0]["retain"]).loss.backward()
            copies.append((copied, weights(copied), [copy.deepcopy(p.grad) for p in copied.parameters()]))

    updates = train(model, look, **made)
    assert_same_bits(updates, train(llama(), **made))
    for copied, before, grads in copies:
        assert not storages(everything(copied)) & used
        assert_same_bits(weights(copied), before)
        assert_same_bits([p.grad for p in copied.parameters()], grads)
    assert copies


@pytest.mark.parametrize("place", ["forget", "retain", "synthesized"])
def test_the_gradient_of_a_copied_tensor_that_is_no_parameter(place):
    """`copy.deepcopy` copies the gradient of a plain tensor, and with it the accumulator."""
    p, copies, used = torch.ones(3, requires_grad=True), [], set()

    def look(now):
        used.update(storages([p, p.grad]))
        if now == place:
            copies.append(copy.deepcopy(p))

    buckets = sago.GradientBuckets([p])
    for name, capture in (("forget", buckets.forget), ("retain", buckets.retain)):
        with capture():
            (p * p.new_tensor([1.0, -2.0, 3.0])).sum().backward()
            look(name)
    buckets.synthesize_("sum")
    look("synthesized")
    update = p.grad.clone()
    (copied,) = copies
    before = copied.grad.clone()
    copied.grad.fill_(7.0)
    assert_same_bits(p.grad, update)
    assert_same_bits(update, p.new_tensor([2.0, -4.0, 6.0]))
    assert_same_bits(before, update if place == "synthesized" else update / 2)
    assert not storages([copied, copied.grad]) & used


@pytest.mark.parametrize("place", PLACES[1:])
def test_an_average_of_the_weights(place):
    """The average is updated at this place of each window, also where `p.grad` is an accumulator."""
    model, seen, average = llama(), [], None

    def look(now):
        nonlocal average
        if now == place:
            if average is None:
                average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
            average.update_parameters(model)
            seen.append([p.detach().clone() for p in model.parameters()])

    updates = train(model, look)
    assert_same_bits(updates, train(llama()))
    expected = [p.clone() for p in seen[0]]
    for now in seen[1:]:
        torch._foreach_lerp_(expected, now, 1 - DECAY)
    assert_same_bits([p.detach() for p in average.module.parameters()], expected)
    assert not torch.equal(expected[0], seen[-1][0])


class Copying(TrainerCallback):
    """Copies the model at each of these events, as an EMA does."""

    def __init__(self):
        self.copies = []

    def _copy(self, args, state, control, model=None, **kwargs):
        copied = copy.deepcopy(model)
        assert all(p.grad is None for p in copied.parameters())
        self.copies.append((copied, weights(copied)))

    on_train_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = _copy


def test_copies_within_the_trainer(tmp_path):
    trainers, copying = [], Copying()
    for callbacks in ([copying], None):
        trainers.append(
            make(SAGO, tmp_path, data=Pairs(6), callbacks=callbacks, gradient_accumulation_steps=2)
        )
        trainers[-1].train()
    assert_same_bits(*(weights(trainer.model) for trainer in trainers))
    assert len(copying.copies) == 1 + 4 * 3
    for copied, before in copying.copies:
        assert_same_bits(weights(copied), before)
    assert copying.copies[-1][0].lm_head.weight.equal(trainers[0].model.lm_head.weight)


class OutOfMemory(TrainerCallback):
    """Raises torch's error for the CPU once in the second window, at one place. Records the steps."""

    def __init__(self, place, accumulation):
        self.place, self.accumulation = place, accumulation
        self.raised = False
        self.steps, self.sizes, self._window = [], [], []

    def at(self, place):
        if place == self.place and len(self.steps) == 1 and not self.raised:
            # With accumulation, in the second micro-batch.
            if len(self._window) < self.accumulation - 1:
                return
            self.raised = True
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    def captured(self, batch):
        self._window.append(batch)

    def on_train_begin(self, args, state, control, **kwargs):
        self._window = []
        if self.raised:
            assert not [o for o in gc.get_objects() if type(o) is sago.GradientBuckets]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        window, self._window = self._window, self._window[:-1]
        self.at("step")
        self._window = window

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += windows(self._window, self.accumulation)
        self.sizes.append(len(self._window[0]["forget"]["input_ids"]))
        self._window = []


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("place", ["forward", "forget backward", "retain backward", "step"])
def test_a_training_that_starts_again_with_a_smaller_batch(place, accumulation, tmp_path):
    memory = OutOfMemory(place, accumulation)

    class Recorded(SAGO):
        def compute_forget_loss(self, model, forget_inputs):
            self.side = "forget"
            return -model(**forget_inputs).loss

        def compute_retain_loss(self, model, retain_inputs):
            memory.at("forward")
            self.side = "retain"
            return model(**retain_inputs).loss

        def training_step(self, model, inputs, *arguments):
            loss = super().training_step(model, inputs, *arguments)
            memory.captured(inputs)
            return loss

    trainer = make(
        Recorded,
        tmp_path,
        data=Pairs(20),
        callbacks=[memory],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        auto_find_batch_size=True,
    )
    # One of the first parameters, so that others have their gradient by then.
    embedding = trainer.model.get_input_embeddings().weight
    embedding.register_hook(lambda g: memory.at(f"{trainer.side} backward"))
    trainer.train()
    assert memory.raised
    assert memory.sizes[0] == 4
    assert all(size < 4 for size in memory.sizes[1:])
    assert trainer.state.global_step == len(memory.steps) - 1
    expected = llama()
    by_hand(expected, graddiff_losses, memory.steps)
    torch.testing.assert_close(weights(trainer.model), weights(expected), rtol=0, atol=DRIFT)
