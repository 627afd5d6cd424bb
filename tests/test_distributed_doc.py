"""The examples of docs/distributed.md on four ranks, against the same loop on one."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sago
from tests.support.oracle import SUM_ERROR
from tests.support.properties import assert_near
from tests.support.ranks import Ranks

PAGE = Path(__file__).parents[1] / "docs/distributed.md"
ENGINES = ("DDP", "FSDP2", "HSDP", "Tensor parallelism with FSDP2")
OTHERS = ("Lists of DTensors, and other shards", "DeepSpeed", "Accelerate")
LOOP = "Engines"


def examples():
    """Code by the heading above it."""
    found = {}
    for section in re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        if code:
            (found[section.splitlines()[0]],) = code
    return found


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        self.head = torch.nn.Linear(6, 5)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def forget_loss(model):
    return -(model(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)) - 1).square().mean()


def retain_loss(model):
    return (model(torch.linspace(-1, 2, 18, dtype=torch.float64).view(3, 6)) - 1).square().mean()


def names():
    return {
        **globals(),
        "model": Model(),
        "steps": 3,
        "device": "cpu",
        "replicas": 2,
        "shards": 2,
        "init_device_mesh": init_device_mesh,
        "fully_shard": fully_shard,
        "parallelize_module": parallelize_module,
        "ColwiseParallel": ColwiseParallel,
        "RowwiseParallel": RowwiseParallel,
    }


ALONE = """
buckets = sago.GradientBuckets(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
"""


def trained(setup):
    """The parameters after the loop of the page, and what the last report says."""
    space = names()
    exec(setup, space)
    exec(examples()[LOOP], space)
    params = [p.full_tensor() if isinstance(p, DTensor) else p for p in space["model"].parameters()]
    return [p.detach().clone() for p in params], space["report"].summary()


def on_a_rank(heading):
    return trained(examples()[heading])


def summed(forget, retain):
    """The update of this rank's shards, by the example with `SumOver`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [[t.chunk(world)[rank].clone() for t in side] for side in (forget, retain)]
    space = {"sago": sago, "forget": mine[0], "retain": mine[1], "group": None}
    exec(examples()[OTHERS[0]], space)
    return space["retain"]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def alone():
    before = [p.detach().clone() for p in Model().parameters()]
    params, report = trained(ALONE)
    assert all((p - q).abs().max() > 1e-4 for p, q in zip(params, before, strict=True))
    assert report["cos_forget_retain"] < -0.1
    return params, report


@pytest.mark.parametrize("heading", ENGINES)
def test_engines(ranks, alone, heading):
    """To rounding: in fp64 a step is off by 1e-15, which AdamW magnifies where a gradient is near 0."""
    expected, said = alone
    for params, report in ranks(on_a_rank, heading):
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p, e, rtol=1e-9, atol=1e-12)
        assert report == pytest.approx(said, rel=1e-9, abs=1e-12)


def test_other_shards(ranks):
    generator = torch.Generator().manual_seed(0)
    forget = [torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    retain = [torch.randn(8, 3, generator=generator, dtype=torch.float64) - f for f in forget]
    expected, _ = sago.synthesize(forget, retain, "pcgrad")
    found = ranks(summed, forget, retain)
    for parts, e in zip(zip(*found, strict=True), expected, strict=True):
        assert_near([torch.cat(parts)], [e], 16 * SUM_ERROR[torch.float64])


def test_every_example_is_run_or_is_of_an_engine_that_is_not_here():
    found = examples()
    assert set(found) == {LOOP, *ENGINES, *OTHERS}
    for heading, code in found.items():
        compile(code, heading, "exec")
