"""The peak memory of one unlearning step, and the passes over gradients that extraction adds to it.

A step has micro-batches, two unless said otherwise, with a forward and a backward of the forget and of the
retain loss in each. Then the update is synthesized into `p.grad`; there is no optimizer. The model is a Llama
with random weights, the batches are so small that activations hardly count beside gradients. Contenders:

- "summed loss, one backward": `(gamma * forget_loss + alpha * retain_loss).backward()`, as most code has it.
  Within that backward autograd holds the gradient of one loss until that of the other arrives, so from the
  second micro-batch on it needs room for two.
- "summed loss, two backwards": `(gamma * forget_loss).backward()` and `(alpha * retain_loss).backward()` into
  one `p.grad`. One copy of the gradients is the floor.
- "GradientBuckets": of sago, made within what is measured, so that its accumulators are counted.
- "released": the steps of the paper's code (`grad_surgery.py` in github.com/sustech-nlp/SAGO) on one device,
  with the synthesis of `benchmarks.released`. The copy of either gradient that accelerate's `reduce` makes
  there, even for a single process, and the emptying of the cache are left out.

The peak is that of two steps, above a level with nothing but the weights, so it holds what is kept between
steps. On the CPU it is counted from torch's allocator through its profiler, on a GPU it is
`torch.cuda.max_memory_allocated`. No record of a GPU exists yet, neither of the small nor of the full size.

`copies` is the peak in units of the gradients, `copies_kept` what is held while an optimizer would run. The
rest is about one step without its synthesis: `extra_ops` and `extra_passes` count what is issued outside of
forwards and backwards, in operations and in elements over those of the gradients, and `adds_in_backward` the
additions of gradients within; the first gradient to reach an empty `p.grad` is not added, but moved there.
"""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import sago
from benchmarks.gradients import WrongResult
from benchmarks.measure import origin
from benchmarks.released import released

GAMMA, ALPHA = 0.75, 1.25
SEQUENCE = 4
COLUMNS = (
    "dtype", "contender", "rule", "peak_mib", "copies", "copies_kept", "extra_ops", "extra_passes",
    "adds_in_backward",
)  # fmt: skip
# For `difference`. Where the arithmetic is the same, so are the bits: autograd adds micro-batches in the
# order of the released code, and `sago` rounds once. The others round intermediate results to the dtype of
# the gradients.
ROUNDING = {torch.bfloat16: 2**-6, torch.float32: 1e-6}
MIB = 2**20

Losses = Iterable[tuple[Tensor, Tensor]]
Backward = Callable[[Tensor], None]


class Shape(NamedTuple):
    """A Llama with the proportions of Llama-3-8B: heads of 128, four to a key, an MLP 3.5 times wider."""

    hidden: int
    layers: int
    vocabulary: int


# Embedding and head have the same share of all elements in both, because the gradient of the largest tensor
# is what a backward holds besides the accumulators.
SHAPES = {"small": Shape(512, 8, 4096), "llama-3-8b": Shape(4096, 32, 128256)}


class Contender(Protocol):
    """One way to come from the losses of the micro-batches to an update in `p.grad`."""

    def __init__(self, params: Sequence[Tensor], rule: str) -> None: ...

    def accumulate(self, losses: Losses, backward: Backward) -> None: ...

    def synthesize(self) -> None: ...

    def zero(self) -> None: ...


class _Summed:
    def __init__(self, params: Sequence[Tensor], rule: str) -> None:
        self.params = params  # `rule` is "sum"

    def synthesize(self) -> None:
        pass

    def zero(self) -> None:
        _clear(self.params)


class OneBackward(_Summed):
    def accumulate(self, losses: Losses, backward: Backward) -> None:
        for forget, retain in losses:
            backward(GAMMA * forget + ALPHA * retain)


class TwoBackwards(_Summed):
    def accumulate(self, losses: Losses, backward: Backward) -> None:
        for forget, retain in losses:
            backward(GAMMA * forget)
            backward(ALPHA * retain)


class Buckets:
    accumulate_dtype: torch.dtype | None = None

    def __init__(self, params: Sequence[Tensor], rule: str) -> None:
        self.rule = rule
        self.buckets = sago.GradientBuckets(params, accumulate_dtype=self.accumulate_dtype)

    def accumulate(self, losses: Losses, backward: Backward) -> None:
        for forget, retain in losses:
            with self.buckets.forget():
                backward(forget)
            with self.buckets.retain():
                backward(retain)

    def synthesize(self) -> None:
        self.buckets.synthesize_(self.rule, GAMMA, ALPHA)

    def zero(self) -> None:
        self.buckets.zero_()


class BucketsInFloat32(Buckets):
    accumulate_dtype = torch.float32


class Released:
    def __init__(self, params: Sequence[Tensor], rule: str) -> None:
        self.params, self.rule = params, rule
        self.sums: list[list[Tensor] | None] = [None, None]

    def accumulate(self, losses: Losses, backward: Backward) -> None:
        for pair in losses:
            for side, loss in enumerate(pair):
                backward(loss)
                so_far = self.sums[side]
                if so_far is None:
                    self.sums[side] = [p.grad.clone() for p in self.params]
                else:
                    for total, p in zip(so_far, self.params, strict=True):
                        total.add_(p.grad)
                _clear(self.params)

    def synthesize(self) -> None:
        (forget, retain), self.sums = self.sums, [None, None]
        updates = released(forget, retain, self.rule, GAMMA, ALPHA)
        for p, update in zip(self.params, updates, strict=True):
            p.grad = update

    def zero(self) -> None:
        _clear(self.params)


CONTENDERS: dict[str, type[Contender]] = {
    "summed loss, one backward": OneBackward,
    "summed loss, two backwards": TwoBackwards,
    "GradientBuckets": Buckets,
    "GradientBuckets, float32": BucketsInFloat32,
    "released": Released,
}


def run(
    shape: Shape = SHAPES["small"],
    rules: Sequence[str] = ("sago", "pcgrad_global"),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    device: str = "cpu",
    micro_batches: int = 2,
) -> dict[str, Any]:
    """Measures every contender; raises `WrongResult` where their updates disagree.

    A contender that the device has no memory for has a row without numbers.
    """
    import transformers

    batches = make_batches(shape, micro_batches, device)
    rows, sizes = [], {}
    for dtype in dtypes:
        model = make_model(shape, dtype, device)
        params = list(model.parameters())
        copy = sum(p.nbytes for p in params)
        sizes[_name(dtype)] = {
            "copy_mib": copy / MIB,
            "largest_tensor_copies": max(p.nbytes for p in params) / copy,
            "activations_copies": _activations(model, batches, device) / copy,
        }
        expected: dict[str, tuple[str, list[Tensor]]] = {}
        for name, rule in tqdm(list(_cases(rules, dtype)), desc=f"memory {_name(dtype)}"):
            row = dict.fromkeys((*COLUMNS, "ops"))
            row.update(dtype=_name(dtype), contender=name, rule=rule)
            try:
                # First, because torch.compile works in it, which is not to be measured.
                counts = _counts(CONTENDERS[name](params, rule), model, batches)
                updates = [p.grad.cpu() for p in params]  # a GPU has no room for them
                _clear(params)
                check(name, rule, updates, *expected.setdefault(rule, (name, updates)))
                found = _peak(CONTENDERS[name], rule, model, batches, device)
                row.update(peak_mib=found.bytes / MIB, copies=found.bytes / copy, **counts)
                row.update(copies_kept=found.kept / copy)
            except torch.OutOfMemoryError:
                pass  # the row says so
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
        "sizes": sizes,
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
        attn_implementation="eager",  # deterministic on a GPU too: updates are compared to the bit
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def make_batches(shape: Shape, micro_batches: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Token ids of a forget and a retain text for every micro-batch.

    They differ in the last token only, so that the gradients conflict and `pcgrad_global` projects: the
    released code needs a copy more then.
    """
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(shape.vocabulary, (micro_batches, 2, 1, SEQUENCE), generator=generator)
    texts[:, 1, :, :-1] = texts[:, 0, :, :-1]
    return [(forget, retain) for forget, retain in texts.to(device)]


def losses(
    model: torch.nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The forget loss, a negated likelihood, and the retain loss of each micro-batch, when asked for."""
    for forget, retain in batches:
        yield -model(input_ids=forget, labels=forget).loss, model(input_ids=retain, labels=retain).loss


class Peak:
    """Bytes above the level at the start: `bytes` at the highest, `kept` at the end."""

    bytes = 0
    kept = 0


@contextmanager
def peak(device: str = "cpu") -> Iterator[Peak]:
    """Counts what torch allocates within the block.

    Nothing of before should be freed in it: the profiler of the CPU does not see that, a GPU's count does.
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
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    levels = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
    found.bytes, found.kept = max(levels), levels[-1]


class Passes(TorchDispatchMode):
    """Counts the operations that write a tensor of a gradient's size, apart for inside of backwards and out.

    Outside, forwards excepted, these are the copies, additions and fills of an extraction. Inside, only the
    additions are counted, by autograd or in its place by a hook: the others make the gradients.

    Attributes:
        outside: Names of operations and how many there were.
        written, added: Elements that they wrote, outside; and that were added inside.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.shapes = {p.shape for p in params}
        # An accumulator may be flat, with many parameters in it.
        self.least = min(p.numel() for p in params if p.dim() > 1)
        self.outside: Counter[str] = Counter()
        self.written = self.added = 0
        self._in_backward = False

    def backward(self, loss: Tensor) -> None:
        self._in_backward = True
        try:
            loss.backward()
        finally:
            self._in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **(kwargs or {})}
        written: Any = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if not written and not any(r.alias_info for r in schema.returns):  # else it is a view
            written = result
        name = schema.name.removeprefix("aten::")
        elements = sum(t.numel() for t in tree_leaves(written) if self._is_gradient(t))
        if elements == 0 or name.startswith(("empty", "new_empty")):
            return result
        if not self._in_backward:
            self.outside[name] += 1
            self.written += elements
        elif name in ("add", "add_"):
            self.added += elements
        return result

    def _is_gradient(self, t: Any) -> bool:
        return isinstance(t, Tensor) and (t.shape in self.shapes or t.numel() >= self.least)


def check(name: str, rule: str, updates: Sequence[Tensor], other: str, right: Sequence[Tensor]) -> None:
    """Raises `WrongResult` unless the updates of the contenders `name` and `other` are the same."""
    dtype = updates[0].dtype
    exact = rule == "sago" and "float32" not in name
    allowed = 0.0 if exact else ROUNDING[dtype]
    error = difference(updates, right)
    if not error <= allowed:  # not `>`: a NaN is wrong
        raise WrongResult(
            f"{name} ({_name(dtype)}, {rule}) has not the update of {other}: relative error {error:.1e}, "
            f"allowed {allowed:.1e}. Nothing is reported."
        )


def difference(updates: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The norm of the difference, relative to the norm of what is right."""
    pairs = list(zip(updates, right, strict=True))
    error = sum((u.float() - e.float()).square().sum(dtype=torch.float64).item() for u, e in pairs)
    norm = sum(e.float().square().sum(dtype=torch.float64).item() for _, e in pairs)
    return float((error / norm) ** 0.5) if norm > 0 else float("nan")


def _cases(rules: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    for name, contender in CONTENDERS.items():
        if contender is BucketsInFloat32 and dtype == torch.float32:
            continue
        for rule in ("sum",) if issubclass(contender, _Summed) else rules:
            yield name, rule


def _peak(
    make: type[Contender],
    rule: str,
    model: torch.nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    device: str,
) -> Peak:
    """Of the first two steps and of what is made for them."""
    with peak(device) as found:
        contender = make(list(model.parameters()), rule)
        contender.accumulate(losses(model, batches), Tensor.backward)
        contender.synthesize()
        contender.zero()
        contender.accumulate(losses(model, batches), Tensor.backward)
        contender.synthesize()
    return found


def _counts(
    contender: Contender, model: torch.nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Of the second step, from the clearing of the first to the synthesis, which is run but not counted."""
    params = list(model.parameters())
    contender.accumulate(losses(model, batches), Tensor.backward)
    contender.synthesize()
    with Passes(params) as passes:
        contender.zero()
        contender.accumulate(losses(model, batches), passes.backward)
    contender.synthesize()
    elements = sum(p.numel() for p in params)
    return {
        "extra_ops": passes.outside.total(),
        "extra_passes": passes.written / elements,
        "adds_in_backward": passes.added / elements,
        "ops": dict(passes.outside),
    }


def _activations(model: torch.nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: str) -> int:
    """Bytes that the two graphs of a micro-batch keep."""
    with peak(device) as found:
        kept = next(losses(model, batches))
    del kept
    return found.kept


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
