"""10,000 windows in each way in: memory, live objects and function calls of a window do not grow.

`make test-long` runs these tests and prints the figures. The number of calls takes the place of the time,
which depends on what else the machine does.
"""

import gc
import os
import sys
import time

import pytest
import torch
from torch import nn

import sago

WINDOWS, EARLY = 10_000, 1_000
# Bytes of resident memory. The allocator takes some MiB at once, and 1 KiB a window would take 9 MiB.
GROWTH = 8 * 2**20

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


class Model:
    """Losses of the two sides, which reach another pattern of parameters in every third window."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(16, 4))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4)

    def loss(self, i, seed):
        x = self.net[1](self.net[0](torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))))
        return self.net[2 + (i % 3 == 0)](x).square().mean()


def lists():
    """New tensors in each call, so that addresses are freed and used again."""
    shapes = [(3, 5), (8,), ()]
    generator = torch.Generator().manual_seed(0)

    def window(i):
        sides = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(2)]
        return sago.synthesize_(*sides, ("sago", "pcgrad")[i % 2])

    return window


def plan():
    sides = [[torch.randn(3, 5), torch.randn(8)] for _ in range(2)]
    made = sago.Plan(*sides, "pcgrad")
    return lambda i: made.synthesize_(gamma=1.0 + i % 2)


def buckets():
    model = Model()
    made = sago.GradientBuckets(model.net)

    def window(i):
        with made.forget():
            (-model.loss(i, 2 * i)).backward()
        with made.retain():
            model.loss(i // 2, 2 * i + 1).backward()
        report = made.synthesize_("pcgrad", max_norm=1.0)
        model.optimizer.step()
        made.zero_()
        return report

    return window


def one_copy():
    model = Model()
    made = sago.GradientBuckets(model.net, one_copy=True)

    def window(i):
        with made.forget():
            (-model.loss(i, 2 * i)).backward()
        with made.synthesize_in_backward("sago") as step:
            model.loss(i // 2, 2 * i + 1).backward()
        model.optimizer.step()
        made.zero_()
        return step.report

    return window


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Calls:
    """Counts the function calls in a block."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _profile(self, frame, event, argument):
        self.count += event in ("call", "c_call")


def state():
    gc.collect()
    return len(gc.get_objects()), resident(), time.perf_counter()


def check_flat(name, calls, before, after):
    """`calls` of an early and of the last window, and the `state` before them."""
    objects, memory = after[0] - before[0], after[1] - before[1]
    milliseconds = (after[2] - before[2]) / (WINDOWS - EARLY) * 1e3
    print(
        f"\n{name}: {calls[1]} calls a window (window {EARLY}: {calls[0]}), {objects:+} objects, "
        f"{memory / 1024:+.0f} KiB, {milliseconds:.2f} ms a window"
    )
    assert calls[0] == calls[1]
    assert abs(objects) < 100
    assert memory < GROWTH


needs_memory = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="reads resident memory from /proc"
)


@needs_memory
@pytest.mark.parametrize("make", [lists, plan, buckets, one_copy], ids=lambda make: make.__name__)
def test_windows_cost_the_same_at_the_end(make):
    window, calls, found = make(), [], []
    for i in range(WINDOWS + 1):
        if i in (EARLY, WINDOWS):
            with Calls() as seen:
                window(i - i % 6)
            calls.append(seen.count)
            found.append(state())
        report = window(i)
        if i % 100 == 0:
            assert report.ff.isfinite().all()
    check_flat(make.__name__, calls, *found)


@needs_memory
def test_steps_of_a_trainer_cost_the_same_at_the_end(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sago.integrations.transformers import GradientSynthesisMixin
    from tests.support import trainers

    class Synthesized(GradientSynthesisMixin, trainers.GradDiff):
        pass

    class Watch(transformers.TrainerCallback):
        def __init__(self):
            self.calls, self.found, self.counting = [], [], None

        def on_step_begin(self, args, state_, control, **_):
            if state_.global_step in (EARLY, WINDOWS):
                self.found.append(state())
                self.counting = Calls().__enter__()

        def on_step_end(self, args, state_, control, **_):
            if self.counting is not None:
                self.counting.__exit__()
                self.calls.append(self.counting.count)
                self.counting = None

    def collate(items):
        return {
            side: {k: torch.stack([item[side][k] for item in items]) for k in items[0][side]}
            for side in ("forget", "retain")
        }

    watch = Watch()
    trainer = Synthesized(
        model=trainers.llama(),
        args=trainers.arguments(tmp_path, max_steps=WINDOWS + 1, logging_strategy="no", learning_rate=1e-5),
        train_dataset=trainers.Pairs(1009),  # no epoch ends in a window that is measured
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.train()
    check_flat("trainer", watch.calls, *watch.found)
