"""Assertions about a backend that its wrong kernels must fail, each a function of one `Backend`."""

from contextlib import ExitStack
from importlib import import_module
from unittest import mock

import torch

import sago
from sago import reference
from sago.backends.streams import Cache
from sago.rules import Rule, graddrop, where
from tests.support import inputs, oracle, properties
from tests.support.traffic import assert_floor, counted
from tests.support.windows import averaged, bucketed, clipped, mean, with_nan

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}
# The sum of their squares in fp32 is off by more than 1e-6: of the first if 128 are added one by one, of the
# second if two are added at a time, and 64 such sums one by one.
WORST, WORST_UNALIGNED = 1.4085674285888672, 1.050513505935669


def specials(run):
    for rule in ("sago", "sum"):
        properties.assert_as_reference(run, *inputs.specials(FP32, FP32), rule, stats=False, **WEIGHTS)


def negative_nan(run):
    """A NaN with the sign bit set must not count as a negative number."""
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


def zeros_of_some(run):
    """Coefficients that are 0 for one tensor of a list and not for the other."""
    forget = [torch.tensor([-0.0, 1.0, 1.0]), torch.tensor([1.0, -2.0, 1.0])]
    retain = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, 1.0, -0.0])]
    properties.assert_as_reference(run, forget, retain, "pcgrad", alpha=0.0, stats=False)
    own = Rule("own", lambda ff, fr, rr, gamma, alpha: (where(fr < 0.0, 0.0, gamma), alpha), "tensor")
    properties.assert_as_reference(run, forget, retain, own, stats=False)


def small_tensors(run):
    """Two packs, with sizes that are whole tiles and that are not, and None in the second pack."""
    for sizes in (30001, 30001, 5555, 100), (30016, 30016, 5568, 96):
        pairs = [[t.float() for t in inputs.pair(n, seed)] for seed, n in enumerate(sizes)]
        forget, retain = map(list, zip(*pairs, strict=True))
        forget[2] = None
        for rule in ("sago", "pcgrad"):
            updates, report = run(forget, retain, rule, **WEIGHTS)
            properties.assert_updates(updates, forget, retain, rule, **WEIGHTS)
            properties.assert_report(report, forget, retain, rule, **WEIGHTS)


def sums_beside_inf(run):
    """An inf is counted, and no sum has it that leaves it out."""
    f, r = torch.tensor([torch.inf, 1.0, 2.0]), torch.tensor([-1.0, 1.0, -3.0])
    _, report = run([f], [r], "sago")  # the update is -1, 1, -3
    assert (report.uu.item(), report.ur.item(), report.ff.item()) == (11.0, 11.0, torch.inf)
    _, report = run([f], [r.abs()], "sum")
    assert report.nonfinite_forget.item() == 1


def propagated_from_one(run):
    """A NaN in one gradient, which the rule leaves out."""
    for forget, retain, gamma in (([torch.nan], [1.0], 0.0), ([1.0], [torch.nan], 1.0)):
        lists = [torch.tensor(forget)], [torch.tensor(retain)]
        (found,), _ = bucketed(run, *lists, "sago", stats=False, gamma=gamma)
        assert found.isnan().all()


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
    dtypes = [FP32] * len(forget)  # rounding to bf16 would hide the error
    properties.assert_as_oracle(run, forget, retain, "pcgrad", stats=False, dtypes=dtypes)


def products_over_blocks(run):
    f, r = inputs.pair(10000)
    properties.assert_as_oracle(run, [f.float()], [r.float()], "pcgrad", stats=False)


def products_over_chunks(run):
    f, r = inputs.pair(2 * inputs.CHUNK + 20)
    properties.assert_as_oracle(run, [f.float()], [r.float()], "pcgrad", stats=False)


def sums_of_slices(run):
    """On the CPU, two slices of an fp64 tensor, which is too small to be compiled at once."""
    properties.assert_as_oracle(run, *([t] for t in inputs.pair((1 << 19) + 5000)), "pcgrad", stats=False)


def products_again(run):
    """On the same memory, so that the counters of the first call are used again."""
    f, r = (t.float() for t in inputs.pair(2 * inputs.CHUNK + 20))
    out = [torch.empty_like(r)]
    for _ in range(3):
        out[0].fill_(torch.nan)
        sago.synthesize_([f], [r], "pcgrad", out=out, stats=False, backend=run.name)
        properties.assert_updates(out, [f], [r], "pcgrad")


def sums_over_chunks(run):
    """Every sum of a report, with chunks of unequal sums."""
    for numel in (2 * inputs.CHUNK, 2 * inputs.CHUNK + 20):
        f, r = (t.float() for t in inputs.pair(numel))
        f[inputs.CHUNK :] *= 3.0
        for rule in ("sago", "pcgrad"):
            properties.assert_report(run([f], [r], rule)[1], [f], [r], rule)


def sums_over_spans(run):
    """The same in rows of one span, of a whole number of spans and of one more chunk, out of short chunks."""
    for span, chunks in ((4, (4, 8, 9)), (128, (66,))):
        with ExitStack() as stack:
            if run.name == "triton":
                for name in ("batch", "gram", "combine"):
                    values = {"CHUNK": 1024, "SPAN": span} | (
                        {"_layouts": Cache(8)} if name == "batch" else {}
                    )
                    module = import_module(f"sago.kernels.{name}")
                    stack.enter_context(mock.patch.multiple(module, **values))
            forget, retain = zip(*(inputs.pair(1024 * n - 5 * (n % 2)) for n in chunks), strict=True)
            forget, retain = ([t.float() for t in side] for side in (forget, retain))
            for f in forget:
                f *= 1.0 + torch.arange(len(f)) // 1024
            for rule, keys in (("sago", None), ("pcgrad", [i % 2 for i in range(len(chunks))])):
                _, found = run(forget, retain, rule, groups=keys)
                properties.assert_report(found, forget, retain, rule, groups=keys)


def equal_gradients(run):
    """Equal elements, whose roundings all have one direction. The value is one of the worst in fp32."""
    for worst, offset in ((WORST, 0), (WORST_UNALIGNED, 1)):
        f = torch.full((inputs.CHUNK + offset,), worst)[offset:]
        for rule in ("sago", "pcgrad"):
            for r in (f, -f):
                properties.assert_report(run([f], [r], rule)[1], [f], [r], rule)


def range_(run):
    for scale in (1e-18, 1e18):
        f = torch.full((3000,), scale)
        properties.assert_as_oracle(run, [f], [-f], "pcgrad", stats=False)


def gates(run):
    """Rules with a gate of their own: bits of elementwise ones, and the sums of the classes."""
    for family, dtypes in ((inputs.tails, (BF16, BF16)), (inputs.unaligned, (BF16, FP32))):
        forget, retain = family(*dtypes)
        # Three classes, two with their numbers, and a random gate.
        for rule in ("ties", "cautious", graddrop(2**40 + 7)):
            updates, found = run(forget, retain, rule, **WEIGHTS)
            expected, report = sago.reference.synthesize(forget, retain, rule, **WEIGHTS)
            if rule != "cautious":
                properties.assert_equal_bits(updates, expected)
            # The count of a class is exact, so only the last rounding can differ.
            for u, e in zip(updates, expected, strict=True):
                torch.testing.assert_close(u, e, rtol=2 * torch.finfo(e.dtype).eps, atol=0.0)
            for name in ("ff", "fr", "rr", "uu", "uf", "ur"):
                x, y = getattr(found, name), getattr(report, name)
                slack = oracle.PROMISED * torch.sqrt(report.ff * report.rr)
                assert ((x - y).abs() <= 4 * slack + 4 * oracle.PROMISED * (report.ff + report.rr)).all()
            assert torch.equal(found.conflict_fraction, report.conflict_fraction)


def floors(run):
    """The dead zone of the gate, whose width each row has from its own norm."""
    for family, dtypes in (
        (inputs.tails, (BF16, BF16)),
        (inputs.unaligned, (BF16, FP32)),
        (inputs.missing, (FP32, FP64)),
    ):
        forget, retain = family(*dtypes)
        retain = [r if r is None or i % 3 else r * 64.0 for i, r in enumerate(retain)]
        keys = [i // 2 for i in range(len(forget))]
        for rule in ("sago", "sago_prefer_retain", "ties", graddrop(3)):
            options = {"retain_floor": 0.73, "groups": keys, **WEIGHTS}
            updates, found = run(forget, retain, rule, **options)
            expected, report = sago.reference.synthesize(forget, retain, rule, **options)
            properties.assert_equal_bits(updates, expected)
            assert torch.equal(found.conflict_fraction, report.conflict_fraction)
            size = (found.ff * found.rr).sqrt() + found.ff + found.rr
            for name in ("uu", "uf", "ur"):
                error = (getattr(found, name) - getattr(report, name)).abs()
                assert (error <= 4 * oracle.PROMISED * 1.5**2 * size).all()


def noise(run):
    """A retain gradient that is rounding noise conflicts nowhere, and one of other rows is as it was."""
    f, r = (t.float() for t in inputs.pair(300))
    options = {"retain_floor": 1e-6, **WEIGHTS}
    forget = [f, f * 2.0**40, f]
    updates, report = run(forget, [r * 2.0**-26, r * 2.0**14, r], "sago", **options)
    expected, _ = sago.reference.synthesize([f], [r], "sago", **WEIGHTS)
    properties.assert_equal_bits(updates, [0.75 * forget[0], 0.75 * forget[1], *expected])
    assert report.conflict_fraction.count_nonzero() == 1


def at_the_floor(run):
    """All magnitudes are 1, which is the root mean square: no rounding, and none is below it."""
    f, r = torch.ones(64), torch.ones(64)
    r[::2] = -1.0
    (found,), _ = run([f], [r], "sago", retain_floor=1.0)
    properties.assert_equal_bits([found], [r.where(r < 0, f)])
    (found,), _ = run([f], [r], "sago", retain_floor=1.0 + 2.0**-20)
    properties.assert_equal_bits([found], [f])


def floors_beside_inf(run):
    """A row whose retain norm is not finite has no dead zone. NaN and inf are counted as without one."""
    f, r = (t.float() for t in inputs.pair(200))
    for value in (torch.inf, torch.nan):
        bad = r.clone()
        bad[3] = value
        updates, report = run([f, f], [bad, r], "sago", retain_floor=0.5)
        plain, _ = run([f], [bad], "sago")
        properties.assert_equal_bits(updates[:1], plain)
        assert report.nonfinite_retain.tolist() == [1, 0]
        bad = f.clone()
        bad[3], r[3] = value, -8.0
        updates, report = run([bad, f], [r, r], "sago", retain_floor=0.5)
        expected, exact = sago.reference.synthesize([bad, f], [r, r], "sago", retain_floor=0.5)
        properties.assert_equal_bits(updates, expected)
        assert report.nonfinite_forget.tolist() == [1, 0]
        assert torch.equal(report.conflict_fraction, exact.conflict_fraction)
        # An inf of forget that conflicts is left out of the update and of its norm.
        torch.testing.assert_close(report.uu, exact.uu, rtol=4e-6, atol=0.0, equal_nan=True)


def floors_of_means(run):
    """The accumulators of buckets hold sums, whose dead zone is that of the means."""
    forget, retain = inputs.tails(FP32, FP32)
    exact = mean(forget, 2), mean(retain, 4)
    expected, _ = sago.reference.synthesize(*exact, "sago", retain_floor=0.73)
    found, _ = averaged(run, forget, retain, "sago", (2, 4), retain_floor=0.73)
    properties.assert_equal_bits(found, expected)


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
    """If <f,r> is NaN, `fr < 0` is false, so a wrong update would look like one without conflict."""
    forget, retain = [torch.tensor([1e20, 1e20, 1.0])], [torch.tensor([1e20, -1e20, 1.0])]
    (update,), _ = run(forget, retain, Rule("compared", compared, "tensor"), stats=False)
    assert update.isnan().all()


def gated(run):
    """For a gated rule with inner products, the products include the elements of both branches."""
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
    """NaN and inf propagate in whole vectors and in the tail, even if the rule ignores the gradient."""
    for rule, stats in (("sago", False), ("sum", True)):
        for weights in ({}, {"gamma": 0.0}):
            forget, retain = inputs.specials(FP32, FP32)
            expected, _ = reference.synthesize(forget, retain, rule, **weights)
            found, _ = bucketed(run, forget, retain, rule, stats=stats, **weights)
            properties.assert_equal_bits(found, with_nan(expected, forget, retain))


def clipping(run):
    """Clips over all groups, for gated and ungated rules, with and without inner products."""
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
    """Clips with a norm that overflows, with an inf that the rule ignores, and with coefficients of 0."""
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
    """Averages 3 and 5 captures, so that the factors are not 1, not equal and not their own squares."""

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
    """Counts the bytes that are moved for blocks, tails and None, even if the update is right."""
    forget, retain = ([t.float() for t in side] for side in zip(*map(inputs.pair, (3000, 33)), strict=True))
    forget, retain = [*forget, None, forget[1].clone()], [*retain, retain[1].clone(), None]
    out = [torch.empty_like(t) for t in (*retain[:3], forget[3])]
    cases = ("sago", True, 0.0, 1), ("sago", False, 0.0, 1), ("sago", True, 0.5, 2), ("pcgrad", True, 0.0, 2)
    for rule, stats, floor, reads in cases:
        options = {"stats": stats, "retain_floor": floor, "backend": run.name}
        with counted(*forget, *retain, *out) as found:
            sago.synthesize_(forget, retain, rule, out=out, **options)
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
    *(products_again, products_over_blocks, products_over_chunks, sums_over_chunks, sums_over_spans, range_),
    equal_gradients,
    gates,
    *(floors, noise, at_the_floor, floors_beside_inf, floors_of_means),
    *(groups, report, counts, company, switched_off, gated),
    *(propagated, clipping, clipping_of_little, clipping_of_inf, zero_update, means, counts_of_means),
]
