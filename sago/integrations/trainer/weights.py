"""The weights of a trainer, which record the losses that they are multiplied with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import Tensor

SIDES = {"gamma": "forget", "alpha": "retain"}
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")


class Weight(float):
    """The weight of a loss, which records the tensors that it is multiplied with.

    The product is a leaf, so that the backward of the trainer ends there. A product of the weight and a
    number records for the weight: the number becomes a factor of the loss.

    Attributes:
        products: The factors and the leaves. None after the step, which makes the weight a plain float.
        origin: The weight that a multiple records for. None if it is no multiple.
        times: The number that the weight was multiplied with.
    """

    __array_ufunc__ = None  # so that a number of numpy leaves the product to the weight
    products: list[tuple[Tensor, Tensor]] | None
    origin: Weight | None
    times: float

    def __new__(cls, value: Any, origin: Weight | None = None, times: float = 1.0) -> Weight:
        weight = super().__new__(cls, value)
        weight.products, weight.origin, weight.times = [], origin, times
        return weight

    def __mul__(self, other: Any) -> Any:
        product = float(self) * other
        if isinstance(other, Tensor):
            return self._cut(other, product)
        number = isinstance(other, Real) and not isinstance(other, Weight)
        return self._multiple(product, self.times * other) if number else product

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        quotient = float(self) / other
        number = isinstance(other, Real) and not isinstance(other, Weight)
        return self._multiple(quotient, self.times / other) if number else quotient

    def __neg__(self) -> Weight:
        return self._multiple(-float(self), -self.times)

    def _multiple(self, value: float, times: float) -> Weight:
        return Weight(value, self if self.origin is None else self.origin, times)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `tensor * weight` calls the method of the tensor, which reaches the weight only in this way.
        plain = [float(x) if isinstance(x, cls) else x for x in args]
        named = {k: float(x) if isinstance(x, cls) else x for k, x in (kwargs or {}).items()}
        result = func(*plain, **named)
        weights = [x for x in args if isinstance(x, cls)]
        factors = [x for x in args if isinstance(x, Tensor)]
        if func.__name__ in _PRODUCTS and len(weights) == len(factors) == 1 and not named:
            return weights[0]._cut(factors[0], result)
        return result

    def _cut(self, factor: Tensor, product: Tensor) -> Tensor:
        noted = (self if self.origin is None else self.origin).products  # a weight may be 0
        if noted is None or not product.requires_grad:
            return product
        cut = product.detach().requires_grad_()
        noted.append((factor if self.times == 1.0 else self.times * factor, cut))
        return cut.clone()  # `loss += ...` cannot write to a leaf


def weights_of(trainer: Any, default: float | None) -> dict[str, Weight]:
    """The weights that the trainer has now, as new objects.

    `default` is the value of a missing attribute. None means that the trainer's own code multiplies with the
    weights, so that both must be attributes of the trainer itself.
    """
    found = {}
    for name in SIDES:
        value = getattr(trainer, name, default)
        if not isinstance(value, Real):
            raise ValueError(
                f"`self.{name}` should be a number, the weight of a loss. Found "
                f"{'none' if value is None else type(value).__name__}. A trainer without weights needs "
                "`compute_losses(model, inputs)`, which returns the forget and the retain loss."
            )
        found[name] = Weight(value)
        descriptor = inspect.getattr_static(type(trainer), name, None)
        if default is None and inspect.isdatadescriptor(descriptor):
            raise ValueError(
                f"`self.{name}` should be an attribute of the trainer itself, because it is replaced while "
                f"`compute_loss` runs. Found a {type(descriptor).__name__} of its class: use "
                "`compute_losses(model, inputs)`, which returns the forget and the retain loss."
            )
    return found


def ratio_of(name: str, now: float, first: float) -> float:
    if first == 0.0:
        raise ValueError(
            f"`self.{name}` should not become {now} in a later micro-batch of a window whose first "
            "micro-batch has 0, because the gradients of the window are multiplied by the first weight. Use "
            "a small positive number instead of 0, or let the weight change between optimizer steps."
        )
    return now / first


@contextmanager
def replaced(trainer: Any, instead: dict[str, Any]) -> Iterator[None]:
    """Temporarily replaces attributes. One that is reassigned inside the block keeps its new value."""
    before = {name: vars(trainer)[name] for name in instead if name in vars(trainer)}
    for name, value in instead.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in instead.items():
            now = vars(trainer).get(name)
            if now is not value:
                if isinstance(now, Weight):  # a multiple of the weight
                    setattr(trainer, name, float(now))
                continue
            if name in before:
                setattr(trainer, name, before[name])
            else:
                delattr(trainer, name)


def scaled(weight: str, name: str, found: Weight) -> list[tuple[Tensor, Tensor]]:
    """The losses that the weight was multiplied with, and the derivative of the total by each product."""
    reached = [(loss, cut.grad) for loss, cut in found.products or () if cut.grad is not None]
    if not reached:
        seen = (
            f"that the loss does not contain the product with `self.{weight}`"
            if found.products
            else f"no product of `self.{weight}` and a loss"
        )
        raise ValueError(
            "The loss in training should be `self.gamma * forget_loss + self.alpha * retain_loss`. Found "
            f"{seen}. If a trainer uses its weights in another way, or leaves the {name} loss out of some "
            "batches, give it a method `compute_losses(model, inputs)`, which returns the forget and the "
            "retain loss."
        )
    for _, cut in found.products or ():
        cut.grad = None  # `capture` finds a product inside a loss by a new gradient here
    return reached
