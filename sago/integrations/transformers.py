"""Gradient synthesis in the Trainer of Hugging Face transformers, by a mixin class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from sago.core.report import SynthesisReport
from sago.integrations.trainer.adapter import TESTED, micro_batches, steps_next
from sago.integrations.trainer.losses import LossesApart, weighed, without_count
from sago.integrations.trainer.options import Synthesis
from sago.integrations.trainer.synthesizer import Synthesizer
from sago.integrations.trainer.tally import Tally
from sago.integrations.trainer.trained import check_trains
from sago.integrations.trainer.weights import replaced, weights_of

__all__ = ["GradientSynthesisMixin", "Synthesis"]

if TYPE_CHECKING:
    _Trainer: TypeAlias = Any
else:
    _Trainer = object


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

    A trainer with a method for each loss defines `compute_forget_loss(model, forget_inputs)`, in a class that
    has this mixin among its bases, and defines or inherits `compute_retain_loss(model, retain_inputs)`. The
    arguments are `inputs["forget"]` and `inputs["retain"]`, and the results are as for `compute_losses`. The
    backward of the forget loss then runs before the forward of the retain loss, so that only the activations
    of one loss are in memory at a time. `compute_losses` has precedence.

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
    _synthesizer: Synthesizer | None = None
    _tally: Tally | None = None

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
                f"GradientSynthesisMixin should be before the trainer in the bases of {cls.__name__}. "
                f"Found {trainers[0].__name__} before it."
            )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._synthesizer is not None and not self._synthesizer.serves(self, model):
            self._close()
        if self._synthesizer is None:
            # The mixin overrides `_inner_training_loop` to notice the end of a training.
            if not hasattr(super(), "_inner_training_loop"):
                raise RuntimeError(
                    "The trainer should have the private method `_inner_training_loop` of "
                    f"transformers.Trainer, on which sago relies. Found none. Install {TESTED}, with which "
                    "sago was tested."
                )
            self._tally = self._tally or Tally()
            self._synthesizer = Synthesizer(self, model, self._tally)
        synthesizer = self._synthesizer
        synthesizer.begin(self)
        unweighted = _returns_losses(self)
        weights = weights_of(self, default=1.0 if unweighted else None)
        apart = None
        compute_loss: Callable[..., Tensor] | None = None
        if not unweighted:
            compute_loss = without_count(self.compute_loss)
        elif hasattr(self, "compute_losses"):
            compute_loss = partial(weighed, self, weights)
        else:
            apart = LossesApart(self, weights)
            compute_loss = apart.compute_loss
        instead: dict[str, Any] = {} if unweighted else {**weights}
        if compute_loss is not None:
            # These losses are means over a micro-batch. The trainer must divide them by the number of
            # micro-batches, and asks these attributes whether it does. `check_scale` finds out.
            instead.update(
                compute_loss=compute_loss,
                loss_is_scaled_for_ga=False,
                model_accepts_loss_kwargs=False,
                compute_loss_func=None,
            )
        extra = () if num_items_in_batch is None else (num_items_in_batch,)
        try:
            with replaced(self, instead), synthesizer.not_stepping(self.accelerator):
                loss = super().training_step(model, inputs, *extra)
            if compute_loss is not None:
                synthesizer.check_scale(self, num_items_in_batch is not None, *weights.values())
            synthesizer.capture(weights, None if apart is None else apart.retain_loss)
        finally:
            for weight in weights.values():
                weight.products = None
        if steps_next(self):
            self.synthesis_report = synthesizer.synthesize(self.accelerator)
        return loss if apart is None else loss + apart.weighed / micro_batches(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        check_trains(self.optimizer)  # the error of DeepSpeed does not name the reason
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The trainer itself logs its loss on every rank, so ranks can be averaged here.
        if self._tally is not None and "loss" in logs and self.control.should_log:
            logs = {**logs, **self._tally.summary(self.accelerator)}
        super().log(logs, *(() if start_time is None else (start_time,)))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._tally = None
            self._close()

    def _close(self) -> None:
        """Frees the copies of the gradients, also if an error is raised."""
        synthesizer, self._synthesizer = self._synthesizer, None
        if synthesizer is not None:
            synthesizer.close()


def _returns_losses(trainer: Any) -> bool:
    """Whether the trainer has methods that return the losses without weights.

    A method `compute_forget_loss` of a trainer that does not know the mixin may have another sign or result.
    """
    if hasattr(trainer, "compute_losses"):
        return True
    owner = next((c for c in type(trainer).__mro__ if "compute_forget_loss" in vars(c)), object)
    return issubclass(owner, GradientSynthesisMixin) and hasattr(trainer, "compute_retain_loss")
