"""The public functions: argument forms, and every rule on every input family and backend.

Elementwise rules are compared with the reference bit for bit, rules of inner products with the oracle:
sums to 2^-21 (fp64: 2^-46) of the magnitudes added, four roundings in the precision of the arithmetic.
"""

import functools
import itertools

import pytest
import torch

import sago
from tests.support import backends, inputs, oracle, properties
from tests.support.backends import DTYPES, ELEMENTWISE, GLOBAL, GRAM, RULES, Backend

BF16, FP16, FP32, FP64 = DTYPES
SAME = [(d, d) for d in DTYPES]
MIXED = [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]]
SMALL = {name: make for name, make in inputs.FAMILIES.items() if name not in inputs.LARGE}
WEIGHTS = {"gamma": 0.75, "alpha": 1.5}


@pytest.mark.parametrize("rule", ELEMENTWISE)
@pytest.mark.parametrize("dtypes", SAME, ids=str)
def test_elementwise_rules_bitwise(fast_backend, rule, dtypes):
    for name, make in SMALL.items():
        if fast_backend.name == "compiled" or rule == "sago" or name in ("specials", "missing"):
            properties.assert_as_reference(fast_backend, *make(*dtypes), rule, stats=False, **WEIGHTS)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_elementwise_rules_bitwise_in_mixed_pairs(fast_backend, dtypes):
    for rule, name in itertools.product(("sago", "sago_prefer_retain"), ("specials", "unaligned")):
        properties.assert_as_reference(fast_backend, *SMALL[name](*dtypes), rule, stats=False, **WEIGHTS)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [*SAME, (BF16, FP32), (FP64, FP16)], ids=str)
def test_elementwise_rules_bitwise_into_other_dtypes(fast_backend, dtypes, out):
    for rule, weights in itertools.product(("sum", "sago"), ({}, WEIGHTS)):
        properties.assert_as_reference(
            fast_backend, *inputs.specials(*dtypes), rule, dtypes=[out], stats=False, **weights
        )


@pytest.mark.parametrize(
    ("family", "dtypes"), [("around_a_chunk", (BF16, BF16)), ("three_chunks", (FP32, FP32))]
)
def test_elementwise_rules_bitwise_over_chunks(fast_backend, family, dtypes):
    properties.assert_as_reference(
        fast_backend, *inputs.LARGE[family](*dtypes), "sago", stats=False, **WEIGHTS
    )


@pytest.mark.parametrize("rule", GRAM)
@pytest.mark.parametrize("dtypes", [*SAME, (BF16, FP32), (FP64, FP16)], ids=str)
def test_gram_rules_against_the_oracle(fast_backend, rule, dtypes):
    everything = fast_backend.name == "compiled" or (rule == "pcgrad" and dtypes in SAME[::2])
    for name, make in inputs.IN_RANGE.items():
        if everything or name in ("scale_1e18", "antiparallel", "missing", "unaligned"):
            properties.assert_as_oracle(fast_backend, *make(*dtypes), rule, stats=False, **WEIGHTS)


@pytest.mark.parametrize("rule", GRAM)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_products_of_16_bits_are_not_rounded(fast_backend, rule, dtype):
    """Stored in fp32, where it shows."""
    for name in ("tails", "unaligned"):
        forget, retain = inputs.IN_RANGE[name](dtype, dtype)
        dtypes = [FP32] * len(forget)
        properties.assert_as_oracle(fast_backend, forget, retain, rule, dtypes=dtypes, stats=False, **WEIGHTS)


@pytest.mark.parametrize(("rule", "dtype"), [("pcgrad", BF16), ("pcgrad_global", FP16), ("blur", FP32)])
def test_gram_rules_over_chunks(fast_backend, rule, dtype):
    forget, retain = inputs.around_a_chunk(dtype, dtype)
    properties.assert_as_oracle(fast_backend, forget, retain, rule, stats=False, **WEIGHTS)


@pytest.mark.parametrize("rule", GRAM)
@pytest.mark.parametrize("family", ["scale_1e-18", "scale_1e18"])
def test_both_ends_of_the_promised_range(fast_backend, rule, family):
    """At sizes where a lane of the sums adds as much as it ever does."""
    scale = 1e-18 if family == "scale_1e-18" else 1e18
    for dtype in (BF16, FP32):
        f = torch.full((inputs.CHUNK,), scale).to(dtype)
        r = torch.full((inputs.CHUNK,), -scale).to(dtype)
        properties.assert_as_oracle(fast_backend, [f], [r], rule, stats=False, **WEIGHTS)


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global"])
def test_the_update_is_never_against_retain(backend, rule):
    names = ("scale_1", "orthogonal", "antiparallel", "missing", "scale_1e-18", "scale_1e18")
    for name, dtype in itertools.product(names, (FP32, FP64)):
        forget, retain = SMALL[name](dtype, dtype)
        for alpha in (1.0, 0.0):  # 0: the update is orthogonal to retain, as tight as it gets
            options = {"gamma": 1.25, "alpha": alpha, "stats": False}
            properties.assert_never_against_retain(backend, forget, retain, rule, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sago_moves_no_coordinate_against_retain(backend, dtype):
    for name in ("scale_1", "scale_1e-30", "scale_1e30", "subnormals", "signed_zeros", "all_conflict"):
        forget, retain = SMALL[name](dtype, dtype)
        properties.assert_no_coordinate_against_retain(backend, forget, retain, stats=False, **WEIGHTS)


@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad", "blur"])
def test_scale_equivariance(backend, rule):
    for dtype, exponents in ((BF16, (-60, 40)), (FP32, (-60, 40)), (FP64, (-300, 200)), (FP16, (-2, 3))):
        forget, retain = SMALL["scale_1"](dtype, dtype)
        for exponent in exponents:
            properties.assert_scale_equivariant(
                backend, forget, retain, rule, exponent, stats=False, **WEIGHTS
            )


@pytest.mark.parametrize("rule", RULES)
def test_linearity_in_the_weights(backend, rule):
    for dtype in (FP32, FP64):
        properties.assert_weights_are_linear(backend, *SMALL["scale_1"](dtype, dtype), rule)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_independence_of_order_and_company(backend, rule):
    sizes = (40, 2049, 1, 300)
    for dtypes in ((BF16,) * 4, (FP32, BF16, FP32, FP64)):
        forget = [inputs.normal(n, i).to(d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))]
        retain = [inputs.normal(n, 9 + i).to(d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))]
        properties.assert_independent_of_company(backend, forget, retain, rule)


@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_the_same_from_run_to_run(backend, rule):
    forget, retain = inputs.around_a_chunk(FP32, FP32)
    properties.assert_repeatable(backend, forget[1:3], retain[1:3], rule)


def test_idempotence(backend):
    properties.assert_sago_is_idempotent(backend, *SMALL["scale_1"](BF16, BF16))
    for rule in GRAM:
        properties.assert_projection_is_idempotent(backend, *SMALL["scale_1"](FP32, FP32), rule)


@pytest.mark.parametrize(
    ("rule", "weight"),
    [(rule, "gamma") for rule in RULES if rule != "blur"]
    + [(rule, "alpha") for rule in (*ELEMENTWISE, "blur")],
)
def test_a_weight_of_zero_switches_its_gradient_off(backend, rule, weight):
    for dtype in (FP16, FP32):
        forget, retain = ([t.to(dtype) for t in inputs.pair(20, seed)] for seed in (1, 2))
        properties.assert_switched_off(backend, forget, retain, rule, weight)


@pytest.mark.parametrize("rule", RULES)
def test_out_of_place_leaves_the_inputs(backend, rule):
    for name in ("mixed_strides", "unaligned", "missing", "specials"):
        forget, retain = (
            [t if t is None else backend.place(t) for t in side] for side in SMALL[name](BF16, FP32)
        )
        before = [t if t is None else t.clone() for t in forget + retain]
        updates, _ = sago.synthesize(forget, retain, rule, backend=backend.name)
        properties.assert_equal_bits(forget + retain, before)
        for update, f, r in zip(updates, forget, retain, strict=True):
            like = f if r is None else r
            assert (update is None) == (like is None)
            assert update is None or (update.dtype, update.shape) == (like.dtype, like.shape)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_the_three_outputs_agree(backend, rule):
    """In place into retain, into forget, and into tensors given, aliased or not."""
    for name in ("transposed", "unaligned", "flat_views", "sliced"):
        forget, retain = ([backend.place(t) for t in side] for side in SMALL[name](BF16, BF16))
        expected, _ = backend(forget, retain, rule, **WEIGHTS)
        options = {"rule": rule, "backend": backend.name, "stats": False, **WEIGHTS}

        def copies(side):
            return [backends.on_device(t, backend.device) for t in side]

        f, r = copies(forget), copies(retain)
        sago.synthesize_(f, r, **options)
        properties.assert_equal_bits(r, expected)
        properties.assert_equal_bits(f, forget)
        f, r = copies(forget), copies(retain)
        sago.synthesize_(f, r, out="forget", **options)
        properties.assert_equal_bits(f, expected)
        properties.assert_equal_bits(r, retain)
        f, r = copies(forget), copies(retain)
        sago.synthesize_(f, r, out=[f[0], *r[1:]], **options)
        properties.assert_equal_bits([f[0], *r[1:]], expected)
        properties.assert_equal_bits([*f[1:], r[0]], [*forget[1:], retain[0]])


def test_writing_into_strided_outputs_leaves_what_lies_between(backend):
    forget, retain = ([t.to(BF16).to(backend.device)] for t in inputs.pair(30))
    memory = torch.full((6, 20), torch.nan, dtype=BF16, device=backend.device)
    out = memory[:, 4:14:2]
    sago.synthesize_([forget[0].view(6, 5)], [retain[0].view(6, 5)], out=[out], backend=backend.name)
    expected, _ = backend(forget, retain)
    properties.assert_equal_bits([out.flatten()], expected)
    assert memory.isnan().sum() == memory.numel() - out.numel()


def test_a_tensor_in_a_tensor_out(backend):
    f, r = (t.view(4, 5).to(backend.device) for t in inputs.pair(20))
    update, report = sago.synthesize(f, r, backend=backend.name)
    assert isinstance(update, torch.Tensor)
    (listed,), _ = sago.synthesize([f], [r], backend=backend.name)
    mixed, _ = sago.synthesize(f, [r], backend=backend.name)
    properties.assert_equal_bits([update, *mixed], [listed, listed])
    assert report.groups == (0,)
    in_place = r.clone()
    sago.synthesize_(f, in_place, backend=backend.name)
    properties.assert_equal_bits([in_place], [update])
    out = torch.full_like(r, torch.nan)
    sago.synthesize_(f, r, out=out, backend=backend.name)
    properties.assert_equal_bits([out], [update])


def test_sequences_of_any_kind(backend):
    forget, retain = ([t.to(backend.device) for t in inputs.pair(9, seed)] for seed in (1, 2))
    expected, _ = sago.synthesize(forget, retain, backend=backend.name)
    for kind in (tuple, iter):
        found, _ = sago.synthesize(kind(forget), kind(retain), backend=backend.name)
        properties.assert_equal_bits(found, expected)


@pytest.mark.parametrize("length", [1, 300])
def test_list_lengths(backend, length):
    sizes = [1 + i % 7 for i in range(length)]
    forget = [inputs.normal(n, i).float() for i, n in enumerate(sizes)]
    retain = [inputs.normal(n, 1000 + i).float() for i, n in enumerate(sizes)]
    properties.assert_as_reference(backend, forget, retain, "sago", stats=False, **WEIGHTS)


def test_a_list_of_many_dtypes(backend):
    """One row over launches of different dtypes."""
    dtypes = list(itertools.product(DTYPES, DTYPES))
    forget = [inputs.normal(20, i).to(f) for i, (f, _) in enumerate(dtypes)]
    retain = [inputs.normal(20, 50 + i).to(r) for i, (_, r) in enumerate(dtypes)]
    for rule in ("sago", "pcgrad_global"):
        updates, report = backend(forget, retain, rule, **WEIGHTS)
        properties.assert_updates(updates, forget, retain, rule, **WEIGHTS)
        properties.assert_report(report, forget, retain, rule, **WEIGHTS)


@pytest.mark.parametrize("rule", RULES)
def test_groups(backend, rule):
    groups = ["b", 7, "b", ("a", 1), 7]
    sizes = (30, 17, 5, 0, 16)
    forget = [inputs.normal(n, i).float() for i, n in enumerate(sizes)]
    retain = [inputs.normal(n, 9 + i).float() for i, n in enumerate(sizes)]
    updates, report = backend(forget, retain, rule, groups=groups, **WEIGHTS)
    properties.assert_updates(updates, forget, retain, rule, groups=groups, **WEIGHTS)
    properties.assert_report(report, forget, retain, rule, groups=groups, **WEIGHTS)
    assert report.groups == ("b", 7, ("a", 1))


def test_one_group_makes_pcgrad_global(backend):
    forget, retain = SMALL["tails"](FP32, FP32)
    everywhere, _ = backend(forget, retain, "pcgrad_global", **WEIGHTS)
    grouped, _ = backend(forget, retain, "pcgrad", groups=["all"] * len(forget), **WEIGHTS)
    properties.assert_equal_bits(grouped, everywhere)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, torch.int64], ids=str)
def test_weights_that_are_tensors(backend, rule, dtype):
    forget, retain = SMALL["scale_1"](FP32, FP32)
    gamma, alpha = (torch.tensor(w, dtype=dtype, device=backend.device) for w in (3, 2))
    with_tensors, report = backend(forget, retain, rule, gamma=gamma, alpha=alpha)
    with_floats, _ = backend(forget, retain, rule, gamma=3.0, alpha=2)
    properties.assert_equal_bits(with_tensors, with_floats)
    gamma.fill_(0)  # what the next step might do, before the report is read
    properties.assert_report(report, forget, retain, rule, gamma=3.0, alpha=2.0)


@pytest.mark.parametrize("gamma", [0.0, -0.0, 1.0, 2.0, -1.0, 0.1, 1 / 3, 1e-30, 1e30, 5e-324])
def test_weights_keep_their_bits(fast_backend, gamma):
    """On the way to the device; fp64 shows all of them."""
    f, r = inputs.pair(20)
    properties.assert_as_reference(fast_backend, [f], [r], "sum", gamma=gamma, alpha=gamma, stats=False)
    properties.assert_as_reference(fast_backend, [f], [r], "sago", gamma=gamma, alpha=1.0, stats=False)


@pytest.mark.parametrize("rule", ELEMENTWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_zero(fast_backend, rule, dtype):
    """Also those that are zero in fp32 only."""
    forget, retain = inputs.specials(dtype, dtype)
    for weights in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-0.0, -1.0), (1e-50, 1.0), (1.0, -1e-50)):
        for kind in (float, functools.partial(torch.tensor, dtype=FP64, device=fast_backend.device)):
            gamma, alpha = map(kind, weights)
            properties.assert_as_reference(
                fast_backend, forget, retain, rule, gamma=gamma, alpha=alpha, stats=False
            )


@pytest.mark.parametrize("rule", GRAM)
@pytest.mark.parametrize("eps", [0.0, 1e-10, 2.0, 1e3])
def test_eps(backend, rule, eps):
    forget, retain = SMALL["scale_1"](FP32, FP32)
    properties.assert_as_oracle(backend, forget, retain, rule, eps=eps, stats=False, **WEIGHTS)


def test_eps_leaves_elementwise_rules_alone(backend):
    forget, retain = SMALL["scale_1"](FP32, FP32)
    for rule in ELEMENTWISE:
        plain, _ = backend(forget, retain, rule)
        with_eps, _ = backend(forget, retain, rule, eps=1e3)
        properties.assert_equal_bits(with_eps, plain)


@pytest.mark.parametrize("rule", RULES)
def test_without_stats_the_update_is_the_same(backend, rule):
    forget, retain = SMALL["scale_1"](FP32, FP32)
    with_stats, full = backend(forget, retain, rule)
    without, report = backend(forget, retain, rule, stats=False)
    assert full.absent == ()
    counts = {"conflict_fraction", "nonfinite_forget", "nonfinite_retain"}
    assert counts <= set(report.absent)
    if rule in GRAM:
        assert counts == set(report.absent)
        properties.assert_updates(without, forget, retain, rule)
    else:
        assert not report.to_dict()
        properties.assert_equal_bits(without, with_stats)


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "blur"])
def test_two_shards_make_the_whole(backend, rule):
    """`reduce_gram` adds the other rank's table: coefficients and report are those of the whole."""
    forget, retain = SMALL["tails"](FP64, FP64)
    halves = [([f[i::2] for f in forget], [r[i::2] for r in retain]) for i in (0, 1)]
    tables = []

    def keep(table):
        tables.append(table.clone())

    backend(*halves[1], rule, reduce_gram=keep, **WEIGHTS)
    (other,) = tables
    assert other.dtype == FP64
    assert other.shape[0] == (1 if rule in GLOBAL else len(forget))

    def add_in_place(table):
        table.add_(other)

    returned, report = backend(*halves[0], rule, reduce_gram=lambda table: table + other, **WEIGHTS)
    in_place, _ = backend(*halves[0], rule, reduce_gram=add_in_place, **WEIGHTS)
    properties.assert_equal_bits(in_place, returned)
    properties.assert_report(report, forget, retain, rule, **WEIGHTS)
    whole = oracle.expect(forget, retain, rule, **WEIGHTS)
    for update, expected, slack in zip(returned, whole.updates, whole.slack, strict=True):
        properties.assert_between(update, expected[::2], slack[::2])


def test_reduce_gram_is_called_once_if_any_sums_are_taken(backend):
    calls = []
    forget, retain = SMALL["tails"](FP32, FP32)
    for rule, stats, expected in (
        ("sago", True, 1),
        ("sago", False, 0),
        ("pcgrad", False, 1),
        ("blur", True, 1),
    ):
        calls.clear()
        backend(forget, retain, rule, stats=stats, reduce_gram=lambda table: calls.append(table.shape))
        assert len(calls) == expected


@pytest.mark.parametrize("rule", RULES)
def test_nothing_at_all(backend, rule):
    """Only empty tensors, and only pairs of None: nothing to do, and a report of zeros."""
    z = torch.zeros(0, 3)
    for forget, retain in (([z, z], [z, z]), ([None], [None]), ([None, z], [None, z])):
        for stats in (True, False):
            updates, report = backend(forget, retain, rule, stats=stats)
            assert [u is None for u in updates] == [f is None for f in forget]
            assert all(value == 0 for name, value in report.summary().items() if not name.startswith("cos"))


def test_gradients_that_require_grad(backend):
    f = torch.ones(4, device=backend.device, requires_grad=True)
    r = torch.nn.Parameter(-torch.ones(4, device=backend.device))
    update, report = sago.synthesize(f, r, backend=backend.name)
    assert not update.requires_grad
    assert not report.uu.requires_grad
    version = r._version
    sago.synthesize_(f, r, backend=backend.name)
    assert r.requires_grad
    assert r._version > version  # autograd has to know that it was written
    assert torch.equal(r.detach(), update)


def test_under_inference_mode(backend):
    with torch.inference_mode():
        f, r = torch.ones(4, device=backend.device), -torch.ones(4, device=backend.device)
        sago.synthesize_(f, r, alpha=2.0, backend=backend.name)
        assert torch.equal(r, torch.full_like(r, -2.0))


def test_negative_views(backend):
    """Their sign is a bit of the tensor, not of its memory."""
    f = torch._neg_view(torch.ones(3, device=backend.device))
    r = torch.zeros(3, device=backend.device)
    update, _ = sago.synthesize(f, r, backend=backend.name)
    assert torch.equal(update, torch.full_like(r, -1.0))


def test_gradients_at_new_addresses_after_a_step(backend):
    """The tables of addresses are kept from call to call, the tensors are not."""
    for step in range(12):
        forget, retain = (
            list(side) for side in zip(inputs.pair(20, step), inputs.pair(5, step + 50), strict=True)
        )
        properties.assert_as_reference(backend, forget, retain, "sago", stats=False)


def test_defaults():
    """Sago with unit weights, in place into retain, on the compiled path."""
    f, r = inputs.pair(100)
    expected, _ = Backend("compiled", "cpu")([f], [r], "sago", gamma=1.0, alpha=1.0, eps=0.0)
    report = sago.synthesize_(f, r)
    properties.assert_equal_bits([r], expected)
    assert report.rule == "sago"
    assert report.absent == ()


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global"])
def test_reduce_gram_may_return_any_strides(fast_backend, rule):
    forget, retain = ([t[:9].clone(), t[9:].clone()] for t in inputs.pair(40))
    expected, report = fast_backend(forget, retain, rule)
    updates, reduced = fast_backend(forget, retain, rule, reduce_gram=lambda t: t.t().contiguous().t())
    properties.assert_equal_bits(updates, expected)
    assert reduced.to_dict() == report.to_dict()


@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad"])
def test_a_reduction_that_goes_wrong_leaves_everything_as_it_was(rule):
    forget, retain = ([t.float()] for t in inputs.pair(40))
    before = retain[0].clone()
    with pytest.raises(ValueError, match="reduce_gram"):
        sago.synthesize_(forget, retain, rule, reduce_gram=lambda table: table[:, :2])
    assert torch.equal(retain[0], before)


def test_columns_of_one_matrix_do_not_share_memory():
    forget, retain = torch.randn(64, 96), torch.randn(64, 96)
    expected, _ = sago.synthesize(forget, retain, "sago")
    columns = [[m[:, i : i + 32] for i in (0, 32, 64)] for m in (forget, retain)]
    sago.synthesize_(*columns, "sago")
    assert torch.equal(retain, expected)
    with pytest.raises(ValueError, match="share memory"):
        sago.synthesize_([forget[:, :33], forget[:, 32:65]], [retain[:, :33], retain[:, 32:65]])
