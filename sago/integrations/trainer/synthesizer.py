"""The buckets of a model in training: two backwards for each micro-batch, one synthesis for each window."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from sago.capture.buckets import GradientBuckets
from sago.capture.streamed import InBackward
from sago.core.report import SynthesisReport
from sago.integrations import deepspeed
from sago.integrations.once import warn_once
from sago.integrations.trainer.adapter import (
    TESTED,
    check_one_micro_batch,
    check_supported,
    engine_of,
    gradient_scale,
    micro_batches,
    most_micro_batches,
)
from sago.integrations.trainer.configuration import ByPattern
from sago.integrations.trainer.options import Synthesis
from sago.integrations.trainer.tally import Tally
from sago.integrations.trainer.trained import Dropped, outside
from sago.integrations.trainer.weights import SIDES, Weight, ratio_of, scaled
from sago.ranks import fsdp
from sago.ranks.ddp import reduce_in_backward
from sago.rules import Rule, resolve


class Synthesizer:
    """The buckets of a model in training.

    Args:
        trainer: The trainer.
        model: The model that the trainer passes to `training_step`.
        tally: Collects the values to log.
    """

    def __init__(self, trainer: Any, model: Any, tally: Tally) -> None:
        check_supported(trainer)
        self._model, self._tally = model, tally
        fsdp.reshard(model)  # an evaluation before the training leaves parameters unsharded
        self._engine = engine_of(trainer.accelerator, model)
        self._backward_options: dict[str, Any] = {}  # those of the trainer's call for DeepSpeed
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._how = Synthesis.of(trainer.synthesis)
        self._rule = resolve(self._how.rule)
        self._frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
        self._every = [p for _, p in [*self._named, *self._frozen]]
        apart = outside(trainer.optimizer, model, self._named, self._every)
        if self._how.one_copy:
            check_one_micro_batch(trainer)
        self._buckets = _buckets(model, self._how, [p for _, p in apart])
        self._dropped = Dropped(apart, len(self._named))
        if trainer.state.global_step > 0 and (self._rule.state or self._rule.seed is not None):
            warn_once(
                "memory",
                f"the memory of the rule {self._rule.name!r} was reset at step {trainer.state.global_step}, "
                "because new accumulators were made. Checkpoints of the Trainer do not contain it.",
            )
        _warn_of_rounding(most_micro_batches(trainer), self._buckets.dtypes, model)
        self._reducing = weakref.WeakSet(_reducing(model))
        self._reduce_again = weakref.finalize(self, _reduce_again, self._reducing)
        # The weights of the first micro-batch of the open window.
        self._weights: tuple[float, float] | None = None
        self._lost = ""  # the error in which a later micro-batch of the window ended
        self._step = 0  # the optimizer step of the open window
        self._shared: bool | None = None
        self._report: SynthesisReport | None = None  # of `synthesize_in_backward`
        self._checked: set[tuple[int, bool]] = set()  # the cases in which `check_scale` has read the scale

    def serves(self, trainer: Any, model: Any) -> bool:
        """Whether the buckets are those of this model and of the parameters in the optimizer.

        Inside a window the answer does not depend on the optimizer, so a change of its parameters takes
        effect in the next window.
        """
        if self._model is not model:
            return False
        if self._weights is not None or self._engine is not None:
            return True
        if any(p.requires_grad for _, p in self._frozen):
            return False
        apart = outside(trainer.optimizer, model, self._named, self._every)
        return self._dropped.ids == [id(p) for _, p in apart]

    def begin(self, trainer: Any) -> None:
        step = trainer.state.global_step
        if self._lost:
            raise ValueError(
                "Both gradients of a micro-batch should be complete, because those of a window are added up. "
                f"Found that a micro-batch after the first one of its window ended in {self._lost}. Skip "
                "batches only with gradient_accumulation_steps=1, or train again."
            )
        if self._weights is not None and self._step != step:
            raise ValueError(
                "The optimizer should step only after a micro-batch with `accelerator.sync_gradients`, which "
                f"ends a window. Found that step {self._step} ended without it. Leave the order of steps "
                "to the Trainer, and do not skip the last micro-batch of a window."
            )
        self._step = step
        for name, p in self._frozen:
            if p.requires_grad and self._engine is not None:
                raise ValueError(
                    f"Parameter `{name}` should stay frozen with DeepSpeed, whose engine chose the trained "
                    "parameters when it was made. Found that it requires grad. Unfreeze it before the "
                    "training, or start a new training."
                )
            if p.requires_grad and self._weights is not None:
                raise ValueError(
                    f"Parameter `{name}` should be unfrozen between two optimizer steps, because a window "
                    "adds up gradients of the same parameters. Found that it was unfrozen after the first "
                    "micro-batch of a window. Unfreeze it in `on_step_end` of a callback."
                )
        # This may run inside accelerate's no_sync, which surrounds all micro-batches but the last.
        for module in self._reducing:
            if isinstance(module, DistributedDataParallel):
                reduce_in_backward(module, False)  # `GradientBuckets` reduces
            else:
                module.set_requires_gradient_sync(True, recurse=False)

    def close(self) -> None:
        """Removes the hooks, switches the modules' own reduction on again, and ends an open window."""
        self._dropped.close()
        self._reduce_again()
        if self._weights is not None:
            self._buckets.zero_()

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

    def check_scale(self, trainer: Any, counted: bool, *weights: Weight) -> None:
        """Raises unless the losses of `compute_losses` are divided by the number of micro-batches.

        Waits for the device at the first micro-batch of each case, because the Trainer's code decides by the
        case and not by the values.

        Args:
            trainer: The trainer.
            counted: Whether the trainer counted the items of the window, which its code may ask.
            weights: The weights, after the trainer's backward.
        """
        count = micro_batches(trainer)
        cuts = [cut for weight in weights for _, cut in weight.products or ()]
        scales = [cut.grad for cut in cuts if cut.grad is not None]
        if (count, counted) in self._checked or not scales:  # `capture` says which loss is missing
            return
        factors = torch.stack([scale.float().sum() for scale in scales])
        if self._engine is None:
            factors = factors / gradient_scale(trainer.accelerator, factors)
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
                f"gradient_accumulation_steps=1, or install {TESTED}, but not 4.46."
            )

    def capture(self, weights: Mapping[str, Weight], retain_loss: Callable[[], Tensor] | None = None) -> None:
        """Runs both backwards with the scales that the trainer's backward has left at the cuts.

        The synthesis takes the weights of the first micro-batch of a window. If those of a later one differ,
        their ratio to the first ones becomes a factor of its losses.

        Args:
            weights: The weights `gamma` and `alpha`, after the trainer's backward.
            retain_loss: Computes the retain loss after the backward of the forget loss. None if it is already
                a factor of the weight.
        """
        sides = [scaled(name, side, weights[name]) for name, side in SIDES.items()]
        self._check_nothing_else()
        now = float(weights["gamma"]), float(weights["alpha"])
        first = now if self._weights is None else self._weights
        _warn_of_retain(self._rule, *first)
        for k, name in enumerate(SIDES):
            if now[k] != first[k]:
                ratio = ratio_of(name, now[k], first[k])
                sides[k] = [(loss, ratio * scale) for loss, scale in sides[k]]
        if self._shared is None:
            self._shared = retain_loss is None and _share_graph(*([x for x, _ in side] for side in sides))
        try:
            losses = self._capture(sides, weights, first, retain_loss)
        except BaseException as error:
            # A trainer may skip the micro-batch. Nothing of its gradients may stay.
            if self._weights is None:
                self._buckets.zero_()
            else:
                self._lost = repr(error)
            raise
        self._weights = first
        self._tally.add(losses)

    def _capture(
        self,
        sides: list[list[tuple[Tensor, Tensor]]],
        weights: Mapping[str, Weight],
        first: tuple[float, float],
        retain_loss: Callable[[], Tensor] | None,
    ) -> Tensor:
        """Runs both backwards, and returns the two losses."""
        losses = [_sum_of_means(sides[0])]
        with self._buckets.forget():
            self._backward(sides[0], retain_graph=bool(self._shared))
            if retain_loss is not None:
                ((_, scale),) = sides[1]
                loss = retain_loss()
                sides[1] = [(loss, scale.to(loss.dtype))]
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
        return torch.stack(losses)

    def _retain_capture(self, gamma: float, alpha: float) -> AbstractContextManager[InBackward | None]:
        if not self._how.one_copy:
            return self._buckets.retain()
        return self._buckets.synthesize_in_backward(
            self._rule, gamma, alpha, stats=self._how.stats, retain_floor=self._how.retain_floor
        )

    def synthesize(self, accelerator: Any) -> SynthesisReport:
        assert self._weights is not None  # `capture` sets them
        weights = self._weights
        report = self._report
        if not self._how.one_copy:  # else `capture` has done it
            report = self._buckets.synthesize_(
                self._rule,
                *weights,
                nonfinite=self._how.nonfinite,
                stats=self._how.stats,
                retain_floor=self._how.retain_floor,
            )
        assert report is not None
        if self._engine is None:
            scale = gradient_scale(accelerator, self._tally.losses)
        else:
            scale = deepspeed.scale_of(self._engine.engine)
            self._engine.engine.step()
        self._weights = None
        self._tally.synthesized(report, weights, scale)
        return report

    def _backward(self, side: Sequence[tuple[Tensor, Tensor]], retain_graph: bool) -> None:
        losses, scales = [loss for loss, _ in side], [scale for _, scale in side]
        if self._engine is None:
            torch.autograd.backward(losses, scales, retain_graph=retain_graph)
            return
        total = torch.stack([(loss * scale).sum() for loss, scale in side]).sum()
        options = dict(self._backward_options)
        if options.get("scale_wrt_gas", True) and self._engine.engine.scale_wrt_gas is None:
            # DeepSpeed 0.17 does not divide inside `no_sync`, which surrounds all micro-batches but the last.
            total, options["scale_wrt_gas"] = total / self._engine.engine.gradient_accumulation_steps(), False
        self._engine.backward(total, retain_graph=retain_graph, **options)

    def _check_nothing_else(self) -> None:
        for name, p in self._named:
            if p.grad is not None:
                raise ValueError(
                    f"`{name}.grad` should be None before the backwards of the two losses. Found a gradient. "
                    "Either the loss has another term than `self.gamma * forget_loss + self.alpha * "
                    "retain_loss`, or other code ran a backward, for example a callback. Remove the term, or "
                    "set the gradient to None after that backward."
                )


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


def _sum_of_means(side: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of a side, for the logs."""
    return torch.stack([loss.detach().float().mean() for loss, _ in side]).sum()


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


def _reduce_again(modules: Iterable[Any]) -> None:
    """Switches on again what `begin` has switched off."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            reduce_in_backward(module, True)


def _buckets(model: torch.nn.Module, how: Synthesis, apart: Sequence[Tensor]) -> GradientBuckets:
    """The buckets of all parameters except `apart`."""
    without = {id(p) for p in apart}
    named = list(model.named_parameters())
    kept = [(n, p) for n, p in named if id(p) not in without]
    if isinstance(how.groups, ByPattern):
        how.groups.check([_clean(n) for n, _ in kept])
    # An engine is given whole, because it knows which parameters it trains.
    whole = not apart or deepspeed.is_engine(model)
    keys = None if how.groups is None else [how.groups(_clean(n)) for n, _ in (named if whole else kept)]
    with _frozen([] if whole else apart):  # the buckets refuse a model of DDP that has others
        return GradientBuckets(model if whole else kept, keys, how.accumulate_dtype, one_copy=how.one_copy)


@contextmanager
def _frozen(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the parameters do not require grad."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_()


def _clean(name: str) -> str:
    """The name in the user's model, without the prefixes of DDP and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _warn_of_retain(rule: Rule, gamma: float, alpha: float) -> None:
    """Warns if `alpha` is 0 and the rule still reads the retain gradient."""
    read = frozenset().union(*rule.reads[gamma == 0.0, True])
    if alpha == 0.0 and (rule.classes > 1 or not read <= {"ff"}):
        warn_once(
            f"alpha=0 {rule.name}",
            f"`self.alpha` is 0, but the rule {rule.name!r} still reads the retain gradient: its signs, or "
            "inner products with it. With rule='sum', a retain loss of weight 0 changes nothing.",
        )


def _warn_of_rounding(count: int, dtypes: Set[torch.dtype], model: Any) -> None:
    """Warns if micro-batches are added up in 16 bits. The figures are those of docs/gradients.md.

    Args:
        count: The number of micro-batches.
        dtypes: Those of the accumulators.
        model: The model or its DeepSpeed engine.
    """
    narrow = sorted(str(d).removeprefix("torch.") for d in dtypes & {torch.bfloat16, torch.float16})
    if narrow and count > 1:
        if deepspeed.accumulates(model):
            remedy = "`data_types.grad_accum_dtype: fp32` in DeepSpeed's configuration avoids it."
        else:
            remedy = (
                "`accumulate_dtype=torch.float32` avoids it, for 10 bytes per element of the gradients "
                "instead of 4."
            )
        warn_once(
            "accumulation",
            f"the gradients of {count} micro-batches are added up in {' and '.join(narrow)}. In bfloat16, "
            "this moved elements of an update by up to 0.27 of its largest element (4 micro-batches; "
            f"`python -m benchmarks accumulation`). {remedy}",
        )
