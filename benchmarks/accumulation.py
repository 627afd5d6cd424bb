"""Compares ways to add up the bf16 gradients of several micro-batches before a synthesis.

The gradients are those of a small Llama in bf16 with random weights. Every micro-batch has a forget text and
a retain text with the same start. The update of `sago` from the sums of a way is compared with the update
from the sums in fp64. Both updates are computed in fp64, so that only the sums differ.

- `bytes` are those of the two accumulators and of the update, for one element. The update is written over an
  accumulator that has the dtype of the parameters.
- `flips` is the percentage of elements that conflict by one of the sums and not by the other.
- `largest` is the largest error of an element, relative to the largest element of the update. `error` is the
  norm of the errors, relative to the norm of the update.

`sago.GradientBuckets` offers the ways "bfloat16" and "float32". It does not offer the others: float32 for one
side only, and a bf16 sum beside its rounding error in 8 bits, an integer in units of 1/256 of the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import origin
from benchmarks.workloads import Decoder, llama
from sago import reference

MODEL = Decoder(hidden=64, layers=4, vocabulary=512, mlp=172, keys=32, head=16)
TEXTS, TOKENS, SHARED = 2, 32, 8  # of a micro-batch; the number of tokens at the start that both sides share
MICRO_BATCHES = (4, 16)
COLUMNS = ("micro_batches", "forget", "retain", "bytes", "flips", "largest", "error", "cosine")


def run(micro_batches: Sequence[int] = MICRO_BATCHES) -> dict[str, Any]:
    model = llama(MODEL, torch.bfloat16, "cpu")
    rows = [row for count in micro_batches for row in compare(gradients(model, count))]
    return {
        **origin("cpu", "sago/reference.py", "sago/rules", "benchmarks/accumulation.py"),
        **MODEL._asdict(),
        "elements": sum(p.numel() for p in model.parameters()),
        "rows": rows,
    }


def gradients(model: torch.nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Returns the flat gradients of the negated loss and of the loss, one row for each micro-batch."""
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in tqdm(range(count), desc="micro-batches"):
        texts = torch.randint(MODEL.vocabulary, (2, TEXTS, TOKENS), generator=generator)
        texts[1, :, :SHARED] = texts[0, :, :SHARED]
        for side, text, sign in zip(rows, texts, (-1.0, 1.0), strict=True):
            grads = torch.autograd.grad(sign * model(input_ids=text, labels=text).loss, params)
            side.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows[0]), torch.stack(rows[1])


def compare(sides: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Returns a row for each pair of ways."""
    right = [grads.double().sum(0) for grads in sides]
    update, conflict = synthesis(*right)
    rows = []
    for pair in PAIRS:
        found, decided = synthesis(*(WAYS[way][0](grads) for way, grads in zip(pair, sides, strict=True)))
        errors = found - update
        rows.append(
            {
                "micro_batches": len(sides[0]),
                "forget": pair[0],
                "retain": pair[1],
                "bytes": sum(WAYS[way][1] for way in pair) + (2 if set(pair) == {"float32"} else 0),
                "flips": 100.0 * (decided != conflict).double().mean().item(),
                "largest": (errors.abs().max() / update.abs().max()).item(),
                "error": (errors.norm() / update.norm()).item(),
                "cosine": f"{torch.cosine_similarity(found, update, dim=0).item():.6f}",
            }
        )
    return rows


def synthesis(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the update of `sago`, and which elements conflict."""
    (update,), _ = reference.synthesize([f], [r], "sago")
    return update, f.sign() * r.sign() < 0


def added(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def way(grads: Tensor) -> Tensor:
        total = torch.zeros_like(grads[0], dtype=dtype)
        for g in grads:
            total += g
        return total.double()

    return way


def compensated(grads: Tensor) -> Tensor:
    """The sum in bf16 and, in 8 bits, what the rounding of the sum has lost."""
    total = torch.zeros_like(grads[0])
    lost = torch.zeros_like(total, dtype=torch.int8)
    for g in grads:
        wide = total.float() + lost * unit(total) + g.float()
        total = wide.bfloat16()
        lost = ((wide - total.float()) / unit(total)).round().clamp(-127, 127).to(torch.int8)
    return total.double() + lost * unit(total).double()


def unit(t: Tensor) -> Tensor:
    """Returns 1/256 of the last place of bf16 numbers. A bf16 number has 8 significant bits."""
    exponent = t.float().abs().clamp_min(2.0**-100).frexp().exponent
    return torch.ones_like(t, dtype=torch.float32).ldexp(exponent - 16)


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # and the bytes of an accumulator's element
    "bfloat16": (added(torch.bfloat16), 2),
    "float32": (added(torch.float32), 4),
    "bfloat16 + 8 bits": (compensated, 3),
}
PAIRS = (
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16 + 8 bits", "bfloat16 + 8 bits"),
    ("float32", "float32"),
)
