"""Training runs that should end alike on one process and on several.

Everything is in fp64. A gated rule looks at signs, so a rounding can turn an element of the update over; here
a rounding is about 1e-16, and `single` asserts that no element of a gradient is nearly that close to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import sago
from tests.support import inputs

STEPS = 3
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}
ROWS, LENGTH = 8, 5  # of a batch, over all ranks
# 4 ranks hold 4, 4, 4 and 2 rows of 14, and 3, 3, 3 and none of 9.
INPUTS, WIDTH, HEADS, HEAD, HIDDEN, OUTPUTS = 6, 14, 2, 5, 9, 3
SUMS = ("ff", "fr", "rr", "uu", "uf", "ur", "conflict_fraction")
COUNTS = ("nonfinite_forget", "nonfinite_retain", "numel")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(-2, -3) for f in (self.q, self.k, self.v))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, OUTPUTS)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.temperature


def transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer().to(dtype)


@lru_cache
def mesh_of(**sizes: int) -> DeviceMesh:
    """Kept, because a mesh makes process groups."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def sharded(model: Transformer, mesh: DeviceMesh, **options: Any) -> Transformer:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """The blocks' linear layers by columns and rows; the rest, norms among it, is whole on every rank."""
    plan: dict[str, Any] = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    # The ranks have unlike numbers of hidden units, which only a DTensor knows.
    plan["mlp.up"] = ColwiseParallel(use_local_output=False)
    plan |= {"attention.out": RowwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


class Run(NamedTuple):
    """The parts of a training run that do not depend on the ranks.

    Attributes:
        order: "interleaved": forward, backward, forward, backward. "forwards first": forward, forward,
            backward, backward, as OpenUnlearning's trainers do.
        mean: Whether the micro-batches are averaged by the buckets, not by their losses.
        grouped: Whether the parameters of a block are one group.
    """

    rule: str
    optimizer: str = "adamw"
    accumulation: int = 1
    order: str = "interleaved"
    max_norm: float | None = None
    mean: bool = False
    grouped: bool = False


INTERLEAVED, FORWARDS_FIRST = "interleaved", "forwards first"
RUNS = (
    Run("sago", "adamw"),
    Run("sago", "sgd", accumulation=3, max_norm=0.5),
    Run("pcgrad", "sgd"),
    Run("pcgrad", "adamw", accumulation=3),
    Run("pcgrad", "sgd", max_norm=0.5, grouped=True),
    Run("pcgrad_global", "adamw"),
    Run("pcgrad_global", "sgd", accumulation=3, mean=True),
    Run("blur", "sgd", max_norm=0.5),
)


def runs(order: str) -> list[Run]:
    return [run._replace(order=order) for run in RUNS]


class Result(NamedTuple):
    """
    Attributes:
        parameters: Whole, by the names that they have in the model.
        local: What this rank holds, by name and part: ranks that hold the same part say the same.
        reports: The statistics of each step, by field.
    """

    parameters: dict[str, Tensor]
    local: dict[Any, Tensor]
    reports: list[dict[str, Any]]


def train(
    model: nn.Module,
    run: Run,
    share: tuple[int, int] = (0, 1),
    buckets: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    look: Callable[[Any], None] = lambda buckets: None,
) -> Result:
    """Some steps on the share `(i, n)` of every batch: the i-th of n equal parts."""
    buckets = buckets_of(model, run) if buckets is None else buckets
    optimizer = optimizer_of(model, run) if optimizer is None else optimizer
    reports = []
    for step in range(STEPS):
        for micro in range(run.accumulation):
            window(model, buckets, run, batches(step, micro, *share))
        look(buckets)
        report = buckets.synthesize_(run.rule, max_norm=run.max_norm, **WEIGHTS)
        optimizer.step()
        buckets.zero_()
        reports.append(fields(report))
    return Result(*parameters(model), reports)


def buckets_of(model: nn.Module, run: Run, **options: Any) -> sago.GradientBuckets:
    if run.grouped:
        names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
        options["groups"] = ["".join(name.split(".")[:2]) if "blocks" in name else "rest" for name in names]
    return sago.GradientBuckets(model, accumulation="mean" if run.mean else "sum", **options)


def optimizer_of(model: nn.Module, run: Run, **options: Any) -> torch.optim.Optimizer:
    if run.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    return torch.optim.SGD(model.parameters(), lr=5e-2, momentum=0.9, **options)


def window(model: nn.Module, buckets: Any, run: Run, batch: Sequence[Tensor]) -> None:
    """A micro-batch of each side."""
    losses = losses_of(model, run, batch)
    if run.order == FORWARDS_FIRST:
        computed = [loss() for loss in losses]
        losses = [lambda: computed[0], lambda: computed[1]]
    for capture, loss in zip((buckets.forget, buckets.retain), losses, strict=True):
        with capture():
            loss().backward()


def losses_of(model: nn.Module, run: Run, batch: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    x, y, z, w = batch
    size = 1 if run.mean else run.accumulation
    return [lambda: -mse_loss(model(x), y) / size, lambda: mse_loss(model(z), w) / size]


def batches(step: int, micro: int, i: int = 0, n: int = 1) -> list[Tensor]:
    """Inputs and targets of forget, inputs and targets of retain."""
    shapes = (ROWS, LENGTH, INPUTS), (ROWS, LENGTH, OUTPUTS)
    found = []
    for k, shape in enumerate(shapes * 2):
        drawn = inputs.normal(torch.Size(shape).numel(), 1000 + 100 * step + 10 * micro + k).view(shape)
        found.append(drawn.chunk(n)[i])
    return found


def scaled(model: nn.Module, part: tuple[int, int] = (0, 1)) -> tuple[list[float], dict[str, Tensor]]:
    """A run under GradScaler, unscaled ahead of clipping; in the second step one row of a batch is inf."""
    buckets, optimizer = sago.GradientBuckets(model), optimizer_of(model, Run("pcgrad", "sgd"))
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(STEPS):
        batch = batches(step, 0, *part)
        if step == 1 and part[0] == part[1] - 1:
            batch[0][-1] *= torch.inf
        for capture, loss in zip(
            (buckets.forget, buckets.retain), losses_of(model, Run("pcgrad"), batch), strict=True
        ):
            with capture():
                scaler.scale(loss()).backward()
        buckets.unscale_(scaler, optimizer)
        buckets.synthesize_("pcgrad", max_norm=0.5, **WEIGHTS)
        scaler.step(optimizer)
        scaler.update()
        buckets.zero_()
        scales.append(scaler.get_scale())
    return scales, parameters(model)[0]


def assert_scaled(on_ranks: Sequence[tuple[list[float], dict[str, Tensor]]]) -> None:
    """`scaled` on every rank is that on one process: all skip the same step."""
    scales, expected = scaled(transformer())
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    for found, params in on_ranks:
        assert found == scales
        assert_equal_tensors(params, expected)


def one_forward(model: nn.Module, run: Run, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """The update of a step whose losses share a forward, captured one within the other."""
    buckets = buckets_of(model, run)
    x, y, z, w = batches(0, 0, *part)
    forget, retain = model(torch.cat([x, z])).chunk(2)
    with buckets.forget():
        (-mse_loss(forget, y)).backward(retain_graph=True)
        with buckets.retain():
            mse_loss(retain, w).backward(retain_graph=True)
        (-mse_loss(retain, w)).backward()
    buckets.synthesize_(run.rule, **WEIGHTS)
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding: in fp64, where a step is off by 1e-15 and the optimizer magnifies that by less than 1e4.

    Products over the wrong ranks, a mean for a sum or a missing reduction show in the third digit.
    """
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(
            found[name], t, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


def share() -> tuple[int, int]:
    """The loss of this rank, if each rank has its own part of a batch."""
    return dist.get_rank(), dist.get_world_size()


def parameters(model: nn.Module) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    """The whole tensors, and the parts of them that this rank holds."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    named = dict(model.named_parameters())
    return (
        {name: whole(p) for name, p in named.items()},
        {(name, part(p)): local(p) for name, p in named.items()},
    )


def part(t: Tensor) -> tuple[tuple[str | int, int], ...]:
    """This rank's place along the dimensions of the mesh over which `t` is sharded."""
    if not isinstance(t, DTensor):
        return ()
    mesh = t.device_mesh
    names = mesh.mesh_dim_names or range(mesh.ndim)
    dims = zip(names, t.placements, strict=True)
    return tuple((name, mesh.get_local_rank(name)) for name, p in dims if not p.is_replicate())


def local(t: Tensor) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach().clone()


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def fields(report: Any) -> dict[str, Any]:
    if isinstance(report, dict):
        return report
    found = {name: getattr(report, name).clone() for name in (*SUMS, *COUNTS)}
    return {"groups": [str(key).removeprefix("module.") for key in report.groups], **found}


@lru_cache
def single(run: Run) -> Result:
    """The run on this process alone."""
    if run.order != INTERLEAVED:
        return single(run._replace(order=INTERLEAVED))
    result = train(transformer(), run, look=assert_far_from_the_gate)
    # The run must contain the cases that it is meant to show.
    if run.rule.startswith("pcgrad"):
        assert any((report["fr"] < 0).any() for report in result.reports)
    if run.max_norm is not None:
        assert all(report["uu"].sum().sqrt() > run.max_norm for report in result.reports)
    return result


def assert_far_from_the_gate(buckets: sago.GradientBuckets) -> None:
    for g in (*buckets.forget_grads, *buckets.retain_grads):
        assert g.abs().min() > 1e-10


def assert_as_single(found: Sequence[dict[Run, Result]], replicas: bool) -> None:
    """Every run on every rank. `replicas`: whether there is anything that several ranks hold."""
    for run in found[0]:
        results = [rank[run] for rank in found]
        for result in results:
            try:
                assert_equal_results(result, single(run))
            except AssertionError as error:
                raise AssertionError(f"{run}: {error}") from None
        assert_same_bits(results, replicas)


def assert_equal_results(found: Result, expected: Result) -> None:
    """Compares the parameters and the reports of the whole gradients, up to rounding."""
    assert_equal_tensors(found.parameters, expected.parameters)
    assert len(found.reports) == len(expected.reports)
    for report, right in zip(found.reports, expected.reports, strict=True):
        assert_equal_reports(report, right)


def assert_equal_reports(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["groups"] == expected["groups"]
    # Weights that are off by 1e-11 make gradients that are off by 1e-10. Sums that may all but cancel are off
    # by a share of their magnitudes, which are below `size`.
    size = (expected["ff"] * expected["rr"]).sqrt().max().item()
    for name in SUMS:
        if name in found:
            atol = 1e-12 * size if name in ("fr", "uf", "ur") else 0.0
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-9, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )
    for name in COUNTS:
        if name in found:
            assert found[name].tolist() == expected[name].tolist(), name


def assert_same_bits(results: Sequence[Result], replicas: bool) -> None:
    """The reports of all ranks, and what replicas hold."""
    for result in results[1:]:
        for report, right in zip(result.reports, results[0].reports, strict=True):
            for name, value in right.items():
                found = report[name]
                assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name
    held: dict[Any, Tensor] = {}
    compared = False
    for result in results:
        for key, p in result.local.items():
            compared |= key in held
            assert torch.equal(held.setdefault(key, p), p), key
    assert compared == replicas
