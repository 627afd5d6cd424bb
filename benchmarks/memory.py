"""Measures the peak memory of one unlearning step.

A step has two micro-batches by default, each with a forward and a backward of both losses. Then the update is
synthesized into `p.grad`. The model is a Llama with random weights. Batches are small, so that the gradients
are much larger than the activations. Contenders:

- "summed loss, one backward": `(gamma * forget_loss + alpha * retain_loss).backward()`. Autograd holds the
  gradient of one loss until that of the other arrives, from the second micro-batch on besides `p.grad`.
- "summed loss, two backwards": one backward of each weighted loss. One copy of the gradients is the floor.
- "GradientBuckets": the buckets of sago, made inside the measured block, so that accumulators are counted.
- "released": the steps of the paper's code on one device, with the synthesis of `benchmarks.released` and
  without the copies of accelerate's `reduce`.

The peak is that of two steps, above a level with nothing but the weights. On the CPU the profiler counts the
allocations of torch. On a GPU the peak is `torch.cuda.max_memory_allocated`. `copies` is the peak in units of
the gradients, and `copies_kept` the memory that is held when an optimizer would run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from tqdm import tqdm

import sago
from benchmarks.gradients import ALPHA, GAMMA, WrongResult
from benchmarks.measure import dtype_name, origin
from benchmarks.released import released

SEQUENCE = 4
COLUMNS = ("dtype", "contender", "rule", "peak_mib", "copies", "copies_kept")
# Tolerances of the relative error of an update. `sago` in the dtype of the gradients needs the same bits. The
# others round intermediate results.
ROUNDING = {torch.bfloat16: 2**-6, torch.float32: 1e-6}
MIB = 2**20

Batches = Sequence[tuple[Tensor, Tensor]]
Losses = Iterable[tuple[Tensor, Tensor]]
# Accumulates the gradients of the losses and makes the update in `p.grad`; prepares the next step.
Contender = tuple[Callable[[Losses], None], Callable[[], Any]]


class Shape(NamedTuple):
    """A Llama with the proportions of Llama-3-8B: heads of 128, four to a key, an MLP 3.5 times wider."""

    hidden: int
    layers: int
    vocabulary: int


# The largest tensor has the same share of all elements in both shapes: a backward holds its gradient.
SHAPES = {"small": Shape(512, 8, 4096), "llama-3-8b": Shape(4096, 32, 128256)}


def one_backward(params: Sequence[Tensor], rule: str) -> Contender:
    def step(losses: Losses) -> None:
        for forget, retain in losses:
            (GAMMA * forget + ALPHA * retain).backward()

    return step, partial(_clear, params)


def two_backwards(params: Sequence[Tensor], rule: str) -> Contender:
    def step(losses: Losses) -> None:
        for forget, retain in losses:
            (GAMMA * forget).backward()
            (ALPHA * retain).backward()

    return step, partial(_clear, params)


def buckets(params: Sequence[Tensor], rule: str, dtype: torch.dtype | None = None) -> Contender:
    made = sago.GradientBuckets(params, accumulate_dtype=dtype)

    def step(losses: Losses) -> None:
        for forget, retain in losses:
            with made.forget():
                forget.backward()
            with made.retain():
                retain.backward()
        made.synthesize_(rule, GAMMA, ALPHA)

    return step, made.zero_


def by_released(params: Sequence[Tensor], rule: str) -> Contender:
    def step(losses: Losses) -> None:
        sums: list[list[Tensor]] = [[], []]
        for pair in losses:
            for side, loss in zip(sums, pair, strict=True):
                loss.backward()
                if side:
                    for total, p in zip(side, params, strict=True):
                        total.add_(p.grad)
                else:
                    side += [p.grad.clone() for p in params]
                _clear(params)
        for p, update in zip(params, released(*sums, rule, GAMMA, ALPHA), strict=True):
            p.grad = update

    return step, partial(_clear, params)


SUMMED = {"summed loss, one backward": one_backward, "summed loss, two backwards": two_backwards}
CONTENDERS: dict[str, Callable[[Sequence[Tensor], str], Contender]] = {
    **SUMMED,
    "GradientBuckets": buckets,
    "GradientBuckets, float32": partial(buckets, dtype=torch.float32),
    "released": by_released,
}


def run(
    shape: Shape = SHAPES["small"],
    rules: Sequence[str] = ("sago", "pcgrad_global"),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    device: str = "cpu",
    micro_batches: int = 2,
) -> dict[str, Any]:
    """Measures every contender. Raises `WrongResult` where their updates disagree.

    If the device has too little memory for a contender, its row has no numbers.
    """
    import transformers

    batches = make_batches(shape, micro_batches, device)
    rows = []
    for dtype in dtypes:
        model = make_model(shape, dtype, device)
        params = list(model.parameters())
        copy = sum(p.nbytes for p in params)
        expected: dict[str, tuple[str, list[Tensor]]] = {}
        for name, rule in tqdm(list(_cases(rules, dtype)), desc=f"memory {dtype_name(dtype)}"):
            row = dict.fromkeys(COLUMNS)
            row.update(dtype=dtype_name(dtype), contender=name, rule=rule)
            try:
                # The first two steps are not measured, because torch.compile compiles in them.
                _steps(CONTENDERS[name], rule, model, batches)
                updates = [p.grad.cpu() for p in params]  # a GPU may not have the memory to keep them
                _clear(params)
                check(name, rule, updates, *expected.setdefault(rule, (name, updates)))
                with peak(device) as found:
                    kept = _steps(CONTENDERS[name], rule, model, batches)
                del kept
                row.update(peak_mib=found.bytes / MIB, copies=found.bytes / copy)
                row.update(copies_kept=found.kept / copy)
            except torch.OutOfMemoryError:
                pass  # the row has no numbers
            _clear(params)
            rows.append(row)
        elements, tensors = sum(p.numel() for p in params), len(params)
        del model, params
    return {
        **origin(device, "sago", "kernels"),
        "transformers": transformers.__version__,
        **shape._asdict(),
        "elements": elements,
        "tensors": tensors,
        "micro_batches": micro_batches,
        "sequence": SEQUENCE,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


def make_model(shape: Shape, dtype: torch.dtype, device: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, shape.hidden // 128)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=7 * shape.hidden // 2,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        use_cache=False,
        attn_implementation="eager",  # deterministic on a GPU, because updates are compared bit for bit
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def make_batches(shape: Shape, micro_batches: int, device: str) -> Batches:
    """Returns the token ids of a forget and a retain text for every micro-batch.

    The two texts differ in the last token only. Their gradients therefore conflict, and `pcgrad_global`
    projects, which takes one more copy in the released code.
    """
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(shape.vocabulary, (micro_batches, 2, 1, SEQUENCE), generator=generator)
    texts[:, 1, :, :-1] = texts[:, 0, :, :-1]
    return [(forget, retain) for forget, retain in texts.to(device)]


def losses(model: torch.nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Computes the forget loss, a negated likelihood, and the retain loss of each micro-batch when asked."""
    for forget, retain in batches:
        yield -model(input_ids=forget, labels=forget).loss, model(input_ids=retain, labels=retain).loss


class Peak:
    """Bytes above the level at the start: `bytes` at the highest point, `kept` at the end."""

    bytes = 0
    kept = 0


@contextmanager
def peak(device: str = "cpu") -> Iterator[Peak]:
    """Counts the memory that torch allocates inside the block.

    On the CPU, older memory that is freed inside the block is not counted. On a GPU it is.
    """
    found = Peak()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - start
        found.kept = torch.cuda.memory_allocated(device) - start
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    live: dict[int, int] = {}  # bytes by address
    levels = [0]
    for event in sorted(_allocations(profile), key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            live[fields.ptr] = fields.alloc_size
        else:  # memory from before the block, which another object may free inside it, is not counted
            live.pop(fields.ptr, None)
        levels.append(sum(live.values()))
    found.bytes, found.kept = max(levels), levels[-1]


def _allocations(profile: torch.profiler.profile) -> Iterator[Any]:
    """The events of the profiler in which memory is allocated or freed."""
    assert profile.profiler is not None
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            yield event


def check(name: str, rule: str, updates: Sequence[Tensor], other: str, right: Sequence[Tensor]) -> None:
    """Raises `WrongResult` unless the updates of the contenders `name` and `other` are the same."""
    dtype = updates[0].dtype
    exact = rule == "sago" and "float32" not in name
    allowed = 0.0 if exact else ROUNDING[dtype]
    pairs = [(u.double(), e.double()) for u, e in zip(updates, right, strict=True)]
    norm = sum(e.square().sum().item() for _, e in pairs)
    error = (sum((u - e).square().sum().item() for u, e in pairs) / norm) ** 0.5 if norm else float("nan")
    if not error <= allowed:  # not `>`: a NaN must fail
        raise WrongResult(
            f"{name} ({dtype_name(dtype)}, {rule}) does not have the update of {other}: relative error "
            f"{error:.1e}, allowed {allowed:.1e}. Nothing is reported."
        )


def _cases(rules: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    for name in CONTENDERS:
        if dtype_name(dtype) not in name:  # accumulators in the dtype of the gradients are the default
            for rule in ("sum",) if name in SUMMED else rules:
                yield name, rule


def _steps(make: Callable[..., Contender], rule: str, model: torch.nn.Module, batches: Batches) -> Contender:
    """Runs two steps. The contender is returned, because its accumulators count as memory that is kept."""
    step, zero = make(list(model.parameters()), rule)
    step(losses(model, batches))
    zero()
    step(losses(model, batches))
    return step, zero


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None
