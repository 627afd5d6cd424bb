"""Kernels that are wrong on purpose: each is a change of a few characters, and a property has to notice.

A mutant replaces text in the source of a real function and runs in the real launch. `CHECKS` are the
assertions of the other tests; all of them pass on what is not mutated.
"""

import sys
from typing import NamedTuple

import pytest
import torch

from sago import synthesis
from sago.backends import compiled, graphs, packs, sums
from sago.backends.streams import Cache
from sago.capture import buckets, side
from sago.core import coefficients, pipeline, seen, statistics
from sago.core import report as reports
from tests.support import repeats
from tests.support.backends import INTERPRETED, Backend, import_with_triton
from tests.support.checks import (
    CHECKS,
    at_the_floor,
    chunks,
    clipping,
    clipping_of_inf,
    clipping_of_little,
    counts,
    counts_of_means,
    floors,
    floors_beside_inf,
    floors_of_means,
    gated,
    gates,
    groups,
    means,
    missing,
    noise,
    overflow,
    products,
    products_again,
    products_of_bf16,
    products_over_blocks,
    products_over_chunks,
    propagated,
    propagated_from_one,
    range_,
    report,
    rounding,
    signed_zeros,
    small_tensors,
    specials,
    subnormals,
    sums_beside_inf,
    sums_of_slices,
    sums_over_chunks,
    sums_over_spans,
    switched_off,
    tails,
    traffic,
    weights,
    weights_of_zero,
    zero_update,
    zeros_of_some,
)
from tests.support.mutants import mutated

if not INTERPRETED:
    pytest.skip("mutants are interpreted", allow_module_level=True)
kernels = import_with_triton("sago.kernels")

# The names of the package are taken by its functions.
stream, combine, gram, batch, formula = (
    sys.modules[f"sago.kernels.{name}"] for name in ("stream", "combine", "gram", "batch", "formula")
)
KERNEL_MODULES = stream, combine, gram, batch, formula
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}


RIGHT = [("triton", check) for check in (*CHECKS, traffic)] + [("compiled", check) for check in CHECKS]


@pytest.mark.parametrize(("backend", "check"), RIGHT)
def test_the_right_kernels_pass(check, backend):
    check(Backend(backend, "cpu"))


class Mutant(NamedTuple):
    module: object
    function: str
    old: str
    new: str
    check: object


SIGNS = "is_negative(f * r) & (smaller > 0)"
GUARDS = " and seen.guards.hold(tensors)"
ROW = "row = tl.load(shape + 3)"
FORGET = "f = upcast(tl.load(forget + at, mask=at < forget_body, other=0.0), COMPUTE)"
OF_BODY = """store(
                    out + at, at < body, f, r, floor, u, coefficients,
                    OUT, GATED, GATE, DRAWN, FLOORED, PROPAGATE,
                )"""
OF_TAIL = """at < size, f, r, floor, u, coefficients,
                OUT, GATED, GATE, DRAWN, FLOORED, PROPAGATE"""
FACTOR = "values * torch.where(norm.isfinite(), clip, torch.nan)"
KERNELS = {
    (stream, "in_conflict"): {
        "product instead of signs": (SIGNS, "f * r < 0", subnormals),
        "zeros conflict": ("(smaller > 0)", "(smaller >= 0)", specials),
        "NaN conflicts": (SIGNS, "(f > 0) != (r > 0)", specials),
        "one sign of conflict": ("is_negative(f * r)", "is_negative(f)", tails),
        "zeros of retain conflict": ("tl.abs(f), tl.abs(r),", "tl.abs(f), tl.abs(f),", specials),
    },
    (stream, "store"): {
        "swapped branches": ("where(conflict,", "where(~conflict,", tails),
        "a of the wrong branch": ("(conflict, weighted(a_c, f", "(conflict, weighted(a, f", tails),
        "the update is floored": (
            "conflict = in_conflict(f, above(r, floor, FLOORED))",
            "r = above(r, floor, FLOORED); conflict = in_conflict(f, r)",
            floors,
        ),
        "no floor for classes": ("class_of(f, above(r, floor, FLOORED)", "class_of(f, r", floors),
        "swapped gradients": (
            "    update = weighted(a, f, b, r)",
            "    update = weighted(a, r, b, f)",
            specials,
        ),
        "rounded twice": (
            "    update = weighted(a, f, b, r)",
            "    update = upcast(downcast(a * f, OUT), a.dtype) + b * r",
            rounding,
        ),
        "only forget propagates": ("(update - (f - f)) - (r - r)", "update - (f - f)", propagated),
        "only retain propagates": ("(update - (f - f)) - (r - r)", "update - (r - r)", propagated),
        "-0 becomes 0": ("(update - (f - f)) - (r - r)", "update + ((f - f) + (r - r))", propagated),
        "inf does not propagate": (
            "(update - (f - f)) - (r - r)",
            "tl.where((f == f) & (r == r), update, 0 * f + 0 * r)",
            propagated,
        ),
        "the third class as the second": ("weighted(a_2, f, b_2, r)", "weighted(a, f, b, r)", gates),
        "-0 becomes 0 on its way": (
            "(update - (f - f)) - (r - r)",
            "(update + (f - f)) - (r - r)",
            propagated,
        ),
        "propagates what the rule takes": (
            "(update - (f - f)) - (r - r)",
            "update - (update - update)",
            propagated,
        ),
    },
    (stream, "above"): {
        "negative elements are below": ("tl.abs(r) < floor", "r < floor", floors),
        "elements at the floor are below": ("tl.abs(r) < floor", "tl.abs(r) <= floor", at_the_floor),
    },
    (stream, "start_floor"): {
        "the floor of the first group": ("floors + tl.load(shape + 3)", "floors", floors),
    },
    (stream, "uniform"): {
        "one hash instead of two": ("mix(first ^ low(positions)) + second", "first ^ low(positions)", gates),
    },
    (stream, "start_draws"): {
        "the step is left out": ("tl.static_range(2)", "tl.static_range(1)", gates),
        "every chunk begins at the first": ("draws + 2 + slot", "draws + 2", gates),
    },
    (combine, "_combine_kernel"): {
        "swapped weights": ("        a, b = FORMULA", "        b, a = FORMULA", missing),
        "weights in fp32": (
            "READS >> 36) + b",
            "READS >> 36) + b.to(tl.float32).to(tl.float64)",
            weights,
        ),
        "coefficients of the first group": (ROW, ROW + " * 0", groups),
        "eps added to fr": ("gram_stride + 1)", "gram_stride + 1) + _weight(eps, False)", products),
        "eps left out of rr": ("+ 2) + _weight(eps, False)", "+ 2)", products),
        "eps left out of ff": ("row * gram_stride) + _weight(eps, False)", "row * gram_stride)", products),
        "reads of another coefficient": ("READS >> 36", "READS >> 24", overflow),
        "given a for a_c": ("a_c = tl.load(entry)", "a_c = tl.load(entry + 2)", clipping),
        "given b_c for b": ("b = tl.load(entry + 3)", "b = tl.load(entry + 1)", clipping),
        "given to the first group": (
            "entry = coefficients + row * (2 * CLASSES)",
            "entry = coefficients",
            clipping,
        ),
    },
    (formula, "overflow"): {
        "reads what a weight of 0 leaves out": (
            "gamma == 0.0, zero, nonzero",
            "gamma == 0.0, nonzero, nonzero",
            switched_off,
        ),
    },
    (formula, "_of_sums"): {
        "reads of another sum": ("READS & 2", "READS & 1", overflow),
    },
    (stream, "weighted"): {
        "retain without its weight": ("y = b * r", "y = r", specials),
        "0 * NaN of forget": ("x = tl.where(a == 0, 0.0, a * f)", "x = a * f", weights_of_zero),
        "0 * NaN of retain": ("tl.where(b == 0, x, ", "tl.where(b != b, x, ", weights_of_zero),
        "-0 becomes 0": ("tl.where(a == 0, y, x + y)", "x + y", signed_zeros),
    },
    (stream, "accumulate_classes"): {
        "counted beyond the end": ("s13 + one", "s13 + 1.0", gates),
        "two classes": ("third = (k != 0.0) & (k != 1.0)", "third = k < 0.0", gates),
        "another class": ("s9 = tl.where(third", "s9 = tl.where(second", gates),
        "conflicts without the floor": ("in_conflict(x, z)", "in_conflict(x, y)", floors),
        "classes without the floor": ("class_of(x, z,", "class_of(x, y,", floors),
    },
    (combine, "_table"): {
        "those of the first row": ("found.expand(", "found[:1].expand(", gates),
    },
    (stream, "downcast"): {
        "truncated": ("(bits + 0x7FFF + ((bits >> 16) & 1))", "bits", rounding),
        "ties away from zero": ("((bits >> 16) & 1)", "1", rounding),
    },
    (batch, "compute_dtype"): {
        "computed in fp32": ("tl.float64 if", "tl.float32 if", weights),
    },
    (stream, "_stream"): {
        "unwritten tail": ("out + at, at < size,", "out + at, at < body,", tails),
        "one element too many": ("out + at, at < size,", "out + at, at < size + 1,", tails),
        "body past its end": ("out + at, at < body,", "out + at, at < size + 16,", tails),
        "read twice": (FORGET, f"{FORGET}; {FORGET}", traffic),
        "read where there is none": ("mask=at < retain_body", "mask=at < body", traffic),
        "read past the end": ("mask=at < forget_size", "mask=at < forget_size + 1", traffic),
        "read without a mask": ("mask=at < retain_body, other=0.0", "", traffic),
        "written twice": (OF_BODY, f"{OF_BODY}; {OF_BODY}", traffic),
        "the last vector once more": ("at = body + tl", "at = tl.maximum(size - 16, 0) + tl", traffic),
        "tail does not propagate": (OF_TAIL, OF_TAIL.replace("PROPAGATE", "False"), propagated),
        "body does not propagate": (OF_BODY, OF_BODY.replace("PROPAGATE", "False"), propagated),
        "tail without the floor": (OF_TAIL, OF_TAIL.replace("FLOORED", "False"), floors),
    },
    (stream, "locate"): {
        "offsets that wrap": ("start = index * CHUNK", "start = index * CHUNK & 0x7FFF", chunks),
        "half a chunk": ("numel - start, CHUNK)", "numel - start, CHUNK // 2)", chunks),
        "forget for retain": ("retain = tl.load(entry + 1)", "retain = tl.load(entry)", missing),
    },
    (seen, "find"): {
        "shapes that were": (GUARDS, "", repeats.other_lengths),
        "strides that were": (GUARDS, "", repeats.other_strides),
        "dtypes that were": (GUARDS, "", repeats.other_dtypes),
    },
    (seen, "_key"): {
        "stale addresses": ("(addresses, missing", "(len(addresses), missing", repeats.other_addresses),
        "any place for None": ("(addresses, missing,", "(addresses,", repeats.other_partners),
        "any side": ("*map(len, sides), ", "", repeats.other_sides),
        "any output": (" where, rule", " rule", repeats.other_outputs),
        "any groups": ("rule.scope, keys,", "rule.scope,", repeats.other_groups),
        "any scope": ("rule.scope, keys,", "keys,", repeats.other_scopes),
    },
    (stream, "lanes"): {
        "tail left out of the sums": (" + tail.to(tl.float64)", "", products),
        "a lane for all": ("tl.sum(x, axis=0)", "tl.max(x, axis=0)", products_over_blocks),
    },
    (stream, "across"): {
        "sums of other columns": ("four(s1, s3, s5, s7)", "four(s5, s3, s1, s7)", report),
        "the ninth from elsewhere": ("tl.sum(s8)", "tl.sum(s7)", report),
    },
    (stream, "put"): {
        "the ninth left out": ("if SUMS == 9:", "if SUMS == 10:", report),
        "a column too many": ("column < SUMS", "column <= SUMS", traffic),
    },
    (stream, "total"): {
        "last chunk left out": ("(row < count)[:, None]", "(row < count - 1)[:, None]", products_over_chunks),
        "last ninth left out": ("mask=row < count,", "mask=row < count - 1,", sums_over_chunks),
        "the first rows again": (
            "at + row[:, None] * SUMS",
            "at + (row - i)[:, None] * SUMS",
            sums_over_spans,
        ),
    },
    (stream, "is_last"): {
        "counters left as they are": ("tl.store(counter, 0)", "pass", products_again),
        "added up too early": ("== count - 1", "== count - 2", products_over_chunks),
    },
    (stream, "finish"): {
        "sums to the first group": ("into = table + row * SUMS", "into = table", groups),
        "slots of another row": ("(first_slot + span * SPAN)", "(span * SPAN)", groups),
        "the last chunk alone": ("(first_slot + span * SPAN)", "(first_slot + slot)", products_over_chunks),
        "spans of one size": (
            "tl.minimum(slots - span * SPAN, SPAN)",
            "tl.minimum(slots, SPAN)",
            sums_over_spans,
        ),
        "the last span alone": ("if spans == 1:", "if spans >= 1:", sums_over_spans),
    },
    (pipeline, "Pipeline.update"): {
        "statistics in a pass of their own": ('rule.scope != "element"', "True", traffic),
    },
    (stream, "accumulate"): {
        "products rounded to bf16": (
            "s1 = plus_product(s1, x, y)",
            "s1 += upcast(downcast(x * y, tl.bfloat16), x.dtype)",
            products_of_bf16,
        ),
        "not squared": ("s2 = plus_product(s2, y, y)", "s2 += tl.abs(y)", products),
        "squared in fp16": (
            "s0 = plus_product(s0, x, x)",
            "s0 += (x * x).to(tl.float16).to(x.dtype)",
            report,
        ),
        "out of range on the way": ("s1 = plus_product(s1, x, y)", "s1 += x * y * 1e3 * 1e-3", range_),
        "inf not counted": ("is_finite(x)", "x == x", counts),
        "not counted beside NaN": ("is_finite(y)", "is_finite(y) | (x != x)", counts),
        "conflicts by the product": ("= in_conflict(x, above(y, floor, FLOORED))", "= x * y < 0", counts),
        "conflicts without the floor": ("above(y, floor, FLOORED)", "y", floors),
        "the other branch": (
            "s0 = tl.where(conflict, s0, plus_product(s0, x, x))",
            "s0 = tl.where(conflict, plus_product(s0, x, x), s0)",
            report,
        ),
        "both branches": (
            "s2 = tl.where(conflict, s2, plus",
            "s2 = tl.where(conflict & (s2 < 0), s2, plus",
            report,
        ),
    },
}
ON_THE_CPU = {
    (graphs, "_signed"): {
        "product instead of signs": ("(f * large) * (r * large)", "f * r", subnormals),
        "one side scaled": ("(r * large)", "r", subnormals),
    },
    (graphs, "_conflict"): {
        "zeros conflict": ("< 0", "<= 0", specials),
    },
    (graphs, "update_by_class"): {
        "swapped branches": ("where(_conflict(f, read)", "where(~_conflict(f, read)", tails),
        "no floor for classes": ("gate(f, read)", "gate(f, r)", floors),
        "the update is floored": (
            "of_classes = [",
            "r = above(r, floor[0]) if floor else r; of_classes = [",
            floors,
        ),
    },
    (graphs, "above"): {
        "negative elements are below": ("r.abs() < floor", "r < floor", floors),
        "elements at the floor are below": ("r.abs() < floor", "r.abs() <= floor", at_the_floor),
    },
    (compiled, "_floor"): {
        "the floor of the first group": ("floors[batch.rows[i]]", "floors[0]", floors),
    },
    (graphs, "update"): {
        "swapped gradients": (
            "_weighted(a, f, b, r, terms)",
            "_weighted(b, f, a, r, terms)",
            missing,
        ),
    },
    (graphs, "_write"): {
        "nothing propagates": ("if propagate else u", "if False else u", propagated),
    },
    (graphs, "simplified"): {
        "NaN of forget is not seen": ("f.sum() + r.sum()", "r.sum()", propagated_from_one),
        "NaN of retain is not seen": ("f.sum() + r.sum()", "f.sum()", propagated_from_one),
        "some zeros are all zeros": ('"zero" if every[k]', '"zero" if some[k]', zeros_of_some),
        "some zeros are none": ('"any" if some[k]', '"nonzero" if some[k]', zeros_of_some),
    },
    (graphs, "_propagated"): {
        "only forget propagates": ("(f - f) + (r - r) == 0", "f - f == 0", propagated),
        "only retain propagates": ("(f - f) + (r - r) == 0", "r - r == 0", propagated),
        "inf does not propagate": ("(f - f) + (r - r) == 0", "(f == f) & (r == r)", propagated),
        "propagates what the rule takes": ("(f - f) + (r - r) == 0", "u - u == 0", propagated),
    },
    (coefficients, "limited"): {
        "zeros hide the norm": ('"zero" if call.max_norm is None else None', '"zero"', clipping_of_inf),
    },
    (graphs, "_weighted"): {
        "0 * NaN of retain": ('y = zero if terms[1] == "zero" else b * r', "y = b * r", weights_of_zero),
        "0 * NaN of forget": ("torch.where(a == 0, y, u)", "u", zeros_of_some),
        "-0 becomes 0": ('if "zero" in terms', "if False", signed_zeros),
    },
    (compiled, "_slice_sums"): {
        "end left out of the sums": ("if padding:", "if padding and not whole:", products_over_chunks),
    },
    (graphs, "_products"): {
        "products rounded to bf16": ("f * r,", "(f * r).bfloat16().to(f.dtype),", products_of_bf16),
    },
    (graphs, "_summands"): {
        "products of both branches": ("(p - q for", "(p for", report),
        "conflicts without the floor": ("_signed(f, read)", "_signed(f, r)", floors),
        "classes without the floor": ("gate(f, read)", "gate(f, r)", floors),
    },
    (graphs, "sums_of_any"): {
        "inf not counted": ("~t.isfinite()", "t.isnan()", counts),
        "products of both branches": (
            "_part(f, r, ~inside)",
            "_part(f, r, inside | ~inside)",
            sums_beside_inf,
        ),
        "conflicts without the floor": ("above(r, floor)", "r", floors_beside_inf),
    },
    (compiled, "_pack_sums"): {
        "the floors of other tiles": ("[pack.rows, None]", "[pack.rows.flip(0), None]", floors),
        "inf not seen": ("sums.isfinite()", "(~sums.isnan())", sums_beside_inf),
    },
    (packs, "Pack.fill"): {
        "padding of another pack": ("if self._padded or", "if", small_tensors),
        "a missing gradient of another pack": ("or len(pairs) < len(views)", "", small_tensors),
    },
    (compiled, "Batch.add_up"): {
        "rows of other pairs": ("add_(positions).argsort()", "argsort(descending=True)", groups),
    },
    (compiled, "_sums"): {
        "the last slice alone": ("x + y for", "y for", sums_of_slices),
    },
}
ON_BOTH = {
    (reports, "is_noise"): {
        "noise by the norm of retain": ("rr < NOISE * NOISE * ff", "rr < NOISE * NOISE", noise),
        "inf of forget makes retain noise": (" & ff.isfinite()", "", floors_beside_inf),
    },
    (coefficients, "floors"): {
        "the norm for its mean": ("rr / elements", "rr", floors),
        "noise is not seen": ("torch.where(is_noise(ff, rr), torch.inf, found)", "found", noise),
        "inf makes all conflicts end": ("found.isfinite()", "~found.isnan()", floors_beside_inf),
        "the floor of the means": ("found / call.scales[1]", "found", floors_of_means),
        "the scale of forget": ("call.scales[1]", "call.scales[0]", floors_of_means),
    },
    (coefficients, "gram"): {
        "products of a group for a global rule": (".sum(0, keepdim=True).expand(", "[:1].expand(", groups),
    },
    (sums, "products"): {
        "products of one branch": ("_added(by_class(table))", "by_class(table)[0]", gated),
    },
    (sums, "of_update"): {
        "update of the wrong branch": ("zip(pairs, by", "zip(pairs[::-1], by", report),
        "norm without the conflicting part": ("_added(columns)", "columns[-1]", clipping),
    },
    (coefficients, "of_update"): {
        "norm without what is left out": ('nonfinite == "propagate"', "False", clipping_of_inf),
    },
    (sums, "nonfinite"): {
        "forget alone makes zero": ("counted[:, 1:]", "counted[:, 1:2]", zero_update),
        "retain alone makes zero": ("counted[:, 1:]", "counted[:, 2:]", zero_update),
        "conflicts make zero": ("counted[:, 1:]", "counted", zero_update),
    },
    (sums, "scale"): {
        "scales not squared": ("[forget * forget, ", "[forget, ", means),
        "fr scaled once": ("forget * forget, forget * retain", "forget * forget, forget", means),
        "conflicting part not scaled": ("(0, 1, 2, 6, 7, 8, 9", "(0, 1, 2, 9", means),
        "counts scaled": ("(0, 1, 2, 6", "(0, 1, 2, 3, 4, 5, 6", counts_of_means),
    },
    (coefficients, "limited"): {
        "one coefficient clipped": (
            f"values = {FACTOR}",
            f"values = torch.cat([values[:, :-1], ({FACTOR})[:, -1:]], dim=1)",
            clipping,
        ),
        "one branch clipped": (
            f"values = {FACTOR}",
            f"values = torch.cat([values[:, :-2], ({FACTOR})[:, -2:]], dim=1)",
            clipping,
        ),
        "norm of the first group": ("[0].sum().sqrt()", "[0][0].sqrt()", clipping),
        "norm squared": ("sum().sqrt()", "sum()", clipping),
        "grown to max_norm": (".clamp(max=1.0)", "", clipping_of_little),
        "a norm of inf clips to 0": (
            "torch.where(norm.isfinite(), clip, torch.nan)",
            "clip",
            clipping_of_inf,
        ),
        "one group makes zero": ("sums.nonfinite(table)", "sums.nonfinite(table[:1])", zero_update),
        "infinite coefficients pass": ("torch.where(finite & ~", "torch.where(~", zero_update),
        "an infinite norm passes": ("finite = finite & norm.isfinite()", "pass", zero_update),
        "scales swapped": ("forget, retain = call.scales", "retain, forget = call.scales", means),
        "scales left out": ("values[:, 1::2] * retain", "values[:, 1::2]", means),
        "scales of one branch": (
            "values[:, 0::2] * forget",
            "torch.cat([values[:, :1], values[:, 2::2] * forget], dim=1)",
            means,
        ),
    },
    (pipeline, "Pipeline._reduced"): {
        "scales swapped": ("*call.scales", "*call.scales[::-1]", means),
    },
    (buckets, "GradientBuckets._scales"): {
        "captures of forget for both": ("weight(retain_captures)", "weight(self._forget.captures)", means),
    },
    (side, "Side.weight"): {
        "the sum for the mean": ("if self.mean", "if False", means),
    },
    (statistics, "_columns"): {
        "counts of conflicts for inf": ("counts.unbind(1)", "counts[:, :1].expand(-1, 3).unbind(1)", counts),
    },
}
MUTANTS = [
    pytest.param(Mutant(*place, *mutant), backend, id=f"{backend}: {name}")
    for backend, table in (
        *(("triton", KERNELS), ("triton", ON_BOTH), ("compiled", ON_THE_CPU), ("compiled", ON_BOTH)),
    )
    for place, mutants in table.items()
    for name, mutant in mutants.items()
]


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    def mutate(mutant):
        owner, name = mutant.module, mutant.function
        while "." in name:
            outer, name = name.split(".")
            owner = getattr(owner, outer)
        original = getattr(owner, name)
        wrong = mutated(mutant.module, original, mutant.old, mutant.new, tmp_path)
        users = [
            m
            for m in (*KERNEL_MODULES, compiled, graphs, coefficients, pipeline, seen, synthesis)
            if vars(m).get(name) is original
        ]
        for user in users or [owner]:
            monkeypatch.setattr(user, name, wrong)

    # What was computed before must not be found again: tables, and sums in memory that is not initialised.
    monkeypatch.setattr(batch, "_layouts", Cache(64))
    monkeypatch.setattr(seen, "_seen", Cache(64))
    monkeypatch.setattr(seen, "_seen_on_cpu", Cache(64))
    scratch = batch.Batch.scratch

    def poisoned(self, sums, stream):
        partials, *others = scratch(self, sums, stream)
        return partials.fill_(torch.nan), *others

    monkeypatch.setattr(batch.Batch, "scratch", poisoned)
    return mutate


@pytest.mark.parametrize(("mutant", "backend"), MUTANTS)
def test_every_mutant_is_caught(mutant, backend, mutate):
    mutate(mutant)
    with pytest.raises(AssertionError) as caught:
        mutant.check(Backend(backend, "cpu"))
    assert "is not once in" not in str(caught.value)
