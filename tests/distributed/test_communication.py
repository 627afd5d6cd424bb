"""FSDP2 sends for two backwards what docs/distributed.md says, counted on ranks that do not exist."""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.collectives import Collectives
from tests.support.ranks import FSDP2_ON_CPU, NO_FSDP2

pytestmark = pytest.mark.skipif(not FSDP2_ON_CPU, reason=NO_FSDP2)
LAYERS = 3


@contextmanager
def fake_ranks(count):
    """The first of `count` ranks. The other ranks do not exist, and collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Decoder(torch.nn.Module):
    """An embedding, layers, a norm and a head, of sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 6)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(6, 11, bias=False), torch.nn.Linear(11, 6, bias=False))
            for _ in range(LAYERS)
        )
        self.norm = torch.nn.RMSNorm(6)
        self.head = torch.nn.Linear(6, 13, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def padded(shapes, shard):
    """Elements with the padding of `fully_shard`: every rank has as many rows of every parameter."""
    return sum(-(-shape[0] // shard) * shard * math.prod(shape[1:]) for shape in shapes)


@pytest.mark.parametrize(("replicas", "shard"), [(1, 8), (2, 4)])
def test_a_second_backward_is_a_reduction_and_one_gather(replicas, shard):
    """It reduces every group of parameters again, and gathers only the group of the whole model again."""
    found = []
    with fake_ranks(8):
        mesh = init_device_mesh("cpu", (replicas, shard), mesh_dim_names=("replicate", "shard"))
        model = Decoder()
        rest = [p.shape for name, p in model.named_parameters() if not name.startswith("layers")]
        for module in [*model.layers, model]:
            fully_shard(module, mesh=mesh if replicas > 1 else mesh["shard"])

        def loss():
            return model(torch.arange(4)[None]).sum()

        loss().backward()  # the first backward teaches FSDP2 the order of the modules
        for losses in (lambda: [loss() + loss()], lambda: (loss() for _ in range(2))):
            with Collectives() as seen:
                for x in losses():
                    x.backward()
            found.append(Counter(seen.found))
    one, two = found
    assert sum(n for (name, _), n in one.items() if name == "_reduce_scatter_base") == LAYERS + 1
    assert ("allreduce" in {name for name, _ in one}) == (replicas > 1)
    more = Counter({key: n for key, n in one.items() if key[0] != "_allgather_base"})
    assert two - one == more + Counter({("_allgather_base", padded(rest, shard)): 1})
    assert one - two == Counter()
