"""Measures the time and the peak memory of whole unlearning steps beside those of the summed loss.

A step has a forward and a backward of both losses for each micro-batch, the synthesis, the step of an
optimizer and the clearing of the gradients. The model is a Llama with random weights. A micro-batch is one
forget and one retain text with the same first half, so that the gradients conflict and every rule projects.
The learning rate is 0, so that all steps have the same update. Contenders, each with the order of forwards
and backwards that needs least memory:

- "summed loss": `(gamma * forget_loss + alpha * retain_loss).backward()`, with which others are compared.
  It holds the activations of both losses, and from the second micro-batch on two gradients.
- "summed loss, two backwards": one backward of each weighted loss. One copy of the gradients is the floor.
- "GradientBuckets": two copies. "one copy" uses `synthesize_in_backward`, "float32" `accumulate_dtype`.
- "released": the steps of the paper's code on one device, with the synthesis of `benchmarks.released` and
  without the copies of accelerate's `reduce`.
- "foreach": `torch.autograd.grad` of each loss, then the functions of `benchmarks.peers`.
- "TorchJD": its own PCGrad, one backward after another, and without the concatenated Jacobian.

Every round runs one step of each contender, in rotated order. `ms` is the median of the times from an idle
device to an idle device. `ratio` is the median of the time divided by that of the summed loss in the same
round, with the percentiles `p20` and `p80`. Every round makes each contender again, after it has dropped the
one before, so that only one holds memory. A step of 4 tokens precedes the timed step. SGD without momentum is
the default optimizer. It has no state and takes least time. Another optimizer would add the same time to
every step, and so bring the ratios closer to 1.

Peaks are those of a contender that is made, runs a step of 4 tokens and then the measured step, above a level
with the weights and the state of the optimizer. `peak_mib` includes activations. `peak_ratio` is its
ratio to the summed loss, and `extra_copies` its difference to the summed loss in units of the gradients.
`copies` is the peak in this unit if the measured step has 4 tokens, too. Activations hardly count then: it
consists of the gradients, of temporaries of the synthesis, and of gradients that autograd has yet to add (the
largest tensor, and a second one for an embedding that is also the head). `copies_kept` is the memory that is
held when the optimizer runs.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sago
from benchmarks import peers, timing
from benchmarks.gradients import ALPHA, GAMMA, Prepared, WrongResult
from benchmarks.measure import dtype_name, judge, origin, percentile
from benchmarks.peak import MIB, Peak, peak
from benchmarks.released import released
from benchmarks.workloads import LLAMA_3_2_1B, LLAMA_3_8B, SMALL, SMOLLM2_135M, Decoder, llama
from sago import reference
from sago.rules import RULES

COLUMNS = (
    "dtype", "contender", "rule", "statistics", "ms", "ratio", "p20", "p80", "peak_mib", "peak_ratio",
    "extra_copies", "copies", "copies_kept", "target", "met", "note",
)  # fmt: skip
SHAPES = {
    "smollm2-135m": SMOLLM2_135M,
    "small": SMALL,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3-8b": LLAMA_3_8B,
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
SHORT = 4  # tokens
WARM_UP = 1 << 27  # elements, after which sago has compiled all code for the CPU

Tensors = list[Tensor]
Loss = Callable[[], Tensor]
Losses = Sequence[tuple[Loss, Loss]]  # forget and retain of each micro-batch
# Accumulates the gradients of the losses and makes the update in `p.grad`; clears them.
Made = tuple[Callable[[Losses], None], Callable[[], Any]]


def one_backward(params: Tensors, rule: str, losses: Losses) -> None:
    for forget, retain in losses:
        (GAMMA * forget() + ALPHA * retain()).backward()


def two_backwards(params: Tensors, rule: str, losses: Losses) -> None:
    for forget, retain in losses:
        (GAMMA * forget()).backward()
        (ALPHA * retain()).backward()


def by_released(params: Tensors, rule: str, losses: Losses) -> None:
    sums: list[Tensors] = [[], []]
    for pair in losses:
        for side, loss in zip(sums, pair, strict=True):
            loss().backward()
            if side:
                for total, p in zip(side, params, strict=True):
                    total.add_(p.grad)
            else:
                side += [p.grad.clone() for p in params]
            _clear(params)
    for p, update in zip(params, released(*sums, rule, GAMMA, ALPHA), strict=True):
        p.grad = update


def by_foreach(params: Tensors, rule: str, losses: Losses) -> None:
    updates = peers.FOREACH[rule](*gradients(params, losses), GAMMA, ALPHA)
    for p, update in zip(params, updates, strict=True):
        p.grad = update


def by_torchjd(params: Tensors, rule: str, losses: Losses) -> None:
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import backward, jac_to_grad

    for forget, retain in losses:
        backward([GAMMA * forget(), ALPHA * retain()], parallel_chunk_size=1)
    jac_to_grad(params, PCGrad(), optimize_gramian_computation=True)


def by_buckets(params: Tensors, rule: str, stats: bool, **options: Any) -> Made:
    made = sago.GradientBuckets(params, **options)
    update = partial(
        made.synthesize_in_backward if options.get("one_copy") else made.synthesize_,
        *(rule, GAMMA, ALPHA),
        stats=stats,
    )

    def step(losses: Losses) -> None:
        for forget, retain in losses:
            with made.forget():
                forget().backward()
            with update() if options.get("one_copy") else made.retain():
                retain().backward()
        if not options.get("one_copy"):
            update()

    return step, made.zero_


# Tolerances of the error of an update: equal bits, two roundings of an element, the roundings of a backward
# whose loss has a weight, and inner products that are rounded to the dtype or added in sequence.
EXACT = {torch.bfloat16: 0.0, torch.float32: 0.0}
ROUNDING = {torch.bfloat16: 2**-6, torch.float32: 1e-6}
BACKWARD = {torch.bfloat16: 2**-4, torch.float32: 1e-5}
PRODUCTS = {torch.bfloat16: 2**-4, torch.float32: 2**-6}


class Case(NamedTuple):
    """A contender with a rule. It has either a step, or buckets with statistics or without, and options.

    Attributes:
        targets: The fields of its row that have a bound.
        note: The reason why it is not run.
    """

    name: str
    rule: str
    tolerance: dict[torch.dtype, float]
    step: Callable[[Tensors, str, Losses], None] | None = None
    stats: bool | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    targets: Sequence[tuple[str, str, float]] = ()
    note: str | None = None

    def make(self, params: Tensors) -> Made:
        if self.step is None:
            return by_buckets(params, self.rule, bool(self.stats), **self.options)
        return partial(self.step, params, self.rule), partial(_clear, params)


def cases(rules: Sequence[str], dtype: torch.dtype, micro_batches: int) -> Iterator[Case]:
    """Yields every contender, first the summed loss, with which others are compared."""
    yield Case("summed loss", "sum", BACKWARD, one_backward)
    yield Case("summed loss, two backwards", "sum", BACKWARD, two_backwards)
    for rule in rules:
        time = [("ratio", "<=", 1.03)] if rule == "sago" else []
        exact, peer = (EXACT, ROUNDING) if RULES[rule].scope == "element" else (ROUNDING, PRODUCTS)
        two = Case("GradientBuckets", rule, exact, targets=[*time, ("extra_copies", "<=", 1.0)])
        note = "takes one retain backward" if micro_batches > 1 else None
        one = Case(
            *("GradientBuckets, one copy", rule, exact),
            options={"one_copy": True},
            targets=[*time, ("peak_ratio", "<=", 1.02)],
            note="takes no rule of global scope" if RULES[rule].scope == "global" else note,
        )
        for case in (two, one):
            yield from (case._replace(stats=stats) for stats in (True, False))
        if dtype != torch.float32:
            wide = {"accumulate_dtype": torch.float32}
            yield Case("GradientBuckets, float32", rule, ROUNDING, stats=True, options=wide)
        yield Case("released", rule, peer, by_released)
        if rule in peers.FOREACH:
            yield Case("foreach", rule, peer, by_foreach)
    yield Case("TorchJD", "pcgrad_symmetric", PRODUCTS, by_torchjd)


def run(
    shape: Decoder = SMOLLM2_135M,
    rules: Sequence[str] = ("sago", "pcgrad"),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    tokens: int = 256,
    micro_batches: int = 1,
    repeats: int = 10,
    optimizer: str = "sgd",
) -> dict[str, Any]:
    """Measures every contender. Raises `WrongResult` where an update is not that of `sago.reference`.

    Some contenders cannot run: the device may have too little memory, a package may not be installed, or the
    contender may not support the rule or several micro-batches. Their rows have a note instead of numbers. If
    `repeats` is 0, only memory is measured.
    """
    import transformers

    rows, sizes = [], {}
    for dtype in dtypes:
        model = _Model(shape, dtype, device, tokens, micro_batches, optimizer)
        rows += model.measure(list(cases(rules, dtype, micro_batches)), repeats)
        sizes = {"elements": sum(p.numel() for p in model.params), "tensors": len(model.params)}
    return {
        **origin(device, "sago", "kernels"),
        "transformers": transformers.__version__,
        **shape._asdict(),
        **sizes,
        "tokens": tokens,
        "micro_batches": micro_batches,
        "repeats": repeats,
        "optimizer": optimizer,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


class _Model:
    """A model with its optimizer and batches, on which one contender after another runs."""

    def __init__(
        self,
        shape: Decoder,
        dtype: torch.dtype,
        device: str,
        tokens: int,
        micro_batches: int,
        optimizer: str,
    ) -> None:
        self.dtype, self.device = dtype, device
        # On a GPU the backward of sdpa adds in random order, and a gate turns last bits into other updates.
        model = llama(shape, dtype, device, "sdpa" if device == "cpu" else "eager")
        self.params: Tensors = list(model.parameters())
        # Other variants of AdamW need memory of the size of the gradients.
        self.optimizer = OPTIMIZERS[optimizer](self.params, lr=0.0, fused=True)
        self.short, self.full = (
            losses(model, texts(shape.vocabulary, micro_batches, n, device)) for n in (SHORT, tokens)
        )

    def measure(self, chosen: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
        copy, numel = (
            sum(sizes) for sizes in zip(*((p.nbytes, p.numel()) for p in self.params), strict=True)
        )
        right = [[g.cpu() for g in side] for side in gradients(self.params, self.full)]
        rows: list[dict[str, Any]] = []
        ready = []
        for case in tqdm(chosen, desc=f"memory {dtype_name(self.dtype)}"):
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row.update(dtype=dtype_name(self.dtype), contender=case.name, rule=case.rule)
            row.update(statistics=case.stats, note=case.note)
            rows.append(row)
            if case.note:
                continue
            try:
                made = self.started(case)  # the first steps also make the state of the optimizer
                for _ in range(1 + WARM_UP // numel if case.step is None else 1):
                    self.whole(made, self.short)
                del made
                found = self.peak(case, self.short)
                row.update(copies=found.bytes / copy, copies_kept=found.kept / copy)
                row["peak_mib"] = self.peak(case, self.full).bytes / MIB
                check(case, self.params, *right)
            except (torch.OutOfMemoryError, ImportError) as error:
                if case is chosen[0]:
                    raise
                row["note"] = _note(error)
            else:
                ready.append((case, row))
            _clear(self.params)
        times, errors = self.times([case for case, _ in ready], repeats)
        plain = rows[0]["peak_mib"]
        for i, (case, row) in enumerate(ready):
            row["peak_ratio"] = row["peak_mib"] / plain
            row["extra_copies"] = (row["peak_mib"] - plain) * MIB / copy
            if i in errors:
                row["note"] = _note(errors[i])
            elif repeats:
                ratios = [t / base for t, base in zip(times[i], times[0], strict=True)]
                row.update(ms=statistics.median(times[i]), ratio=statistics.median(ratios))
                row.update(p20=percentile(ratios, 0.2), p80=percentile(ratios, 0.8))
            row.update(judge(row, case.targets))
        return rows

    def started(self, case: Case) -> Made:
        """Makes a contender, which has run a short step."""
        _clear(self.params)
        made = case.make(self.params)
        self.whole(made, self.short)
        return made

    def whole(self, made: Made, losses: Losses) -> None:
        step, zero = made
        step(losses)
        self.optimizer.step()
        zero()

    def peak(self, case: Case, losses: Losses) -> Peak:
        """Leaves the update in `p.grad`."""
        with peak(self.device) as found:
            made = self.started(case)
            made[0](losses)
        del made  # its accumulators count as memory that is kept
        return found

    def times(
        self, chosen: Sequence[Case], repeats: int
    ) -> tuple[list[list[float]], dict[int, RuntimeError]]:
        """Returns the milliseconds of every round, and the errors of contenders without memory."""
        held: list[Made] = []

        def restore(case: Case) -> None:
            held.clear()
            gc.collect()
            held.append(self.started(case))

        def run() -> Any:
            self.whole(held[0], self.full)

        everyone = [Prepared(run, partial(restore, case)) for case in chosen]
        samples, errors = timing.rounds(everyone, _Clock(self.device), repeats, math.inf, "time")
        for i, error in errors.items():
            if i == 0 or not isinstance(error, torch.OutOfMemoryError):
                raise error
        return [[sample.ms for sample in found] for found in samples], errors


class _Clock(timing.Clock):
    """Takes the time from an idle device to an idle device. A step needs no cache to be flushed."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"

    def sample(self, prepared: Prepared) -> timing.Sample:
        prepared.restore()
        self.wait()
        start = time.perf_counter()
        prepared.run()
        self.wait()
        return timing.Sample(1e3 * (time.perf_counter() - start))


def texts(vocabulary: int, micro_batches: int, tokens: int, device: str) -> Tensor:
    """Returns the token ids `[micro_batches, 2, 1, tokens]` of the forget and retain texts."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(vocabulary, (micro_batches, 2, 1, tokens), generator=generator)
    found[:, 1, :, : tokens // 2] = found[:, 0, :, : tokens // 2]
    return found.to(device)


def losses(model: torch.nn.Module, texts: Tensor) -> Losses:
    """Returns functions of the forget loss, a negated likelihood, and the retain loss of each micro-batch."""

    def loss(text: Tensor, sign: int) -> Tensor:
        found: Tensor = sign * model(input_ids=text, labels=text).loss
        return found

    return [(partial(loss, forget, -1), partial(loss, retain, 1)) for forget, retain in texts]


def gradients(params: Tensors, losses: Losses) -> list[Tensors]:
    """Returns the gradients of forget and of retain, each from `torch.autograd.grad` alone."""
    sums: list[Tensors] = [[], []]
    for pair in losses:
        for side, loss in zip(sums, pair, strict=True):
            found = torch.autograd.grad(loss(), params)
            if side:
                torch._foreach_add_(side, found)
            else:
                side += found
    return sums


def check(case: Case, params: Tensors, forget: Tensors, retain: Tensors) -> None:
    """Raises `WrongResult` unless `p.grad` is the update that `sago.reference` makes of both gradients.

    The error of a tensor is divided by `gamma * |f| + alpha * |r|`. The norm of the update would be too small
    a divisor if the two gradients nearly cancel.
    """
    dtype, device = params[0].dtype, params[0].device
    whole = RULES[case.rule].scope == "global"
    for part in [slice(None)] if whole else [slice(i, i + 1) for i in range(len(params))]:
        f, r = ([g.to(device) for g in side[part]] for side in (forget, retain))
        expected, _ = reference.synthesize(f, r, case.rule, GAMMA, ALPHA, stats=False)
        for p, e, x, y in zip(params[part], expected, f, r, strict=True):
            error = 0.0
            if p.grad is None:
                error = math.nan
            elif not torch.equal(p.grad, e):
                error = _norm(p.grad - e) / (GAMMA * _norm(x) + ALPHA * _norm(y) or math.nan)
            if not error <= case.tolerance[dtype]:  # not `>`: a NaN must fail
                raise WrongResult(
                    f"{case.name} ({dtype_name(dtype)}, {case.rule}) does not have the update of "
                    f"sago.reference: relative error {error:.1e}, allowed {case.tolerance[dtype]:.1e}. "
                    "Nothing is reported."
                )


def _norm(t: Tensor) -> float:
    return torch.linalg.vector_norm(t, dtype=torch.float64).item()


def _clear(params: Tensors) -> None:
    for p in params:
        p.grad = None


def _note(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
