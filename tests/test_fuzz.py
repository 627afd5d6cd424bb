"""Random lists, dtypes, rules, weights, groups and outputs, against the reference and the oracle."""

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sago
from tests.support import inputs, properties
from tests.support.backends import DTYPES, ELEMENTWISE, INTERPRETED, RULES, Backend, has_triton, on_device

SIZES = st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 33, 100, 257])
LARGE_SIZES = st.one_of(SIZES, st.sampled_from([2047, 2049, 32767, 32769, 70001]))
WEIGHTS = st.sampled_from([0.0, 1.0, 2.0, 0.75, 1 / 3, 1e-3, -1.5])
KINDS = st.sampled_from(["normal", "small", "large", "sparse", "opposite", "alike"])


class Call(NamedTuple):
    forget: list[torch.Tensor | None]
    retain: list[torch.Tensor | None]
    options: dict[str, Any]
    out: Any  # None, "forget" or dtypes
    as_tensors: bool


def gradient(kind, numel, seed, other=None):
    t = inputs.normal(numel, seed)
    if kind == "small":
        return t * 1e-3
    if kind == "large":
        return t * 1e3
    if kind == "sparse":
        return t * (inputs.normal(numel, seed + 1) > 0)
    if kind in ("opposite", "alike") and other is not None:
        return (other if kind == "alike" else -other) * t.abs()
    return t


def view(t, how):
    """The same elements at another address or in another order of memory."""
    if how == "unaligned":
        return torch.cat([t[:1], t])[1:]
    if how == "strided":
        return t.repeat_interleave(2)[::2]
    if how == "matrix" and t.numel() % 2 == 0:
        return t.view(2, -1).t()
    if how == "other matrix" and t.numel() % 2 == 0:
        return t.view(-1, 2)
    return t if "matrix" not in how else t.view(-1, 1)


@st.composite
def calls(draw, sizes=SIZES, max_length=6, dtypes=DTYPES, weights=WEIGHTS):
    length = draw(st.integers(1, max_length))
    forget, retain, written = [], [], draw(st.sampled_from([None, "forget", "list", "list"]))
    shapes = draw(st.booleans())
    for _ in range(length):
        numel, seed = draw(sizes), draw(st.integers(0, 1000))
        kind, pair = draw(KINDS), [draw(st.sampled_from(dtypes)) for _ in range(2)]
        f = gradient(kind, numel, seed)
        r = gradient(kind, numel, seed + 7, f)
        hows = ["unaligned", "strided", "plain"] if shapes else ["matrix", "other matrix"]
        f, r = (view(t.float().to(d), draw(st.sampled_from(hows))) for t, d in zip((f, r), pair, strict=True))
        missing = draw(st.sampled_from(["neither"] * 6 + ["forget", "retain", "both"]))
        if missing == ("retain" if written is None else written):
            missing = "neither"
        forget.append(None if missing in ("forget", "both") else f)
        retain.append(None if missing in ("retain", "both") else r)
    if written == "list":
        written = [draw(st.sampled_from(dtypes)) for _ in range(length)]
    elif any((r if written is None else f) is None for f, r in zip(forget, retain, strict=True)):
        written = [dtypes[0]] * length
    options = {
        "rule": draw(st.sampled_from(RULES)),
        "gamma": draw(weights),
        "alpha": draw(weights),
        "eps": draw(st.sampled_from([0.0, 0.0, 1e-10, 1.0])),
        "stats": draw(st.booleans()),
        "groups": draw(st.none() | st.lists(st.integers(0, 2), min_size=length, max_size=length)),
    }
    return Call(forget, retain, options, written, draw(st.booleans()))


def run(backend, call):
    """The updates, NaN-poisoned or in place, and the report; checks that nothing else has changed."""
    options = dict(call.options)
    if call.as_tensors:
        options["gamma"], options["alpha"] = (
            torch.tensor(options[w], dtype=torch.float64) for w in ("gamma", "alpha")
        )
    if isinstance(call.out, list):
        before = [None if t is None else t.clone() for t in call.forget + call.retain]
        found = backend(call.forget, call.retain, options.pop("rule"), dtypes=call.out, **options)
        properties.assert_equal_bits(call.forget + call.retain, before)
        return found
    sides = [
        [None if t is None else on_device(t, "cpu") for t in side] for side in (call.forget, call.retain)
    ]
    written, read = sides if call.out == "forget" else sides[::-1]
    kept = [None if t is None else t.clone() for t in read]
    report = sago.synthesize_(*sides, out=call.out, backend=backend.name, **options)
    properties.assert_equal_bits(read, kept)
    return written, report


def check(backend, call):
    updates, report = run(backend, call)
    known = {name: value for name, value in call.options.items() if name != "stats"}
    rule = known.pop("rule")
    if rule in ELEMENTWISE:
        expected = [
            None if t is None else torch.full_like(t, torch.nan, dtype=u.dtype)
            for t, u in zip(
                (f if r is None else r for f, r in zip(call.forget, call.retain, strict=True)),
                updates,
                strict=True,
            )
        ]
        sago.reference.synthesize_(call.forget, call.retain, rule, out=expected, **known)
        properties.assert_equal_bits(updates, expected)
    with np.errstate(all="ignore"):
        properties.assert_updates(updates, call.forget, call.retain, rule, **known)
    if call.options["stats"]:
        properties.assert_report(report, call.forget, call.retain, rule, **known)


@given(calls())
def test_reference(call):
    check(Backend("reference", "cpu"), call)


@given(calls())
@settings(max_examples=100)
def test_compiled(call):
    check(Backend("compiled", "cpu"), call)


# One dtype and weight, because every combination is a graph of its own that takes a second to compile.
@given(calls(LARGE_SIZES, 3, dtypes=[torch.bfloat16], weights=st.just(0.75)))
@settings(max_examples=25)
def test_compiled_over_blocks(call):
    check(Backend("compiled", "cpu"), call)


if has_triton() and INTERPRETED:

    @given(calls(max_length=4))
    @settings(max_examples=50)
    def test_triton(call):
        check(Backend("triton", "cpu"), call)
