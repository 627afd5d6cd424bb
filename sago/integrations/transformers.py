"""Gradient synthesis in the Trainer of Hugging Face transformers, by a mixin class."""

from __future__ import annotations

import inspect
import logging
import math
import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from sago.capture.buckets import GradientBuckets
from sago.capture.streamed import InBackward
from sago.core.checks import NONFINITE, check_floor
from sago.core.report import SynthesisReport
from sago.integrations import deepspeed
from sago.integrations.configuration import ByPattern, dtype_of, groups_of, rule_of
from sago.private import has_since, require
from sago.ranks.ddp import reduce_in_backward
from sago.rules import Rule, resolve

if TYPE_CHECKING:
    _Trainer: TypeAlias = Any
else:
    _Trainer = object

_TESTED = "transformers 4.45 to 5.24"
_ACCELERATE = "accelerate 1.15"
_SIDES = {"gamma": "forget", "alpha": "retain"}
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")
_NORMS = ("norm_forget", "norm_retain", "norm_update")
_COSINES = ("cos_forget_retain", "cos_update_forget", "cos_update_retain")
_LOGGED = (
    *_COSINES,
    "conflict_fraction",
    *_NORMS,
    "nonfinite_forget",
    "nonfinite_retain",
)


@dataclass(frozen=True)
class Synthesis:
    """The options of the synthesis in a trainer.

    Attributes:
        rule: As in `sago.synthesize_`.
        groups: A function from the name of a parameter to the key of its group: for rules that take inner
            products over each group, for `retain_floor`, and for the rows of the report. By default every
            parameter is a group.
        nonfinite: As in `GradientBuckets.synthesize_`.
        accumulate_dtype: As in `sago.GradientBuckets`.
        stats: Whether all fields of the report are computed and logged, or only those that the rule needs.
        one_copy: As in `sago.GradientBuckets`. The updates have the same bits with half of the memory. This
            needs a rule of scope "element" or "tensor" without a memory, `nonfinite="propagate"`, no
            `accumulate_dtype`, one micro-batch in a window, and one process or FSDP2.
        retain_floor: As in `sago.synthesize_`.
    """

    rule: str | Rule = "sago"
    groups: Callable[[str], Hashable] | None = None
    nonfinite: Literal["propagate", "zero_update"] = "propagate"
    accumulate_dtype: torch.dtype | None = None
    stats: bool = True
    one_copy: bool = False
    retain_floor: float = 0.0

    def __post_init__(self) -> None:
        rule = resolve(self.rule)
        check_floor(rule, self.retain_floor)
        if self.nonfinite not in NONFINITE:
            raise ValueError(
                f"Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found {self.nonfinite!r}."
            )
        for name in ("stats", "one_copy"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Parameter `{name}` should be True or False. Found {getattr(self, name)!r}.")
        if self.one_copy:
            _check_one_copy(rule, self)
        if self.groups is not None and not callable(self.groups):
            raise TypeError(
                "Parameter `groups` should be None or a function of a parameter's name. Found "
                f"{type(self.groups).__name__}."
            )

    @classmethod
    def of(cls, options: Any) -> Synthesis:
        """The options from a mapping, for example a part of a YAML file.

        `sago.integrations.configuration` says which forms `rule`, `groups` and `accumulate_dtype` have there.

        Raises:
            ValueError, TypeError: For an unknown option or an invalid value.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise TypeError(
                f"Parameter `synthesis` should be a Synthesis or a mapping. Found {type(options).__name__}."
            )
        names = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in names]
        if unknown:
            raise ValueError(
                f"Parameter `synthesis` should have options among {', '.join(names)}. Found {unknown[0]!r}."
            )
        read: dict[str, Callable[[Any], Any]] = {
            "rule": rule_of,
            "groups": groups_of,
            "accumulate_dtype": dtype_of,
        }
        found: dict[str, Any] = {n: read[n](x) if n in read else x for n, x in options.items()}
        return cls(**found)


class GradientSynthesisMixin(_Trainer):
    """Turns a trainer that adds two weighted losses into one that synthesizes their gradients.

        class SAGOSimNPO(GradientSynthesisMixin, SimNPO):
            synthesis = Synthesis(rule="sago")

    `SimNPO` stands for any subclass of `transformers.Trainer` whose loss is `self.gamma * forget_loss +
    self.alpha * retain_loss`, with the forget loss as minimised. The synthesis runs once for each optimizer
    step, after all micro-batches and the reduction over the ranks, and sets `p.grad` to the update of the
    rule. The trainer does everything else: batches, mixed precision, clipping, optimizer, checkpoints,
    evaluation.

    A trainer that weighs its losses in another way defines a method `compute_losses(model, inputs)`, which
    returns the unweighted forget and retain loss. Training uses it instead of `compute_loss`. The weights are
    `self.gamma` and `self.alpha`, or 1 if the attribute is missing.

    A trainer that computes its losses apart defines `compute_forget_loss(model, forget_inputs)`, in a class
    that has this mixin among its bases, and defines or inherits `compute_retain_loss(model, retain_inputs)`.
    The arguments are `inputs["forget"]` and `inputs["retain"]`, and the results are as for `compute_losses`.
    The backward of the forget loss then runs before the forward of the retain loss, so that the activations
    of one loss are held at a time. `compute_losses` has precedence.

    The mixin finds the two losses while `compute_loss` runs. `self.gamma` and `self.alpha` are then floats
    that record the tensors they are multiplied with, and cut the products out of the graph. The trainer's own
    backward ends at the cuts, where it leaves the scale of the losses (of accumulation or of a GradScaler).
    Then the mixin runs the backward of each loss with that scale, into its side of `sago.GradientBuckets`.

    Whenever the trainer logs its loss, the mixin adds both unweighted losses, averaged over micro-batches and
    ranks, and the report of the last synthesis over all groups. A cosine that is not defined, because a norm
    is 0 or not finite, is left out. `sago.integrations.callbacks` writes the values of each group to a file.

    Attributes:
        synthesis_report: The report of the last synthesis. None before the first one.
        synthesis: The options, a `Synthesis` or a mapping with the same names. They are an attribute of the
            class or an argument of the constructor, and are read at the first step of `train`.

    Raises:
        ValueError: In a training step, unless both losses are found and nothing else reaches the parameters.
        RuntimeError: In a training step, if the installed versions of transformers or accelerate do not do
            what the mixin relies on.

    Source: arXiv 2604.14808; the trainers of OpenUnlearning (arXiv 2506.12618).
    """

    synthesis: Synthesis | Mapping[str, Any] = Synthesis()
    synthesis_report: SynthesisReport | None = None
    _synthesizer: _Synthesizer | None = None

    def __init__(self, *args: Any, synthesis: Synthesis | Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if synthesis is not None:
            self.synthesis = Synthesis.of(synthesis)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ahead = cls.__mro__[: cls.__mro__.index(GradientSynthesisMixin)]
        trainers = [
            c for c in ahead if "training_step" in vars(c) and GradientSynthesisMixin not in c.__mro__
        ]
        if trainers and not hasattr(super(), "training_step"):
            raise TypeError(
                f"GradientSynthesisMixin should come ahead of the trainer among the bases of {cls.__name__}. "
                f"Found {trainers[0].__name__} ahead of it."
            )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._synthesizer is None or self._synthesizer.model is not model:
            # The mixin overrides `_inner_training_loop` to notice the end of a training.
            if not hasattr(super(), "_inner_training_loop"):
                raise RuntimeError(
                    "The trainer should have the private method `_inner_training_loop` of "
                    f"transformers.Trainer, on which sago relies. Found none. Install {_TESTED}, with which "
                    "sago was tested."
                )
            self._synthesizer = _Synthesizer(self, model)
        synthesizer = self._synthesizer
        synthesizer.begin(self)
        weights = _weights(self)
        instead: dict[str, Any] = {**weights}
        unweighted = _unweighted(self)
        apart = None
        if unweighted:
            compute_loss: Callable[..., Tensor]
            if hasattr(self, "compute_losses"):
                compute_loss = partial(_weighed, self, weights)
            else:
                apart = _LossesApart(self, weights)
                compute_loss = apart.compute_loss
            # These losses are means over a micro-batch. The trainer must divide them by the number of
            # micro-batches, and asks these attributes whether it does. `check_scale` finds out.
            instead = {
                "compute_loss": compute_loss,
                "loss_is_scaled_for_ga": False,
                "model_accepts_loss_kwargs": False,
                "compute_loss_func": None,
            }
        extra = () if num_items_in_batch is None else (num_items_in_batch,)
        try:
            with _replaced(self, instead), synthesizer.not_stepping(self.accelerator):
                loss = super().training_step(model, inputs, *extra)
            if unweighted:
                synthesizer.check_scale(self, num_items_in_batch is not None, *weights.values())
            synthesizer.capture(weights, None if apart is None else apart.retain_loss)
        finally:
            for weight in weights.values():
                weight.products = None
        if _steps_next(self):
            self.synthesis_report = synthesizer.synthesize(self.accelerator)
        return loss if apart is None else loss + apart.weighed / _micro_batches(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The trainer itself logs its loss on every rank, so ranks can be averaged here.
        if self._synthesizer is not None and "loss" in logs and self.control.should_log:
            logs = {**logs, **self._synthesizer.summary(self.accelerator)}
        super().log(logs, *(() if start_time is None else (start_time,)))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._synthesizer is not None:
                self._synthesizer.close()
            self._synthesizer = None  # frees the copies of the gradients


class _Weight(float):
    """The weight of a loss, which records the tensors that it is multiplied with.

    The product is a leaf, so that the backward of the trainer ends there. A product of the weight and a
    number records for the weight: the number becomes a factor of the loss.

    Attributes:
        products: The factors and the leaves. None after the step, which makes the weight a plain float.
        origin: The weight that a multiple records for. None if it is no multiple.
        times: The number that the weight was multiplied with.
    """

    products: list[tuple[Tensor, Tensor]] | None
    origin: _Weight | None
    times: float

    def __new__(cls, value: Any, origin: _Weight | None = None, times: float = 1.0) -> _Weight:
        weight = super().__new__(cls, value)
        weight.products, weight.origin, weight.times = [], origin, times
        return weight

    def __mul__(self, other: Any) -> Any:
        product = float(self) * other
        if isinstance(other, Tensor):
            return self._cut(other, product)
        number = isinstance(other, Real) and not isinstance(other, _Weight)
        return self._multiple(product, self.times * other) if number else product

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        quotient = float(self) / other
        number = isinstance(other, Real) and not isinstance(other, _Weight)
        return self._multiple(quotient, self.times / other) if number else quotient

    def __neg__(self) -> _Weight:
        return self._multiple(-float(self), -self.times)

    def _multiple(self, value: float, times: float) -> _Weight:
        return _Weight(value, self if self.origin is None else self.origin, times)

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
        return cut


class _LossesApart:
    """The losses of a trainer with `compute_forget_loss` and `compute_retain_loss`, for one micro-batch.

    The trainer's own step computes the forget loss only. A 0 stands for the retain loss, so that the
    trainer's backward leaves its scale at the product with `alpha`.

    Attributes:
        weighed: The retain loss times its weight, once it is computed.
    """

    def __init__(self, trainer: Any, weights: dict[str, _Weight]) -> None:
        self._trainer, self._weights = trainer, weights
        self._arguments: dict[str, Any] = {}  # of `compute_retain_loss`
        self._shape = torch.Size()
        self.weighed: Tensor | float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not isinstance(inputs, Mapping) or not {"forget", "retain"} <= inputs.keys():
            found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                'A batch should be a mapping with the keys "forget" and "retain", which are the inputs of '
                f"compute_forget_loss and compute_retain_loss. Found {found}. For other batches, define "
                "`compute_losses(model, inputs)`."
            )
        loss = self._trainer.compute_forget_loss(model=model, forget_inputs=inputs["forget"])
        _check_loss("compute_forget_loss", loss)
        self._weights.update(_weights(self._trainer))
        self._arguments = {"model": model, "retain_inputs": inputs["retain"]}
        # The stand-in is at least fp32, because the retain loss may be wider than the forget loss.
        wide = torch.promote_types(loss.dtype, torch.float32)
        self._shape = loss.shape
        stand_in = torch.zeros_like(loss, dtype=wide, requires_grad=True)
        return self._weights["gamma"] * loss + self._weights["alpha"] * stand_in

    def retain_loss(self) -> Tensor:
        arguments, self._arguments = self._arguments, {}
        with self._trainer.compute_loss_context_manager():
            loss = self._trainer.compute_retain_loss(**arguments)
        _check_loss("compute_retain_loss", loss)
        for name, weight in _weights(self._trainer).items():
            if weight != self._weights[name]:
                raise ValueError(
                    f"`self.{name}` should not change in compute_retain_loss, because the trainer has used "
                    f"it by then. Found {float(weight)} after {float(self._weights[name])}. Set it in "
                    "compute_forget_loss, or define `compute_losses(model, inputs)`."
                )
        if loss.shape != self._shape:
            raise ValueError(
                f"compute_retain_loss should return a loss of the shape {tuple(self._shape)}, as "
                f"compute_forget_loss does. Found {tuple(loss.shape)}. Return the mean over the batch in "
                "both."
            )
        self.weighed = float(self._weights["alpha"]) * loss.detach().mean()
        return loss


class _Synthesizer:
    """The buckets of a model in training, and the losses since the last log.

    Attributes:
        model: The model that the trainer passes to `training_step`.
    """

    def __init__(self, trainer: Any, model: Any) -> None:
        _check_optimizer(trainer)
        self.model = model
        self._engine = _engine(trainer.accelerator, model)
        self._backward_options: dict[str, Any] = {}  # those of the trainer's call for DeepSpeed
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._how = Synthesis.of(trainer.synthesis)
        self._rule, groups = _rule_and_groups(trainer, self._how, model, self._engine)
        if self._how.one_copy:
            _check_one_micro_batch(trainer)
        self._buckets = GradientBuckets(
            model, groups, self._how.accumulate_dtype, one_copy=self._how.one_copy
        )
        self._reducing = list(_reducing(model))
        # The weights of the first micro-batch of the open window.
        self._weights: tuple[float, float] | None = None
        self._used = (1.0, 1.0)  # the weights of the last synthesis
        self._step = 0  # the optimizer step of the open window
        self._shared: bool | None = None
        self._report: SynthesisReport | None = None
        self._loss_scale: Any = 1.0
        self._checked: set[tuple[int, bool]] = set()  # the cases in which `check_scale` has read the scale
        self._losses: Tensor | None = None  # sums since the last log
        self._count = 0

    def begin(self, trainer: Any) -> None:
        step = trainer.state.global_step
        if self._weights is not None and self._step != step:
            raise ValueError(
                "The optimizer should step only after a micro-batch with `accelerator.sync_gradients`, which "
                f"ends a window. Found that step {self._step} ended without it. Leave the order of steps "
                "to the Trainer."
            )
        self._step = step
        # This may run inside accelerate's no_sync, which surrounds all micro-batches but the last.
        for module in self._reducing:
            if isinstance(module, DistributedDataParallel):
                reduce_in_backward(module, False)  # `GradientBuckets` reduces
            else:
                module.set_requires_gradient_sync(True, recurse=False)

    def close(self) -> None:
        """Switches the modules' own reduction on again."""
        for module in self._reducing:
            if isinstance(module, DistributedDataParallel):
                reduce_in_backward(module, True)

    @contextmanager
    def not_stepping(self, accelerator: Any) -> Iterator[None]:
        """Makes `accelerator.backward` call `loss.backward`, because DeepSpeed's wrapper would also step."""
        if self._engine is None:
            yield
            return
        accelerator.deepspeed_engine_wrapped = _Engineless(self._named, self._backward_options)
        try:
            yield
        finally:
            accelerator.deepspeed_engine_wrapped = self._engine

    def check_scale(self, trainer: Any, counted: bool, *weights: _Weight) -> None:
        """Raises unless the losses of `compute_losses` are divided by the number of micro-batches.

        Waits for the device at the first micro-batch of each case, because the Trainer's code decides by the
        case and not by the values.

        Args:
            trainer: The trainer.
            counted: Whether the trainer counted the items of the window, which its code may ask.
            weights: The weights, after the trainer's backward.
        """
        count = _micro_batches(trainer)
        cuts = [cut for weight in weights for _, cut in weight.products or ()]
        scales = [cut.grad for cut in cuts if cut.grad is not None]
        if (count, counted) in self._checked or not scales:  # `capture` says which loss is missing
            return
        factors = torch.stack([scale.float().sum() for scale in scales])
        if self._engine is None:
            factors = factors / _gradient_scale(trainer.accelerator, factors)
        elif self._backward_options.get("scale_wrt_gas", True):  # the engine divides in its own backward
            factors = factors / self._engine.engine.gradient_accumulation_steps()
        found = [factor.item() for factor in factors]
        if not all(math.isfinite(x) for x in found):
            return  # a GradScaler begins with a scale that overflows, and skips the step
        self._checked.add((count, counted))
        # At most four operations round, in the dtype of a loss or in a wider one.
        rounding = 4 * max(torch.finfo(scale.dtype).eps for scale in scales)
        wrong = [x for x in found if abs(x * count - 1.0) > rounding]
        if wrong:
            raise RuntimeError(
                f"The losses of `compute_losses` should reach the backward with the factor {1 / count:g}, "
                f"because a window has {count} micro-batches. Found {wrong[0]:g}. The Trainer divides losses "
                "in another way than in the versions with which sago was tested: set "
                f"gradient_accumulation_steps=1, or install {_TESTED}, but not 4.46."
            )

    def capture(
        self, weights: Mapping[str, _Weight], retain_loss: Callable[[], Tensor] | None = None
    ) -> None:
        """Runs both backwards with the scales that the trainer's backward has left at the cuts.

        The synthesis takes the weights of the first micro-batch of a window. If those of a later one differ,
        their ratio to the first ones becomes a factor of its losses.

        Args:
            weights: The weights `gamma` and `alpha`, after the trainer's backward.
            retain_loss: Computes the retain loss after the backward of the forget loss. None if it is already
                a factor of the weight.
        """
        sides = [_scaled(name, side, weights[name]) for name, side in _SIDES.items()]
        self._check_nothing_else()
        now = float(weights["gamma"]), float(weights["alpha"])
        first = now if self._weights is None else self._weights
        _warn_of_retain(self._rule, *first)
        for k, name in enumerate(_SIDES):
            if now[k] != first[k]:
                ratio = _ratio(name, now[k], first[k])
                sides[k] = [(loss, ratio * scale) for loss, scale in sides[k]]
        if self._shared is None:
            self._shared = retain_loss is None and _share_graph(*([x for x, _ in side] for side in sides))
        losses = [_sum_of_means(sides[0])]
        try:
            with self._buckets.forget():
                self._backward(sides[0], retain_graph=self._shared)
                if retain_loss is not None:
                    ((_, scale),) = sides[1]
                    loss = retain_loss()
                    sides[1] = [(loss, scale.to(loss.dtype))]
        except BaseException:
            # A trainer may skip the batch. Its forget gradient is dropped, unless the window has others.
            if retain_loss is not None and self._count == 0:
                self._buckets.zero_()
            raise
        losses.append(_sum_of_means(sides[1]))
        with self._retain_capture(*first) as step:
            self._backward(sides[1], retain_graph=False)
            if any(cut.grad is not None for weight in weights.values() for _, cut in weight.products or ()):
                raise ValueError(
                    "The losses should not contain `self.gamma` or `self.alpha` themselves. Found a product "
                    "with one of them inside a loss, which cuts its gradient off; use "
                    "`compute_losses(model, inputs)`."
                )
        if step is not None:
            self._report = step.report
        seen = torch.stack(losses)
        self._weights = first
        self._losses = seen if self._losses is None else self._losses + seen
        self._count += 1

    def _retain_capture(self, gamma: float, alpha: float) -> AbstractContextManager[InBackward | None]:
        if not self._how.one_copy:
            return self._buckets.retain()
        return self._buckets.synthesize_in_backward(
            self._rule, gamma, alpha, stats=self._how.stats, retain_floor=self._how.retain_floor
        )

    def synthesize(self, accelerator: Any) -> SynthesisReport:
        assert self._weights is not None  # `capture` sets them
        self._used = self._weights
        if not self._how.one_copy:  # else `capture` has done it
            gamma, alpha = self._used
            self._report = self._buckets.synthesize_(
                self._rule,
                gamma,
                alpha,
                nonfinite=self._how.nonfinite,
                stats=self._how.stats,
                retain_floor=self._how.retain_floor,
            )
        self._weights = None
        if self._engine is not None:
            self._loss_scale = deepspeed.scale_of(self._engine.engine)
            self._engine.engine.step()
        elif self._losses is not None:
            self._loss_scale = _gradient_scale(accelerator, self._losses)
        assert self._report is not None  # set here or by `capture`
        return self._report

    def summary(self, accelerator: Any) -> dict[str, float]:
        """The values to log. Waits for the device."""
        if self._report is None or self._losses is None:
            return {}
        forget, retain = accelerator.reduce(self._losses / self._count, reduction="mean").tolist()
        self._losses, self._count = None, 0
        found = self._report.summary()
        for warning in self._report.warnings():
            _warn_once("noise", warning)
        self._check_same_weights(accelerator)
        scale = float(self._loss_scale)
        logged = {n: found[n] / scale if n in _NORMS else found[n] for n in _LOGGED if n in found}
        logged = {n: x for n, x in logged.items() if n not in _COSINES or not math.isnan(x)}
        return {"forget_loss": forget, "retain_loss": retain, **logged}

    def _check_same_weights(self, accelerator: Any) -> None:
        """Raises if the ranks used different weights. It is part of logging, which waits for the ranks."""
        weights = torch.tensor([self._used], device=accelerator.device)
        for name, values in zip(_SIDES, accelerator.gather(weights).unbind(1), strict=True):
            if len(set(values.tolist())) > 1:
                raise ValueError(
                    f"`self.{name}` should be the same on every rank, because it is a weight of the update "
                    f"and not of the local loss. Found {values.tolist()}. Average what it is computed from "
                    "over the ranks, for example with accelerator.reduce."
                )

    def _backward(self, side: Sequence[tuple[Tensor, Tensor]], retain_graph: bool) -> None:
        losses, scales = [loss for loss, _ in side], [scale for _, scale in side]
        if self._engine is None:
            torch.autograd.backward(losses, scales, retain_graph=retain_graph)
            return
        total = torch.stack([(loss * scale).sum() for loss, scale in side]).sum()
        self._engine.backward(total, retain_graph=retain_graph, **self._backward_options)

    def _check_nothing_else(self) -> None:
        for name, p in self._named:
            if p.grad is not None:
                raise _another_term(name)


class _Engineless:
    """Replaces accelerate's wrapper of a DeepSpeed engine by a plain backward.

    Args:
        named: The parameters. The plain backward must not reach them, because the engine's hooks would run.
        options: A dict that receives the options of the trainer's call.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], options: dict[str, Any]) -> None:
        self._named, self._options = named, options

    def backward(self, loss: Tensor, **options: Any) -> None:
        # Also keeps the nodes alive, because autograd would make another object for the same node.
        names = {get_gradient_edge(p).node: name for name, p in self._named if p.requires_grad}
        for node in _nodes([loss]):
            if node in names:
                raise _another_term(names[node])
        self._options.clear()
        self._options.update(options)
        loss.backward()


def _another_term(name: str) -> ValueError:
    return ValueError(
        "The loss should be `self.gamma * forget_loss + self.alpha * retain_loss` and nothing else. Found "
        f"another term, which reaches parameter `{name}`."
    )


def _weights(trainer: Any) -> dict[str, _Weight]:
    """The weights that the trainer has now, as new objects."""
    found = {}
    unweighted = _unweighted(trainer)
    for name in _SIDES:
        value = getattr(trainer, name, 1.0 if unweighted else None)
        if not isinstance(value, Real):
            raise ValueError(
                f"`self.{name}` should be a number, the weight of a loss. Found "
                f"{'none' if value is None else type(value).__name__}. A trainer without weights needs "
                "`compute_losses(model, inputs)`, which returns the forget and the retain loss."
            )
        found[name] = _Weight(value)
        descriptor = inspect.getattr_static(type(trainer), name, None)
        if not unweighted and inspect.isdatadescriptor(descriptor):
            raise ValueError(
                f"`self.{name}` should be an attribute of the trainer itself, because it is replaced while "
                f"`compute_loss` runs. Found a {type(descriptor).__name__} of its class: use "
                "`compute_losses(model, inputs)`, which returns the forget and the retain loss."
            )
    return found


def _ratio(name: str, now: float, first: float) -> float:
    if first == 0.0:
        raise ValueError(
            f"`self.{name}` should not become {now} in a later micro-batch of a window whose first "
            "micro-batch has 0, because the gradients of the window are multiplied by the first weight. Use "
            "a small positive number instead of 0, or let the weight change between optimizer steps."
        )
    return now / first


def _unweighted(trainer: Any) -> bool:
    """Whether the trainer has methods that return the losses without weights.

    A method `compute_forget_loss` of a trainer that does not know the mixin may have another sign or result.
    """
    if hasattr(trainer, "compute_losses"):
        return True
    owner = next((c for c in type(trainer).__mro__ if "compute_forget_loss" in vars(c)), object)
    return issubclass(owner, GradientSynthesisMixin) and hasattr(trainer, "compute_retain_loss")


def _check_loss(method: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        found = "one without a gradient" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"{method} should return a tensor that depends on the parameters, the loss as minimised. Found "
            f"{found}. Return the loss alone, without outputs and without its weight."
        )


def _sum_of_means(side: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of a side, for the logs."""
    return torch.stack([loss.detach().float().mean() for loss, _ in side]).sum()


def _weighed(
    trainer: Any,
    weights: dict[str, _Weight],
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:
    """The loss of a trainer with `compute_losses`, which may also set the weights."""
    forget, retain = trainer.compute_losses(model, inputs)
    weights.update(_weights(trainer))
    return weights["gamma"] * forget + weights["alpha"] * retain


@contextmanager
def _replaced(trainer: Any, instead: dict[str, Any]) -> Iterator[None]:
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
                if isinstance(now, _Weight):  # a multiple of the weight
                    setattr(trainer, name, float(now))
                continue
            if name in before:
                setattr(trainer, name, before[name])
            else:
                delattr(trainer, name)


def _scaled(weight: str, name: str, found: _Weight) -> list[tuple[Tensor, Tensor]]:
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


def _share_graph(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> bool:
    """Whether the second backward needs tensors that the first would free."""
    nodes = set(_nodes(forget))  # kept alive, because autograd would make another object for the same node
    return any(node in nodes and node.next_functions for node in _nodes(retain))  # a leaf saves nothing


def _nodes(losses: Sequence[Tensor]) -> Iterator[Any]:
    ahead = [loss.grad_fn for loss in losses]
    seen = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions]


def _reducing(model: torch.nn.Module) -> Iterator[Any]:
    """The modules that reduce gradients over the ranks in a backward."""
    sharded: tuple[type, ...] = ()
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        sharded = (FSDPModule,)
    return (m for m in model.modules() if isinstance(m, (DistributedDataParallel, *sharded)))


def _rule_and_groups(
    trainer: Any, how: Synthesis, model: torch.nn.Module, engine: Any
) -> tuple[Rule, list[Hashable] | None]:
    """The rule and a key for each parameter, so that no sum mixes parameters of the optimizer with others."""
    rule, groups = resolve(how.rule), how.groups
    named = [(_clean(n), p) for n, p in model.named_parameters()]
    if rule.scope != "global":
        if isinstance(groups, ByPattern):
            groups.check([n for n, _ in named])
        return rule, None if groups is None else [groups(n) for n, _ in named]
    if engine is not None:  # the optimizer of an engine has flat parts of the parameters
        return rule, None
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    keys: list[Hashable] = ["in the optimizer" if id(p) in trained else "others" for _, p in named]
    if all(id(p) in trained or not p.requires_grad for _, p in named):
        return rule, None
    return replace(rule, scope="tensor"), keys


def _clean(name: str) -> str:
    """The name in the user's model, without the prefixes of DDP and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _engine(accelerator: Any, model: Any) -> Any:
    """accelerate's wrapper of the DeepSpeed engine, or None without DeepSpeed."""
    name = "deepspeed_engine_wrapped"
    if not deepspeed.is_engine(model):
        return getattr(accelerator, name) if hasattr(accelerator, name) else None
    require(accelerator, [name], "accelerate", _ACCELERATE)
    wrapper = getattr(accelerator, name)
    if wrapper is None:
        raise ValueError(
            f"`accelerator.{name}` should be the wrapper of the DeepSpeed engine that is trained, because "
            "sago replaces it during the trainer's backward. Found None. Make the engine with "
            "accelerator.prepare."
        )
    return wrapper


def _micro_batches(trainer: Any) -> int:
    """The number of micro-batches of the open window."""
    if hasattr(trainer, "current_gradient_accumulation_steps"):
        current: int = trainer.current_gradient_accumulation_steps
        return current
    # Before transformers 4.54. In 4.45 accelerate may have a number of its own.
    return max(trainer.args.gradient_accumulation_steps, trainer.accelerator.gradient_accumulation_steps)


def _gradient_scale(accelerator: Any, like: Tensor) -> Any:
    """The scale of accelerate's GradScaler, on the device of a tensor."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.scale(torch.ones_like(like[0]))


def _check_optimizer(trainer: Any) -> None:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "layerwise" in name or "lomo" in name:
        raise ValueError(f"Parameter `optim` should step after the backward, not in it. Found {name!r}.")
    if _context_parallel(trainer.accelerator):
        raise ValueError(
            "Parameter `parallelism_config` should be without context parallelism, because its backward must "
            "run inside its context manager. Found cp_size > 1. Set cp_size=1."
        )
    if getattr(trainer, "use_apex", False):
        raise ValueError("Parameter `half_precision_backend` should be 'auto'. Found apex.")


def _check_one_copy(rule: Rule, how: Synthesis) -> None:
    """Raises unless an update can be written while the retain gradients arrive."""
    found, because = "", ""
    if rule.scope == "global":
        found = f"rule={rule.name!r}"
        because = "needs inner products over all gradients, which are complete only after the backward"
    elif rule.state:
        found = f"rule={rule.name!r}"
        because = "keeps numbers of all groups from step to step"
    elif how.nonfinite != "propagate":
        found = f"nonfinite={how.nonfinite!r}"
        because = "needs all elements of both gradients before the first is written"
    elif how.accumulate_dtype is not None:
        found, because = f"accumulate_dtype={how.accumulate_dtype}", "needs accumulators of that dtype"
    if found:
        raise ValueError(
            f"Parameter `one_copy` should be False with {found}, which {because}. Found True. Leave "
            "`one_copy` out, or change the other parameter."
        )


def _warn_of_retain(rule: Rule, gamma: float, alpha: float) -> None:
    """Warns if `alpha` is 0 and the rule still reads the retain gradient."""
    read = frozenset().union(*rule.reads[gamma == 0.0, True])
    if alpha == 0.0 and (rule.classes > 1 or not read <= {"ff"}):
        _warn_once(
            f"alpha=0 {rule.name}",
            f"`self.alpha` is 0, but the rule {rule.name!r} still reads the retain gradient: its signs, or "
            "inner products with it. With rule='sum', a retain loss of weight 0 changes nothing.",
        )


_warned: set[str] = set()


def _warn_once(kind: str, text: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logging.getLogger("sago").warning("sago: %s", text)


def _check_one_micro_batch(trainer: Any) -> None:
    count = max(trainer.args.gradient_accumulation_steps, trainer.accelerator.gradient_accumulation_steps)
    if count > 1:
        raise ValueError(
            "Parameter `one_copy` should be False with gradient accumulation, because the retain gradients "
            f"of several micro-batches need accumulators. Found True and {count} micro-batches. Set "
            "gradient_accumulation_steps=1 with a larger per_device_train_batch_size, or leave `one_copy` "
            "out."
        )


def _context_parallel(accelerator: Any) -> bool:
    known = has_since(accelerator, "parallelism_config", "accelerate", (1, 10), "accelerate", _ACCELERATE)
    if not known or accelerator.parallelism_config is None:
        return False
    require(accelerator.parallelism_config, ["cp_enabled"], "accelerate", _ACCELERATE)
    return bool(accelerator.parallelism_config.cp_enabled)


def _steps_next(trainer: Any) -> bool:
    """Whether the optimizer steps before the next micro-batch."""
    accelerator = trainer.accelerator
    if accelerator.sync_gradients:
        return True
    if hasattr(trainer, "get_batch_samples"):
        return False
    # transformers 4.45 also steps at the end of an epoch that is shorter than a window, but sets
    # `sync_gradients` only afterwards.
    batches = operator.length_hint(trainer.callback_handler.train_dataloader, sys.maxsize)
    short = batches <= trainer.args.gradient_accumulation_steps
    return short and accelerator.gradient_state.end_of_dataloader
