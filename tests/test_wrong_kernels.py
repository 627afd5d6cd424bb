"""Kernels that are wrong on purpose: each is a change of a few characters, and a property has to notice.

A mutant replaces text in the source of a real function and runs in the real launch. `CHECKS` are the
assertions of the other tests; all of them pass on what is not mutated.
"""

import inspect
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch

import sago
from sago import reference, synthesis
from sago.backends import compiled, sums
from sago.backends.streams import Cache
from sago.capture import buckets
from sago.core import coefficients, pipeline, seen, statistics
from sago.rules import Rule, where
from tests.support import inputs, oracle, properties, repeats
from tests.support.backends import INTERPRETED, Backend, import_with_triton
from tests.support.traffic import assert_floor, counted
from tests.support.windows import averaged, bucketed, clipped, mean, with_nan

if not INTERPRETED:
    pytest.skip("mutants are interpreted", allow_module_level=True)
kernels = import_with_triton("sago.kernels")

# The names of the package are taken by its functions.
stream, combine, gram, batch, formula = (
    sys.modules[f"sago.kernels.{name}"] for name in ("stream", "combine", "gram", "batch", "formula")
)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}


def specials(run):
    for rule in ("sago", "sum"):
        properties.assert_as_reference(run, *inputs.specials(FP32, FP32), rule, stats=False, **WEIGHTS)


def negative_nan(run):
    """The sign of a NaN is a bit like any other."""
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(FP32)
    f, r = (t.flatten() for t in torch.meshgrid(nan, torch.tensor([2.0, -3.0]), indexing="ij"))
    for forget, retain in ((f, r), (r, f)):
        properties.assert_as_reference(run, [forget], [retain], "sago", stats=False)
        assert run([forget], [retain], "sago")[1].conflict_fraction.item() == 0.0


def subnormals(run):
    properties.assert_as_reference(run, *inputs.subnormals(FP16, FP16), "sago", stats=False)
    properties.assert_as_reference(run, *inputs.subnormals(FP32, FP32), "sago", stats=False)


def weights_of_zero(run):
    for kind in (float, torch.tensor):
        for gamma, alpha in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
            options = {"gamma": kind(gamma), "alpha": kind(alpha), "stats": False}
            properties.assert_as_reference(run, *inputs.specials(FP32, FP32), "sum", **options)


def rounding(run):
    for dtypes in ((BF16, BF16), (FP32, FP16), (FP64, BF16)):
        properties.assert_as_reference(
            run, *inputs.IN_RANGE["scale_1"](*dtypes), "sum", stats=False, **WEIGHTS
        )


def weights(run):
    f, r = inputs.pair(20)
    properties.assert_as_reference(run, [f], [r], "sum", gamma=1 / 3, alpha=0.1, stats=False)


def tails(run):
    properties.assert_as_reference(run, *inputs.tails(FP32, FP32), "sago", stats=False)


def unaligned(run):
    properties.assert_as_reference(run, *inputs.unaligned(FP32, FP32), "sago", stats=False)


def missing(run):
    properties.assert_as_reference(run, *inputs.missing(FP32, FP32), "sum", stats=False, **WEIGHTS)


def signed_zeros(run):
    properties.assert_as_reference(run, *inputs.signed_zeros(FP32, FP32), "sum", gamma=0.0, stats=False)


def chunks(run):
    f, r = inputs.pair(inputs.CHUNK + 20)
    properties.assert_as_reference(run, [f.float()], [r.float()], "sago", stats=False)


def products(run):
    for rule, eps in (("pcgrad", 0.0), ("pcgrad", 3.0), ("blur", 3.0)):
        properties.assert_as_oracle(run, *inputs.tails(FP32, FP32), rule, eps=eps, stats=False, **WEIGHTS)


def products_of_bf16(run):
    forget, retain = inputs.tails(BF16, BF16)
    dtypes = [FP32] * len(forget)  # bf16 would hide it
    properties.assert_as_oracle(run, forget, retain, "pcgrad", stats=False, dtypes=dtypes)


def products_over_blocks(run):
    f, r = inputs.pair(3000)
    properties.assert_as_oracle(run, [f.float()], [r.float()], "pcgrad", stats=False)


def products_over_chunks(run):
    f, r = inputs.pair(2 * inputs.CHUNK + 20)
    properties.assert_as_oracle(run, [f.float()], [r.float()], "pcgrad", stats=False)


def range_(run):
    for scale in (1e-18, 1e18):
        f = torch.full((3000,), scale)
        properties.assert_as_oracle(run, [f], [-f], "pcgrad", stats=False)


def groups(run):
    forget, retain = inputs.tails(FP32, FP32)
    for rule in ("pcgrad", "pcgrad_global"):
        keys = [i % 3 for i in range(len(forget))]
        updates, report = run(forget, retain, rule, groups=keys, **WEIGHTS)
        properties.assert_updates(updates, forget, retain, rule, groups=keys, **WEIGHTS)
        properties.assert_report(report, forget, retain, rule, groups=keys, **WEIGHTS)


def report(run):
    for rule, dtype in (("sago", FP32), ("pcgrad", BF16)):
        forget, retain = inputs.tails(dtype, dtype)
        _, found = run(forget, retain, rule, **WEIGHTS)
        properties.assert_report(found, forget, retain, rule, **WEIGHTS)


def counts(run):
    forget, retain = inputs.specials(FP32, FP32)
    _, found = run(forget, retain, "sago")
    expected = oracle.expect(forget, retain, "sago").sums
    for name in properties.COUNTS:
        assert getattr(found, name).item() == expected[name][0]
    assert found.conflict_fraction.item() == expected["conflicts"][0] / expected["numel"][0]


def company(run):
    forget, retain = inputs.flat_views(BF16, BF16)
    properties.assert_independent_of_company(run, forget[:5], retain[:5], "pcgrad")


def switched_off(run):
    forget, retain = ([t.float()] for t in inputs.pair(20))
    for rule, weight in (("sum", "gamma"), ("sum", "alpha"), ("pcgrad", "gamma")):
        properties.assert_switched_off(run, forget, retain, rule, weight)


def compared(ff, fr, rr, gamma, alpha):
    return gamma, where(fr < 0.0, alpha, 0.0)


def overflow(run):
    """A comparison with NaN is false: the update looks like one without conflict."""
    forget, retain = [torch.tensor([1e20, 1e20, 1.0])], [torch.tensor([1e20, -1e20, 1.0])]
    (update,), _ = run(forget, retain, Rule("compared", compared, "tensor"), stats=False)
    assert update.isnan().all()


def gated(run):
    """A rule of inner products with a branch for conflicts: the products are over both branches."""
    rule = Rule("gated", lambda ff, fr, rr, gamma, alpha: (0.0, ff / rr, fr / rr, 0.0), "tensor", gated=True)
    forget, retain = inputs.tails(FP32, FP32)
    updates, _ = run(forget, retain, rule)
    for update, f, r in zip(updates, forget, retain, strict=True):
        f, r = f.double(), r.double()  # by hand: the reference shares the sum over the branches
        ff, fr, rr = f @ f, f @ r, r @ r
        expected = torch.where(f * r < 0, ff / rr * r, fr / rr * f)
        # Quotients of two sums, each off by `SUM_ERROR` of its magnitudes.
        properties.assert_near([update], [expected], 16 * oracle.SUM_ERROR[FP32])


def propagated(run):
    """Whole vectors and the tail; gradients that the rule leaves out."""
    for rule, stats in (("sago", False), ("sum", True)):
        for weights in ({}, {"gamma": 0.0}):
            forget, retain = inputs.specials(FP32, FP32)
            expected, _ = reference.synthesize(forget, retain, rule, **weights)
            found, _ = bucketed(run, forget, retain, rule, stats=stats, **weights)
            properties.assert_equal_bits(found, with_nan(expected, forget, retain))


def clipping(run):
    """Of all groups; of rules with one branch and with two, with products and without."""
    own = Rule("own", lambda ff, fr, rr, gamma, alpha: (fr / ff, alpha, gamma, 0.5 * ff / rr), "tensor", True)
    for rule in ("sum", "sago", "pcgrad", own):
        forget, retain = inputs.IN_RANGE["scale_1"](FP32, FP32)
        expected, norm = clipped(forget, retain, rule, 0.5, **WEIGHTS)
        found, report = bucketed(run, forget, retain, rule, max_norm=0.5, **WEIGHTS)
        # Quotients of two sums, and a norm of three, each off by `SUM_ERROR` of its magnitudes.
        assert abs(report.total_norm.item() / norm - 1) < 8 * oracle.SUM_ERROR[FP32]
        properties.assert_near(found, expected, 16 * oracle.SUM_ERROR[FP32])


def clipping_of_little(run):
    forget, retain = inputs.IN_RANGE["scale_1"](FP32, FP32)
    expected, _ = reference.synthesize(forget, retain, "sago")
    for max_norm in (1e3, torch.inf):
        found, _ = bucketed(run, forget, retain, "sago", max_norm=max_norm)
        properties.assert_equal_bits(found, expected)


def clipping_of_inf(run):
    """A norm out of range, an inf that the rule leaves out, coefficients known to be 0."""
    both = [torch.tensor([-1.0, 2.0])], [torch.tensor([3.0, 4.0])]
    large = [torch.full((9,), 1e30)]
    for forget, retain, rule, weights in (
        (large, large, "sum", {}),
        ([both[0][0] * torch.tensor([torch.inf, 1.0])], both[1], "sago", {}),
        (both[0], [both[1][0] * torch.tensor([1e30, 1.0])], "sago", {"gamma": 0.0}),
    ):
        (update,), _ = bucketed(run, forget, retain, rule, max_norm=1.0, **weights)
        assert update.isnan().all()


def zero_update(run):
    options = {"nonfinite": "zero_update", "stats": False}
    clean = inputs.IN_RANGE["scale_1"](FP32, FP32)
    expected, _ = reference.synthesize(*clean, "sago")
    properties.assert_equal_bits(bucketed(run, *clean, "sago", **options)[0], expected)
    for side, bad in ((0, torch.nan), (1, torch.inf)):
        both = inputs.IN_RANGE["scale_1"](FP32, FP32)
        both[side][1][-1] = bad
        for update in bucketed(run, *both, "sago", **options)[0]:
            assert not update.any()
    large = [torch.full((9,), 1e30)]
    for more in ({"gamma": torch.inf}, {"max_norm": 1.0}):
        (update,), _ = bucketed(run, large, large, "sum", **options, **more)
        assert not update.any()


def means(run):
    """Of 3 and of 5 captures: factors that are neither 1 nor equal nor their own squares."""

    def normalized(ff, fr, rr, gamma, alpha):
        return gamma / ff.sqrt(), alpha / rr.sqrt()

    forget, retain = inputs.IN_RANGE["scale_1"](FP64, FP64)
    exact = mean(forget, 3), mean(retain, 5)
    for rule in ("sago", "sum", "pcgrad", Rule("own", normalized, "tensor")):
        found, _ = averaged(run, forget, retain, rule, (3, 5), **WEIGHTS)
        expected, _ = reference.synthesize(*exact, rule, **WEIGHTS)
        properties.assert_near(found, expected, 16 * oracle.SUM_ERROR[FP64])
    for rule in ("sago", "sum"):
        _, found = averaged(run, forget, retain, rule, (3, 5), **WEIGHTS)
        properties.assert_report(found, *exact, rule, **WEIGHTS)


def counts_of_means(run):
    forget, retain = ([t.float()] for t in inputs.pair(20))
    forget[0][:3], retain[0][1:6] = torch.nan, torch.inf
    _, found = averaged(run, forget, retain, "sago", (3, 5))
    assert found.nonfinite_forget.tolist() == [3]
    assert found.nonfinite_retain.tolist() == [5]


def traffic(run):
    """Of blocks, tails and None: what is moved for an update that may well be right."""
    forget, retain = ([t.float() for t in side] for side in zip(*map(inputs.pair, (3000, 33)), strict=True))
    forget, retain = [*forget, None, forget[1].clone()], [*retain, retain[1].clone(), None]
    out = [torch.empty_like(t) for t in (*retain[:3], forget[3])]
    for rule, stats, reads in (("sago", True, 1), ("sago", False, 1), ("pcgrad", True, 2)):
        with counted(*forget, *retain, *out) as found:
            sago.synthesize_(forget, retain, rule, out=out, stats=stats, backend=run.name)
        assert_floor(found, forget, retain, out, reads)


CHECKS = [
    *(
        specials,
        negative_nan,
        subnormals,
        signed_zeros,
        weights_of_zero,
        rounding,
        weights,
        tails,
        unaligned,
        missing,
        chunks,
        products,
        products_of_bf16,
    ),
    *(products_over_chunks, range_, groups, report, counts, company, switched_off, gated),
    *(propagated, clipping, clipping_of_little, clipping_of_inf, zero_update, means, counts_of_means),
]


RIGHT = [(backend, check) for backend in ("triton", "compiled") for check in CHECKS] + [("triton", traffic)]


@pytest.mark.parametrize(("backend", "check"), RIGHT)
def test_the_right_kernels_pass(check, backend):
    check(Backend(backend, "cpu"))


class Mutant(NamedTuple):
    module: object
    function: str
    old: str
    new: str
    check: object


SIGNS = "is_negative(f * r) & (tl.abs(f) > 0) & (tl.abs(r) > 0)"
GUARDS = " and seen.guards.hold(tensors)"
ROW, SLOT = "row = tl.load(shape + 3)", "slot = tl.program_id(0) - tl.load(shape + 1) + tl.load(shape + 2)"
FORGET = "f = upcast(tl.load(forget + at, mask=at < forget_body, other=0.0), COMPUTE)"
OF_BODY = "store(out + at, at < body, f, r, a_c, b_c, a, b, OUT, GATED, PROPAGATE)"
NO_TAIL = "at < size, f, r, a_c, b_c, a, b, OUT, GATED, False", propagated
NO_BODY = "at < body, f, r, a_c, b_c, a, b, OUT, GATED, False", propagated
FACTOR = "values * torch.where(norm.isfinite(), clip, torch.nan)"
KERNELS = {
    (stream, "in_conflict"): {
        "product instead of signs": (SIGNS, "f * r < 0", subnormals),
        "zeros conflict": ("(tl.abs(f) > 0)", "(tl.abs(f) >= 0)", specials),
        "NaN conflicts": (SIGNS, "(f > 0) != (r > 0)", specials),
        "one sign of conflict": ("is_negative(f * r)", "is_negative(f)", tails),
        "zeros of retain conflict": (" & (tl.abs(r) > 0)", "", specials),
        "any NaN conflicts": (SIGNS, "is_negative(f * r) & (f != 0) & (r != 0)", negative_nan),
    },
    (stream, "store"): {
        "swapped branches": ("where(in_conflict(f, r)", "where(~in_conflict(f, r)", tails),
        "a of the wrong branch": ("weighted(a_c, f", "weighted(a, f", tails),
        "swapped gradients": ("u = weighted(a, f, b, r)", "u = weighted(a, r, b, f)", specials),
        "rounded twice": (
            "u = weighted(a, f, b, r)",
            "u = upcast(downcast(a * f, OUT), a.dtype) + b * r",
            rounding,
        ),
        "only forget propagates": ("(u - (f - f)) - (r - r)", "u - (f - f)", propagated),
        "only retain propagates": ("(u - (f - f)) - (r - r)", "u - (r - r)", propagated),
        "-0 becomes 0": ("(u - (f - f)) - (r - r)", "u + ((f - f) + (r - r))", propagated),
        "inf does not propagate": (
            "(u - (f - f)) - (r - r)",
            "tl.where((f == f) & (r == r), u, 0 * f + 0 * r)",
            propagated,
        ),
        "-0 becomes 0 on its way": ("(u - (f - f)) - (r - r)", "(u + (f - f)) - (r - r)", propagated),
        "propagates what the rule takes": ("(u - (f - f)) - (r - r)", "u - (u - u)", propagated),
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
        "given a for a_c": ("coefficients + row * 4)", "coefficients + row * 4 + 2)", clipping),
        "given b_c for b": ("coefficients + row * 4 + 3)", "coefficients + row * 4 + 1)", clipping),
        "given to the first group": (
            "b = tl.load(coefficients + row * 4",
            "b = tl.load(coefficients",
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
    (stream, "downcast"): {
        "truncated": ("(bits + 0x7FFF + ((bits >> 16) & 1))", "bits", rounding),
        "ties away from zero": ("((bits >> 16) & 1)", "1", rounding),
    },
    (batch, "compute_dtype"): {
        "computed in fp32": ("tl.float64 if", "tl.float32 if", weights),
    },
    (stream, "_stream"): {
        "unwritten tail": ("store(out + at, at < size,", "store(out + at, at < body,", tails),
        "one element too many": ("out + at, at < size,", "out + at, at < size + 1,", tails),
        "body past its end": ("out + at, at < body,", "out + at, at < size + 16,", tails),
        "read twice": (FORGET, f"{FORGET}; {FORGET}", traffic),
        "read where there is none": ("mask=at < retain_body", "mask=at < body", traffic),
        "read past the end": ("mask=at < forget_size", "mask=at < forget_size + 1", traffic),
        "read without a mask": ("mask=at < retain_body, other=0.0", "", traffic),
        "written twice": (OF_BODY, f"{OF_BODY}; {OF_BODY}", traffic),
        "the last vector once more": ("at = body + tl", "at = tl.maximum(size - 16, 0) + tl", traffic),
        "tail does not propagate": ("at < size, f, r, a_c, b_c, a, b, OUT, GATED, PROPAGATE", *NO_TAIL),
        "body does not propagate": ("at < body, f, r, a_c, b_c, a, b, OUT, GATED, PROPAGATE", *NO_BODY),
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
    (stream, "across"): {
        "tail left out of the sums": (" + tl.sum(tail.to(tl.float64))", "", products),
    },
    (stream, "finish"): {
        "counters left as they are": ("tl.store(counters + row, 0)", "pass", repeats.same_lists),
        "sums to the first group": (ROW, ROW + " * 0", groups),
        "chunk number for slot": (SLOT, "slot = tl.program_id(0)", groups),
        "slots of another row": ("partials + k * slots + first", "partials + k * slots", groups),
        "last chunk left out": ("at < count, other", "at < count - 1, other", products_over_chunks),
        "added up too early": ("done == count - 1", "done == count - 2", products_over_chunks),
        "the last chunk alone": ("k * slots + first", "k * slots + slot", products_over_chunks),
    },
    (pipeline, "Pipeline.update"): {
        "statistics in a pass of their own": ('rule.scope != "element"', "True", traffic),
    },
    (stream, "accumulate"): {
        "products rounded to bf16": (
            "fr = f * r",
            "fr = upcast(downcast(f * r, tl.bfloat16), f.dtype)",
            products_of_bf16,
        ),
        "not squared": ("rr = r * r", "rr = tl.abs(r)", products),
        "squared in fp16": ("ff = f * f", "ff = (f * f).to(tl.float16).to(f.dtype)", report),
        "out of range on the way": ("fr = f * r", "fr = f * r * 1e3 * 1e-3", range_),
        "inf not counted": ("~is_finite(f)", "f != f", counts),
        "not counted beside NaN": ("~is_finite(r)", "~is_finite(r) & (f == f)", counts),
        "conflicts by the product": ("= in_conflict(f, r)", "= f * r < 0", counts),
        "the other branch": ("tl.where(conflict, 0.0, ff)", "tl.where(conflict, ff, 0.0)", report),
        "both branches": ("rr = tl.where(conflict, 0.0, rr)", "rr = rr", report),
    },
}
ON_THE_CPU = {
    (compiled, "_conflict"): {
        "product instead of signs": (
            "torch.where(f > 0, r, torch.where(f < 0, -r, 0.0)) < 0",
            "f * r < 0",
            subnormals,
        ),
        "zeros conflict": ("f > 0", "f >= 0", specials),
        "NaN conflicts": ("torch.where(f < 0, -r, 0.0)", "-r", specials),
    },
    (compiled, "_gated_combine"): {
        "swapped branches": ("where(_conflict(f, r)", "where(~_conflict(f, r)", tails),
        "nothing propagates": ("if propagate else u", "if False else u", propagated),
    },
    (compiled, "_combine"): {
        "swapped gradients": (
            "_weighted(a, f, b, r, terms)",
            "_weighted(b, f, a, r, terms)",
            missing,
        ),
        "nothing propagates": ("if propagate else u", "if False else u", propagated),
    },
    (compiled, "_propagated"): {
        "only forget propagates": ("(f - f) + (r - r) == 0", "f - f == 0", propagated),
        "only retain propagates": ("(f - f) + (r - r) == 0", "r - r == 0", propagated),
        "inf does not propagate": ("(f - f) + (r - r) == 0", "(f == f) & (r == r)", propagated),
        "propagates what the rule takes": ("(f - f) + (r - r) == 0", "u - u == 0", propagated),
    },
    (coefficients, "limited"): {
        "zeros hide the norm": ('"zero" if call.max_norm is None else None', '"zero"', clipping_of_inf),
    },
    (compiled, "_weighted"): {
        "0 * NaN of retain": ('y = zero if terms[1] == "zero" else b * r', "y = b * r", weights_of_zero),
        "0 * NaN of forget": ("torch.where(a == 0, y, u)", "u", weights_of_zero),
        "-0 becomes 0": ('if "zero" in terms', "if False", signed_zeros),
    },
    (compiled, "_pair_sums"): {
        "end left out of the sums": ("if whole < f.numel()", "if False", products_over_blocks),
    },
    (compiled, "_products"): {
        "products rounded to bf16": ("f * r,", "(f * r).bfloat16().to(f.dtype),", products_of_bf16),
    },
    (compiled, "_summands"): {
        "products of both branches": ("torch.where(conflict, 0.0, r)", "r", report),
    },
    (compiled, "_count_nonfinite"): {
        "inf not counted": ("~piece.isfinite()", "piece.isnan()", counts),
    },
    (compiled, "_tree"): {
        "the first block alone": (
            "return partials.sum(-1)",
            "return partials[..., :1].sum(-1)",
            products_over_chunks,
        ),
    },
}
ON_BOTH = {
    (coefficients, "gram"): {
        "products of a group for a global rule": (".sum(0, keepdim=True).expand(", "[:1].expand(", groups),
    },
    (sums, "products"): {
        "products of one branch": ("outside + inside", "outside", gated),
    },
    (sums, "of_update"): {
        "update of the wrong branch": ("_of_update(a_c, b_c, inside)", "_of_update(a, b, inside)", report),
        "norm without the conflicting part": ("inside is not None", "False", clipping),
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
        "conflicting part not scaled": ("part is counted", "part is not outside", means),
        "counts scaled": ("part is None or part is counted", "part is None", counts_of_means),
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
        "captures of forget for both": ("1 / retain_captures", "1 / self._forget.captures", means),
        "the sum for the mean": ("if self._mean", "if False", means),
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
        source = textwrap.dedent(inspect.getsource(getattr(original, "fn", original)))
        assert source.count(mutant.old) == 1, f"{mutant.old!r} is not once in {mutant.function}"
        path = tmp_path / f"{name}.py"  # from where Triton reads the source
        path.write_text(source.replace(mutant.old, mutant.new))
        namespace = {}
        exec(compile(path.read_text(), str(path), "exec"), vars(mutant.module), namespace)
        users = [
            m
            for m in (stream, gram, combine, batch, formula, compiled, pipeline, seen, synthesis)
            if vars(m).get(name) is original
        ]
        for user in users or [owner]:
            monkeypatch.setattr(user, name, namespace[name])

    # What was computed before must not be found again: tables, and sums in memory that is not initialised.
    monkeypatch.setattr(batch, "_layouts", Cache(64))
    monkeypatch.setattr(seen, "_seen", Cache(64))
    scratch = batch.Batch.scratch

    def poisoned(self, sums):
        partials, *others = scratch(self, sums)
        return partials.fill_(torch.nan), *others

    monkeypatch.setattr(batch.Batch, "scratch", poisoned)
    return mutate


@pytest.mark.parametrize(("mutant", "backend"), MUTANTS)
def test_every_mutant_is_caught(mutant, backend, mutate):
    mutate(mutant)
    with pytest.raises(AssertionError) as caught:
        mutant.check(Backend(backend, "cpu"))
    assert "is not once in" not in str(caught.value)
