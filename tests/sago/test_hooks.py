"""Hooks of other code on the gradients of captured parameters."""

from functools import partial

import pytest
import torch

import sago

CAPTURES = [sago.GradientBuckets.forget, sago.GradientBuckets.retain]


class Offloading:
    """An optimizer that copies each gradient in the backward and steps with the copy."""

    def __init__(self, params):
        self.copies = {}
        for p in params:
            p.register_post_accumulate_grad_hook(self.copy)

    def copy(self, p):
        self.copies[p] = p.grad.clone()


class Called:
    def __call__(self, p):
        pass


def parameters():
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("accumulate_dtype", [None, torch.float64])
def test_a_hook_that_never_sees_the_update_is_reported_once(accumulate_dtype, capture):
    params = parameters()
    optimizer = Offloading(params)
    buckets = sago.GradientBuckets(params, accumulate_dtype=accumulate_dtype)
    with (
        pytest.warns(
            RuntimeWarning, match=r"`params\[0\]` .*\.Offloading\.copy`.* the gradient of one side"
        ) as found,
        capture(buckets),
    ):
        (2 * params[0] + 2 * params[1]).sum().backward()
    assert [(len(found), w.filename) for w in found] == [(1, __file__)]
    other = CAPTURES[1 - CAPTURES.index(capture)]
    with other(buckets):
        (5 * params[0] + 5 * params[1]).sum().backward()
    buckets.synthesize_("sum")
    assert [p.grad.tolist() for p in params] == [[7.0] * 3] * 2
    assert [optimizer.copies[p].tolist() for p in params] == [[5.0] * 3] * 2


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (partial(Offloading.copy, None), r"Offloading\.copy"),
        (Called(), "Called"),
        (print, r"builtins\.print"),
        ([].append, r"builtins\.list\.append"),
        (torch.Tensor.detach_, r"TensorBase\.detach_"),
        (partial(torch.Tensor.add_, other=0), r"TensorBase\.add_"),
    ],
)
def test_a_hook_is_named(hook, name):
    params = parameters()
    params[1].register_post_accumulate_grad_hook(hook)
    buckets = sago.GradientBuckets(zip("ab", params, strict=True))
    with pytest.warns(RuntimeWarning, match=rf"`b` .*{name}`"):
        buckets._check_around()


def test_a_hook_that_is_removed_is_not_reported():
    params = parameters()
    handle = params[0].register_post_accumulate_grad_hook(Called())
    buckets = sago.GradientBuckets(params)
    handle.remove()
    buckets._check_around()


def test_an_optimizer_that_steps_with_its_copies_is_refused():
    """As that of torchao, which needs a GPU."""

    def backward_hook(p):
        raise AssertionError

    backward_hook.__module__ = "torchao.optim.cpu_offload"
    params = parameters()
    params[0].register_post_accumulate_grad_hook(Called())  # of another library, and harmless
    params[1].register_post_accumulate_grad_hook(Called())
    params[1].register_post_accumulate_grad_hook(backward_hook)
    buckets = sago.GradientBuckets(params)
    for capture in CAPTURES:
        with (
            pytest.raises(ValueError, match=r"`params\[1\]` .*torchao\.optim.*the gradient of one side"),
            capture(buckets),
        ):
            params[1].sum().backward()
    assert params[1].grad is None
