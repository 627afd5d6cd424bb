"""`GradientBuckets` where something around it is unusual: ranks, names, interruptions, default devices."""

from unittest import mock

import pytest
import torch

import sago
from sago import compiled
from tests.properties import assert_equal_bits
from tests.windows import ANY, BF16, FP32, backward, fresh, window


def leaves(*sizes, dtype=FP32):
    return [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]


def test_accumulators_in_another_dtype_are_refused_where_an_unknown_engine_may_reduce_later():
    """The hook takes the gradient away before the engine sees it, and ranks would train on their own."""
    params = leaves(3, dtype=BF16)
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
    ):
        buckets = sago.GradientBuckets(params)
        window(buckets, params, [torch.ones(3, dtype=BF16)], [torch.ones(3, dtype=BF16)])
        buckets.synthesize_()
        with pytest.raises(ValueError, match=r"accumulate_dtype.*Found 2 ranks"):
            sago.GradientBuckets(params, accumulate_dtype=FP32)


def test_parameters_of_one_name_are_groups_of_their_own():
    """RMU trains the same matrix of several layers."""
    layers = [torch.nn.Linear(2, 1, bias=False) for _ in range(3)]
    named = [pair for layer in layers for pair in layer.named_parameters()]
    forget = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 1.0]])]
    retain = [torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])]
    buckets = sago.GradientBuckets([("head", torch.nn.Parameter(torch.ones(1))), *named])
    window(buckets, [p for _, p in named], forget, retain)
    report = buckets.synthesize_("pcgrad")
    assert report.groups == ("head", "weight (1)", "weight (2)", "weight (3)")
    expected, _ = sago.reference.synthesize(forget, retain, "pcgrad")
    assert_equal_bits([p.grad for _, p in named], expected)  # k is -1/2 and -1/4


def test_a_synthesis_that_was_interrupted_cannot_be_repeated():
    """Part of the retain gradient is the update by then."""
    params, buckets = fresh(ANY, *[leaves(3, 3, 3)] * 2, bucket_cap_mb=1e-6)
    gradients = [torch.full((3,), 2.0)] * 3
    update, calls = compiled._update, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(*args, **options)

    window(buckets, params, gradients, gradients)
    with mock.patch.object(compiled, "_update", interrupted), pytest.raises(KeyboardInterrupt):
        buckets.synthesize_("sum", stats=False)
    with pytest.raises(ValueError, match=r"should be whole.*KeyboardInterrupt.*zero_"):
        buckets.synthesize_("sum")
    buckets.zero_()
    window(buckets, params, gradients, gradients)
    buckets.synthesize_("sum")
    assert all((p.grad == 4.0).all() for p in params)


def test_a_reduction_that_fails_can_be_repeated():
    """It comes ahead of everything that is written."""
    params, buckets = fresh(ANY, *[leaves(3)] * 2)
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    with pytest.raises(OSError, match="lost"):
        buckets.synthesize_("pcgrad", reduce_gram=mock.Mock(side_effect=OSError("lost")))
    buckets.synthesize_("pcgrad", reduce_gram=lambda table: table)
    assert (params[0].grad == 5.0).all()


def test_dropped_captures_are_neither_a_gradient_nor_part_of_a_mean():
    (p,) = params = leaves(3)
    optimizer = torch.optim.SGD(params)
    buckets = sago.GradientBuckets(params, accumulation="mean")
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    with pytest.raises(ValueError, match="should have a backward"), buckets.forget():
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="forget gradient should be captured"):
        buckets.synthesize_("sum")
    for value in (1.0, 2.0, 5.0):
        with buckets.forget():
            optimizer.zero_grad()
            backward(params, [torch.full((3,), value)])
    buckets.synthesize_("sum")
    assert (p.grad == 5.0 + 3.0).all()


def test_a_zero_grad_behind_the_backward_drops_no_update_that_was_written_in_it():
    params, buckets = fresh(ANY, *[leaves(3)] * 2)
    with buckets.forget():
        backward(params, [torch.full((3,), 2.0)])
    with buckets.synthesize_in_backward("sum"):
        backward(params, [torch.full((3,), 3.0)])
        torch.optim.SGD(params).zero_grad()
    assert (params[0].grad == 5.0).all()


def test_sparse_gradients_are_refused_in_whatever_capture_they_come_first():
    table, other = torch.nn.Embedding(4, 2, sparse=True), leaves(2)[0]
    buckets = sago.GradientBuckets([("table", table.weight), ("other", other)])
    with buckets.forget():
        other.sum().backward()
    with pytest.raises(TypeError, match="`table` should be dense"), buckets.forget():
        table(torch.tensor([1])).sum().backward()


def test_buckets_that_are_made_in_inference_mode():
    params = leaves(3)
    with torch.inference_mode():
        buckets = sago.GradientBuckets(params)
    window(buckets, params, [torch.full((3,), 2.0)], [torch.full((3,), 3.0)])
    buckets.synthesize_("sum")
    assert (params[0].grad == 5.0).all()


@pytest.mark.parametrize("rule", sago.list_rules())
def test_a_default_device_that_is_not_that_of_the_gradients(rule):
    params, gradients = leaves(3, 4), [torch.full((n,), 2.0) for n in (3, 4)]
    torch.set_default_device("meta")
    try:
        buckets = sago.GradientBuckets(params)
        window(buckets, params, gradients, [gradients[0], None])
        report = buckets.synthesize_(rule, max_norm=1.0, reduce_gram=lambda table: table)
        assert report.summary()["norm_forget"] == 28**0.5
    finally:
        torch.set_default_device(None)
    assert all(p.grad.isfinite().all() for p in params)
