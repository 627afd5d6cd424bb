"""Calls in place on memory that was synthesized before, with one difference to the earlier call.

Each is about one thing by which `sago.core.seen` tells lists apart: by less, the wrong elements would be
written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sago
from tests.support import inputs, oracle, properties

FP32 = torch.float32


def memory(run: Any, numel: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(run.place(t.float()) for t in inputs.pair(numel, seed))  # type: ignore[return-value]


def in_place(run: Any, forget: Any, retain: Any, rule: str = "sago", **options: Any) -> None:
    """Asserts what `sago.synthesize_` writes, that it writes nothing else, and what it reports."""
    lists = [[x] if isinstance(x, Tensor) else x for x in (forget, retain)]
    copies = [[None if t is None else t.clone() for t in side] for side in lists]
    where = options.pop("out", None)
    expected, report = sago.reference.synthesize(*copies, rule, **options)
    found = sago.synthesize_(forget, retain, rule, out=where, backend=run.name, **options)
    written = lists[0] if where == "forget" else lists[1] if where is None else where
    properties.assert_equal_bits(written, expected)
    for side, before in zip(lists, copies, strict=True):
        for t, copy in zip(side, before, strict=True):
            if t is not None and not any(t is w for w in written):
                properties.assert_equal_bits([t], [copy])
    assert found.groups == report.groups
    # What is added in <f,r> is at most |f| |r|.
    size = (report.ff * report.rr).sqrt().nan_to_num(0.0, 0.0).max().item()
    for name, atol in (("ff", 0.0), ("fr", oracle.PROMISED * size), ("rr", 0.0)):
        sums = getattr(found, name).cpu()
        torch.testing.assert_close(
            sums, getattr(report, name), rtol=oracle.PROMISED, atol=atol, equal_nan=True
        )


def same_lists(run):
    f, r = memory(run)
    for seed in range(3):
        for t, new in zip((f, r), memory(run, seed=seed), strict=True):
            t.copy_(new)
        in_place(run, [f], [r], gamma=0.5 + seed)
        in_place(run, (f,), r, gamma=0.5 + seed)


def other_addresses(run):
    kept = [memory(run, seed=seed) for seed in range(3)]  # so that no memory is used again
    for f, r in kept:
        in_place(run, [f], [r])


def other_lengths(run):
    f, r = memory(run)
    for n in (20, 48, 7):
        in_place(run, [f[:n]], [r[:n]])


def other_strides(run):
    f, r = memory(run)
    in_place(run, f.view(6, 8), r.view(6, 8))
    in_place(run, f.view(6, 8).t(), r.view(8, 6))
    in_place(run, f.view(8, 6), r.view(6, 8).t())


def other_dtypes(run):
    # Halves that are small numbers in each of the three.
    f, r = (run.place(t.bfloat16()) for t in inputs.pair(40))
    for dtype in (FP32, torch.float16, torch.bfloat16):
        in_place(run, f.view(dtype)[:20], r.view(dtype)[:20])


def other_partners(run):
    """None in another place, the same tensors in the same order."""
    a, b, c = (*memory(run), memory(run, seed=1)[0])
    in_place(run, [a, None], [b, c])
    in_place(run, [None, a], [b, c])
    # Empty tensors have the address 0.
    in_place(run, [a, a[:0]], [b, b[:0]])
    in_place(run, [None, a], [b[:0], b])
    in_place(run, [a, None], [b, b[:0]])


def other_sides(run):
    """The same tensors, cut into sides elsewhere."""
    tensors = [t for seed in range(3) for t in memory(run, seed=seed)]
    in_place(run, tensors[:2], tensors[2:4], out=tensors[4:])
    in_place(run, tensors[:3], tensors[3:])


def other_outputs(run):
    f, r = memory(run)
    for out in (None, "forget", None):
        in_place(run, [f], [r], out=out)


def other_groups(run):
    (f, r), (g, s) = memory(run), memory(run, seed=1)
    for groups in (None, ["a", "b"], ["a", "a"], None):
        in_place(run, [f, g], [r, s], groups=groups)


def other_scopes(run):
    """An elementwise rule has a row a tensor, a global rule has one."""
    (f, r), (g, s) = memory(run), memory(run, seed=1)
    in_place(run, [f, g], [r, s], "sago")
    report = sago.synthesize_([f, g], [r, s], "blur", backend=run.name)
    assert report.groups == ("all",)
    in_place(run, [f, g], [r, s], "sum")


ALL = (
    same_lists, other_addresses, other_lengths, other_strides, other_dtypes, other_partners, other_sides,
    other_outputs, other_groups, other_scopes,
)  # fmt: skip
