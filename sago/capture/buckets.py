"""`GradientBuckets`: captures the two gradients of a training step and replaces them by the update."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sago.backends.choose import check_backend, choose_backend
from sago.backends.streams import is_capturing
from sago.capture.exposed import Exposed
from sago.capture.flat import flatten
from sago.capture.fresh import FreshGradients
from sago.capture.hooks import check_hooks
from sago.capture.mean import RunningMean, shards_of
from sago.capture.memory import RuleMemory, check_memory
from sago.capture.opening import Engine, find_engine, open_host
from sago.capture.others import Others
from sago.capture.parameters import choose
from sago.capture.pipelines import Pipelines
from sago.capture.reduction import Reduction
from sago.capture.side import Side
from sago.capture.steps import watch_reduction
from sago.capture.streamed import InBackward, check_exact
from sago.capture.window import Window
from sago.core.checks import (
    ReduceGram,
    check_accumulate_dtype,
    check_bool,
    check_call,
    non_negative,
)
from sago.core.pairs import Call, Weight
from sago.core.pipeline import count_versions
from sago.core.report import SynthesisReport
from sago.core.transforms import refuse_transforms
from sago.private import require
from sago.ranks import ddp, dtensor, fsdp
from sago.rules import Rule, resolve

_WAITING = 32 * 2**20  # bytes of complete gradients that may wait for others, with `one_copy`


class GradientBuckets:
    """Accumulates the forget and the retain gradient of a model separately and synthesizes them in place.

        buckets = sago.GradientBuckets(model.named_parameters())
        with buckets.forget():
            forget_loss.backward()
        with buckets.retain():
            retain_loss.backward()
        report = buckets.synthesize_(rule="sago", gamma=1.0, alpha=1.0, max_norm=1.0)
        optimizer.step()
        buckets.zero_()

    Inside `forget()` and `retain()`, `p.grad` is the accumulator of that side, and autograd itself adds to
    it. Outside of them `p.grad` is None, until `synthesize_` writes the update over the retain gradient and
    makes it `p.grad`. The accumulators are flat. They hold the gradients of both losses, or of one with
    `one_copy`, and are allocated with the buckets. No other memory of that size is allocated. They are
    zero after `zero_`, so a checkpoint does not need them. `retain_decay`, rules with a memory and random
    gates are the exceptions, for which a checkpoint needs `state_dict`. The buckets must be kept alive for a
    CUDA graph that has captured a synthesis.

    A window is the time between two updates. It holds captures of both sides in any order and number, nested
    or not, each with any number of backwards. If no backward of a side reaches a parameter, the parameter has
    no gradient on that side, like None in `sago.synthesize_`. If neither side reaches it, its `p.grad` is
    None after the synthesis, as in any training.

    Values that other code writes to `p.grad` inside a capture count as a gradient, zeros included.
    `zero_grad(set_to_none=True)` is the exception: it drops the gradient that the side has so far, except
    with `accumulate_dtype`, where `p.grad` is not the accumulator. If other code gives the tensor `p.grad`
    other memory, as `p.grad.data = x` does, the next captures use the accumulators all the same.

    Args:
        params: A module, `model.parameters()` or `model.named_parameters()`, or a DeepSpeed engine. Frozen
            parameters are ignored, and a parameter that is given twice counts once. The others must be dense
            leaves in bf16, fp16, fp32 or fp64. Their gradients must be dense: the first capture of a side
            raises for a sparse one.
        groups: One hashable key for each of `params`, frozen ones included. By default every parameter is
            a group, whose key is its name, or its position in `params` if there are no names.
        accumulate_dtype: `torch.float32` or `torch.float64`. A hook accumulates narrower gradients in it,
            instead of autograd. A bf16 parameter then costs 4 + 4 + 2 bytes per element, for the accumulators
            and the update, instead of 2 + 2.
        accumulation: "sum" or "mean": whether the captures of a side are added up or averaged. The division
            is part of the coefficients, so it costs no pass. With "mean", every rank needs the same number of
            captures of each side.
        retain_decay: Between 0 and 1. The retain gradient is then a running mean over windows, in which the
            window `k` steps ago weighs `retain_decay ** k`. GRU and MUDMAN work on such a mean. It is divided
            by the sum of the weights, like the first moment of Adam. The mean lives in the retain
            accumulator, which `zero_` multiplies by `retain_decay` instead of clearing it. The update is
            written over the forget gradient, so no memory is added. Save the mean with `state_dict`. The mean
            of an element that is NaN or inf begins again at 0, but the weights of its lost windows stay:
            after a long training, `n` windows later, it is `1 - retain_decay ** n` times what it should be.
            The weighted sum is up to `1 / (1 - retain_decay)` times as large as a gradient: use
            `accumulate_dtype` for fp16, and for long means in bf16. Losses must not be scaled, which the
            buckets cannot notice.
        one_copy: Whether the retain side has no accumulators, which halves the memory. The only retain
            backward of a window then runs in `synthesize_in_backward`, after all forget backwards. The update
            is written over the forget gradient. Besides the accumulators, the largest gradient is held, or
            that of the largest group for a rule of tensor scope. It works on one process and with FSDP2.
        bucket_cap_mb: The largest size of a flat buffer in MiB. A larger tensor has a buffer of its own.
        backend: As in `sago.synthesize_`.

    On several ranks, DTensor parameters (FSDP2, HSDP, tensor parallel) are captured and synthesized shard by
    shard. If they are sharded, the ranks compare once a window which parameters were reached, and all ranks
    raise if a parameter was reached on some ranks only. In the windows 1, 2, 4, 8 and so on, all ranks also
    compare the arguments, with DistributedDataParallel as well, and raise if they differ. Of a rule, they
    compare the coefficients for an example. The host waits for these comparisons.

    The gradients of DistributedDataParallel modules are averaged over their ranks once a window, in the flat
    accumulators, at the start of `synthesize_` or `unscale_`. DDP's own reduction would miss the second of
    two backwards, so it is switched off permanently. Make the buckets after the model was wrapped and before
    the first forward.

    For a DeepSpeed engine at ZeRO stage 3 the partitions of the gradients are captured and synthesized. An
    engine at stage 0 is treated as DDP. Call `engine.backward(loss)` inside the captures and `engine.step()`
    after `synthesize_`. Inside a capture `engine.step()` does nothing, because `accelerator.backward` calls
    it.

    If `params` is a part of a module, freeze the other parameters. If a backward in a capture reaches a
    trainable parameter that was not given, the capture raises, because the gradient of that parameter would
    be the sum of both sides. Parameters that other buckets capture at the same time are exempt. All live
    modules are searched for such parameters before the first capture, and before a later one if a parameter,
    or a module with parameters, was registered since with a module that still exists. A search takes 0.3 s
    for 400,000 objects. Parameters that have no module in common with a given one, or only one that
    `gc.freeze` hides, are not found.

    If an optimizer that holds a captured parameter steps inside a capture, the step raises, because `p.grad`
    is the gradient of one side there. If the optimizer steps between a capture and `synthesize_`, it finds no
    gradients, and a RuntimeWarning says so once.

    Buckets cannot be copied or pickled. Keep them beside the module, as an optimizer is kept, not inside it.

    A parameter that is frozen later has no gradient in later backwards. A gradient that it has by then still
    counts in this window. Make new buckets when a parameter that was frozen is unfrozen, or when one is
    moved, cast or resized, or added to the given module. Otherwise the next window raises.

    Attributes:
        nbytes: The size of all buffers in bytes.
        dtypes: The dtypes in which gradients are accumulated.

    Raises:
        ValueError, TypeError: For invalid parameters, and in methods for invalid calls. Nothing is written
            then, and no gradient is lost.

    Source: arXiv 2604.14808, the extraction of one gradient for each task.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        groups: Sequence[Hashable] | None = None,
        accumulate_dtype: torch.dtype | None = None,
        accumulation: Literal["sum", "mean"] = "sum",
        bucket_cap_mb: float = 256.0,
        backend: str | None = None,
        retain_decay: float | None = None,
        one_copy: bool = False,
    ) -> None:
        check_backend(backend)
        check_bool("one_copy", one_copy)
        if retain_decay is not None and not 0.0 < non_negative("retain_decay", retain_decay) < 1.0:
            raise ValueError(
                f"Parameter `retain_decay` should be None or between 0 and 1. Found {retain_decay}."
            )
        if one_copy and retain_decay is not None:
            raise ValueError(
                "Parameter `retain_decay` should be None with `one_copy`, because there are no retain "
                f"accumulators. Found {retain_decay}."
            )
        if accumulation not in ("sum", "mean"):
            raise ValueError(f"Parameter `accumulation` should be 'sum' or 'mean'. Found {accumulation!r}.")
        check_accumulate_dtype(accumulate_dtype)
        if not non_negative("bucket_cap_mb", bucket_cap_mb, finite=False) > 0.0:
            raise ValueError(f"Parameter `bucket_cap_mb` should be positive. Found {bucket_cap_mb}.")
        engine = find_engine(params)
        source = params if engine is None else engine.module
        if isinstance(source, torch.nn.Module):
            fsdp.reshard(source)  # a forward without a backward leaves parameters unsharded
        chosen = choose(source, groups, None if engine is None else engine.wanted)
        capacity = bucket_cap_mb * 2**20
        opened = open_host(engine, source, chosen, accumulate_dtype, capacity, one_copy)
        self._params, self._grouped = chosen.tensors, groups is not None
        self._forget, self._retain = opened.forget, opened.retain
        if retain_decay is not None:
            if engine is not None and engine.scaled:
                raise ValueError(
                    "Parameter `retain_decay` should be None where DeepSpeed scales losses, because the mean "
                    f"would have gradients of several scales. Found {retain_decay}. Train in bfloat16."
                )
            self._retain = RunningMean(self._retain, self._params, retain_decay)
        self._forget.mean = self._retain.mean = accumulation == "mean"
        # DeepSpeed's engine has all parameters of its module.
        others = Others((), ()) if engine is not None else Others(self._params, opened.sharded)
        self._registrations = others.registrations
        self._window = Window(chosen.names, self._params, others, opened.host, self._forget, self._retain)
        self._data_parallel, self._shards = opened.data_parallel, opened.shards
        self._checked_at = -1  # the number of the last registration before the last search of `_check_around`
        self._engine = engine
        if engine is not None:
            # The buckets may be dropped in the middle of a window.
            weakref.finalize(self._window, _release, weakref.ref(engine))
        # A running mean is kept, and fresh gradients are not. The update is written over forget then.
        written = self._forget if self._retain.keeps or self._retain.fresh else self._retain
        self._updates = list(written.views)
        self._backends = {v.device: choose_backend(backend, v.device) for v in self._retain.views}
        apart = [i for i, v in enumerate(self._retain.views) if v.dtype != opened.dtypes[i]]
        like = [self._retain.views[i] for i in apart]
        updates = flatten(like, [opened.dtypes[i] for i in apart], capacity)
        for i, view in zip(apart, updates.views, strict=True):
            self._updates[i] = view
        self._published = Exposed(self._updates, self._params)
        buffers = [*self._forget.buffers, *self._retain.buffers, *updates.buffers]
        self.dtypes = frozenset(v.dtype for v in self._forget.views)
        self.nbytes: int = sum(buffer.nbytes for buffer in buffers)
        self._memory = RuleMemory(next(iter(self._backends)))
        sizes = [p.numel() for p in self._params] if self._shards is None else self._shards.numel
        self._pipelines = Pipelines(
            keys=chosen.keys,
            grouped=self._grouped,
            forget=self._forget,
            retain=self._retain,
            updates=self._updates,
            written=written,
            in_place=not apart and not opened.padded,
            sizes=sizes,
            shards=self._shards,
            backends=self._backends,
        )
        # The sizes of whole gradients, so that all ranks synthesize the same gradients together.
        self._sizes = [n * v.element_size() for n, v in zip(sizes, self._forget.views, strict=True)]
        self._reduction: Reduction | None = None
        if opened.data_parallel is not None or opened.shards is not None:
            self._reduction = Reduction(
                self._window,
                opened.data_parallel,
                opened.shards,
                by_engine=engine is not None,
                devices=self._backends,
            )
        if self._data_parallel is not None:
            self._data_parallel.start()
            watch_reduction(self._window, self._data_parallel.modules)

    def forget(self) -> AbstractContextManager[None]:
        """Backwards inside `with buckets.forget():` accumulate the forget gradient, as minimised."""
        self._check_around()
        return self._window.capture(self._forget)

    def retain(self) -> AbstractContextManager[None]:
        """Backwards inside `with buckets.retain():` accumulate the retain gradient."""
        if self._retain.fresh:
            raise _no_accumulators("retain")
        self._check_around()
        return self._window.capture(self._retain)

    @property
    def forget_grads(self) -> list[Tensor | None]:
        """The forget gradients of the closed captures, one for each parameter; None if it was not reached."""
        return _aliases(self._forget)

    @property
    def retain_grads(self) -> list[Tensor | None]:
        """The retain gradients of the closed captures, one for each parameter; None if it was not reached.

        With `retain_decay` they are weighted sums over windows. The mean is such a sum, divided by a number.
        """
        return _aliases(self._retain)

    def synthesize_(
        self,
        rule: str | Rule = "sago",
        gamma: Weight = 1.0,
        alpha: Weight = 1.0,
        max_norm: float | None = None,
        nonfinite: Literal["propagate", "zero_update"] = "propagate",
        eps: float = 0.0,
        stats: bool = True,
        reduce_gram: ReduceGram | None = None,
        retain_floor: float = 0.0,
    ) -> SynthesisReport:
        """Sets `p.grad` of every parameter to the update that `sago.synthesize_` gives, and ends the window.

        Both gradients are used up. On one rank nothing is read back from the device. Several ranks compare
        what they reached and their arguments, unless a CUDA graph is captured. Memory and layout were checked
        when the buckets were made.

        Args:
            rule, gamma, alpha, eps, stats, reduce_gram, retain_floor: As in `sago.synthesize_`.
            max_norm: Clips the update as `torch.nn.utils.clip_grad_norm_(params, max_norm)` would, except
                that a norm that is not finite makes the whole update NaN. `report.total_norm` is the norm
                before clipping. The norm follows from the inner products, so the update is not read for it.
                An elementwise rule reads its gradients once more for the products. If the gradients nearly
                cancel, the norm has the error of the sums, about 3e-4 of their norms.
            nonfinite: "propagate" makes an element of the update NaN if the element of either gradient is NaN
                or inf, even if the rule leaves it out, so that `torch.amp.GradScaler` finds it.
                "zero_update" makes the whole update 0 if any element of a gradient, a coefficient or the norm
                is NaN or inf. This is decided on the device, and the report has the counts. Do not use
                "zero_update" with GradScaler, which would never lower its scale.

        Returns:
            The report. Its statistics are those of the update before clipping.

        Raises:
            ValueError, TypeError: For invalid arguments, and unless both sides are captured, all captures are
                closed and no backward ran outside of them.
        """
        refuse_transforms()
        if self._retain.fresh:
            raise _no_accumulators("synthesize_")
        self._window.check_ready(self._forget, self._retain)
        rule = resolve(rule)
        if self._retain.keeps:
            self._check_mean(rule)
        state, draw = self._remembered(rule) if rule.state or rule.seed is not None else (None, None)
        call = check_call(
            rule,
            gamma,
            alpha,
            eps,
            stats,
            reduce_gram,
            self._backends,
            max_norm,
            _policy(nonfinite),
            self._scales(self._retain.captures),
            state,
            draw,
            retain_floor,
        )
        self._check_unscaled(call)
        if self._reduction is not None:
            self._reduction.reduce(call)
        pipeline = self._pipelines.of(call)
        try:
            found = pipeline.synthesize(call, self._window.begin)
            if call.draw is not None:
                call.draw[1] += 1
            self._publish()
        except BaseException as error:
            self._window.abandon(error)
            raise
        return found

    @contextmanager
    def synthesize_in_backward(
        self,
        rule: str | Rule = "sago",
        gamma: Weight = 1.0,
        alpha: Weight = 1.0,
        eps: float = 0.0,
        stats: bool = True,
        on_update: Callable[[Tensor], object] | None = None,
        retain_floor: float = 0.0,
    ) -> Iterator[InBackward]:
        """Combines the last retain capture with `synthesize_`: the backward itself writes the updates.

            with buckets.synthesize_in_backward(rule="sago") as step:
                retain_loss.backward()
            step.report.summary()

        A hook writes the update of a flat buffer as soon as all of its retain gradients are complete. With
        `one_copy`, it does so for each gradient, or for some small ones together, and drops the retain
        gradient. The result has the bits of `synthesize_`, except that on several ranks the last bits of sums
        may differ. The block must contain one backward, the last one of the window, and the forget gradient
        must be complete before it. Non-finite gradients propagate. "zero_update" needs the whole gradient
        first, so only `synthesize_` has it. Clip after the block.

        Args:
            rule, gamma, alpha, eps, stats, retain_floor: As in `sago.synthesize_`.
            on_update: A function that is called with each parameter as soon as its update is written, under
                `torch.no_grad`. During the call, `p.grad` is the update, so that an optimizer of this
                parameter can step. After the call and after the block, `p.grad` is None. An error inside the
                block then leaves some parameters with a step and others without.

        Raises:
            ValueError: If the result would not be exact: for rules of global scope, for groups that lie in
                several buffers, for parameters on several devices, and, except for `one_copy` with FSDP2, if
                torch.distributed has several ranks, because gradients are reduced over them after the hook.
                If a gradient arrives a second time, because of a second backward or of reentrant
                checkpointing, the window is lost.
        """
        refuse_transforms()
        window, retain = self._window, self._retain
        if on_update is not None and not callable(on_update):
            raise TypeError(
                f"Parameter `on_update` should be None or a function. Found {type(on_update).__name__}."
            )
        if on_update is not None and self._engine is not None:
            raise ValueError(
                "Parameter `on_update` should be None with DeepSpeed, whose engine steps. Found "
                f"{on_update!r}. Call engine.step() after the block."
            )
        window.check_ready(self._forget)
        if retain.empty:
            retain.clear()  # before its weight is read, as the capture would do
        rule = resolve(rule)
        if self._retain.keeps:
            self._check_mean(rule)
        state, draw = self._remembered(rule) if rule.state or rule.seed is not None else (None, None)
        call = check_call(
            rule,
            gamma,
            alpha,
            eps,
            stats,
            None,
            self._backends,
            nonfinite="propagate",
            scales=self._scales(retain.captures + 1),
            state=state,
            draw=draw,
            retain_floor=retain_floor,
        )
        rows, keys = of_rows = self._pipelines.rows(call.rule)
        expected = [p.requires_grad for p in self._params]
        members: dict[int, list[int]] = {}
        if isinstance(retain, FreshGradients):
            unit = rows if call.by_row else list(range(len(rows)))
            for i, u in enumerate(unit):
                members.setdefault(u, []).append(i)
            sizes = {u: sum(self._sizes[i] for i in found) for u, found in members.items()}
            # This is small compared with the largest gradient, for which memory is needed anyway, or with
            # all gradients.
            limit = min(max(max(self._sizes) // 16, sum(self._sizes) // 100), _WAITING)
            forget = self._forget.present(self._forget.views)
            pipeline_of = partial(self._pipelines.of_fresh, of_rows, forget, retain, members)
        else:
            unit, sizes, limit = retain.owner, dict.fromkeys(retain.owner, 0), 0
            members = {b: found for b, found in self._pipelines.positions.items() if b is not None}
            pipeline_of = partial(self._pipelines.of_buffer, call)
        sharded = retain.fresh and self._shards is not None
        check_exact(call, rows, keys, unit, list(self._backends), sharded)
        if self._reduction is not None:
            self._reduction.check(call, retain.captures + 1)
        if self._shards is not None and draw is not None and None in self._shards.offsets:
            raise ValueError(
                "Parameters should be sharded along their first dimension for a rule with a random gate, "
                f"whose numbers depend on the positions of elements. Found {rule.name!r}."
            )
        written = partial(self._lend, on_update, members)
        arguments = unit, expected, sizes, limit, pipeline_of, window.begin, written
        step = InBackward(call, keys, window.names, *arguments)
        with window.updating():
            with window.capture(retain, step.arrived):
                yield step
            if self._reduction is not None:
                self._reduction.check_reached()
            step.finish()
            if call.draw is not None:
                call.draw[1] += 1
            self._publish(used=on_update is not None)

    def unscale_(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """`scaler.unscale_(optimizer)` for both gradients, before `synthesize_`.

        `max_norm` and `eps` need unscaled gradients. Without them `scaler.step` can do the unscaling after
        the synthesis. This is one pass over both gradients, in place. The optimizer's parameters that are not
        in these buckets are unscaled in their `p.grad`. With several optimizers, call it once for each. torch
        refuses fp16 gradients here: accumulate them in fp32. The scaler inspects the accumulators. It does
        not notice an fp16 update that overflows only when it is stored (a gradient beyond 65504 after
        unscaling).

        Scale both losses with one GradScaler and one scale. Different scales would act as different weights,
        which the buckets cannot notice.

        Raises:
            ValueError: If the gradients are already unscaled, or if `synthesize_` could not be called now.
        """
        if self._retain.fresh:
            raise _no_accumulators("unscale_")
        self._window.check_ready(self._forget, self._retain)
        if isinstance(self._retain, RunningMean):
            raise ValueError(
                "unscale_ should not be called with `retain_decay`, because the mean has gradients of other "
                "loss scales. Train in bfloat16 or float32, without a GradScaler."
            )
        if self._engine is not None:
            raise ValueError(
                "unscale_ should not be called with DeepSpeed, which unscales in engine.step(). Remove the "
                "call."
            )
        optimizer = _unwrapped(optimizer)
        for name, x, wanted in (
            ("scaler", scaler, torch.amp.GradScaler),
            ("optimizer", optimizer, torch.optim.Optimizer),
        ):
            if not isinstance(x, wanted):
                raise TypeError(
                    f"Parameter `{name}` should be a torch {wanted.__name__}. Found {type(x).__name__}."
                )
        index = {id(p): i for i, p in enumerate(self._params)}
        given = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._window.check_scaled(index[key] for key in given if key in index)
        if self._reduction is not None:
            self._reduction.reduce(None)
        forget, retain = (side.present(side.grads) for side in (self._forget, self._retain))
        found: list[int] = []
        gradients: list[Tensor | None] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                i = index.get(id(p))
                if i is None:
                    gradients.append(p.grad)
                else:
                    found.append(i)
                    gradients += [forget[i], retain[i]]
        holders = []
        for g in gradients:
            if g is not None:
                shape = dtensor.local(g).shape
                like = torch.empty((), dtype=g.dtype, device=g.device).expand(shape)
                holder = dtensor.wrap(like, g)
                holder.grad = g
                holders.append(holder)
        groups = optimizer.param_groups
        optimizer.param_groups = [{"params": holders}]
        try:
            with self._window.unscaling(found):
                scaler.unscale_(optimizer)
        finally:
            optimizer.param_groups = groups

    def zero_(self) -> None:
        """Drops both gradients and the update: sets `p.grad` to None and the accumulators to zero.

        With `retain_decay`, a complete retain gradient stays a part of the mean, because it cannot be taken
        out again. If its window was not synthesized, a RuntimeWarning says so. An incomplete one ends the
        mean, which begins again.

        It also ends a window whose backward failed. After `optimizer.zero_grad(set_to_none=True)` instead,
        the next captures clear the accumulators. `zero_` does not warn about a window that was not
        synthesized, because the caller may have needed only its gradients.
        """
        self._window.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns the mean, and the memory of rules, for a checkpoint.

        Returns:
            A dict with "retain_mean", the accumulator of each parameter by its name; "retain_weight", the
            number by which they are divided; "rules", the numbers that rules keep, fp64 `[groups, n]`, by the
            name of the rule; and "draws", the seed and the step of rules with a random gate. Without
            `retain_decay` it holds nothing of the size of a gradient. The tensors are those that the buckets
            use, not copies, and DTensors if the parameters are DTensors.

        Raises:
            ValueError: If a window has begun and was not synthesized, or if two parameters have one name.
        """
        self._window.check_between("state_dict")
        found: dict[str, Any] = {"retain_mean": {}, "retain_weight": 0.0, **self._memory.state_dict()}
        if isinstance(self._retain, RunningMean):
            found.update(self._retain.saved(self._window.names))
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, also in other buckets of the same parameters.

        The mean is copied into the accumulators, and converted to their dtype. On several ranks, every rank
        should load its state.

        Raises:
            ValueError, TypeError: If the state does not fit the parameters, or if a window has begun. Nothing
                is changed then.
        """
        self._window.check_between("load_state_dict")
        keys = {"retain_mean", "retain_weight", "rules", "draws"}
        if not isinstance(state, Mapping) or set(state) != keys:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"Parameter `state` should be a dict with the keys {sorted(keys)}. Found {found}."
            )
        check_memory(state)
        mean, weight = state["retain_mean"], state["retain_weight"]
        shards = shards_of(mean, weight, self._window.names, self._retain)
        if isinstance(self._retain, RunningMean):
            self._retain.restore(shards, float(weight))
        self._memory.load_state_dict(state["rules"], state["draws"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "GradientBuckets should not be copied or pickled, because a copy would allocate two more "
            "gradients: keep them beside the module, not inside of it, as an optimizer is kept, and make new "
            "ones for a copy of the module."
        )

    def __repr__(self) -> str:
        return (
            f"GradientBuckets({len(self._params)} parameters, {len(self._forget.buffers)} buffers a side, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def _check_around(self) -> None:
        """Checks before a capture. Live objects are searched only if a module was registered meanwhile."""
        if self._data_parallel is not None:
            self._data_parallel.check()
        latest = self._registrations.latest()
        if self._engine is not None or self._checked_at >= latest:
            return
        if self._data_parallel is None:
            ddp.check_not_wrapped(self._params)
        if self._checked_at < 0:  # it warns once
            check_hooks(self._window.names, self._params)
        self._checked_at = latest

    def _scales(self, retain_captures: int) -> tuple[float, float]:
        if not self._forget.mean and not self._retain.keeps:
            return 1.0, 1.0
        return 1 / self._forget.weight(self._forget.captures), 1 / self._retain.weight(retain_captures)

    def _check_mean(self, rule: Rule) -> None:
        """Raises if a rule or a capture of a CUDA graph does not go with a running mean."""
        if not rule.by_sign:
            raise ValueError(
                "Parameter `rule` should have a gate that only reads signs for buckets with `retain_decay`, "
                f"whose accumulators are weighted sums. Found {rule.name!r}. Make the buckets without "
                "`retain_decay`, or choose another rule."
            )
        if is_capturing(self._backends):
            raise ValueError(
                "`retain_decay` should be None where a CUDA graph captures a synthesis, because the host "
                "counts the weights of the mean. Found a capture."
            )

    def _remembered(self, rule: Rule) -> tuple[Tensor | None, Tensor | None]:
        """The numbers that the rule keeps, and the seed and the step of its random gate."""
        return self._memory.state(rule, self._pipelines.rows(rule)[1]), self._memory.draw(rule)

    def _check_unscaled(self, call: Call) -> None:
        """Raises if a sum would mix scaled and unscaled gradients, or if eps is added to scaled ones."""
        if self._engine is not None and self._engine.scaled and (call.max_norm is not None or call.eps):
            raise ValueError(
                "`max_norm` and `eps` should be left out where DeepSpeed scales losses, because they apply "
                f"to unscaled gradients. Found max_norm={call.max_norm}, eps={call.eps}. To clip the update, "
                "set `gradient_clipping` in the configuration of DeepSpeed."
            )
        unscaled = self._window.unscaled
        if not unscaled or not (call.limited or call.eps or self._grouped or call.rule.scope == "global"):
            return
        for i, (f, r) in enumerate(zip(self._forget.touched, self._retain.touched, strict=True)):
            if (f or r) and i not in unscaled:
                raise ValueError(
                    "All gradients should be unscaled, or none. Found that those of "
                    f"`{self._window.names[i]}` are not: call unscale_ for each optimizer."
                )

    def _lend(
        self,
        on_update: Callable[[Tensor], object] | None,
        members: Mapping[int, list[int]],
        units: Sequence[int],
    ) -> None:
        """Calls `on_update` with the parameters of these units, whose updates have just been written."""
        if on_update is None:
            return
        retain = self._retain.reached if self._retain.keeps else self._retain.touched
        for i in (i for u in units for i in members[u]):
            if self._forget.touched[i] or retain[i]:
                p = self._params[i]
                with torch.no_grad(), self._window.lending(p, self._published.grads[i]):
                    on_update(p)

    def _publish(self, used: bool = False) -> None:
        """Makes the updates `p.grad`, unless an optimizer has used them already, and ends the window."""
        retain = self._retain.reached if self._retain.keeps else self._retain.touched
        written = [f or r for f, r in zip(self._forget.touched, retain, strict=True)]
        count_versions([u for u, w in zip(self._updates, written, strict=True) if w])
        self._published.renew()
        grads = zip(self._published.grads, written, strict=True)
        self._window.publish([u if w and not used else None for u, w in grads])


def _release(ref: weakref.ref[Engine]) -> None:
    engine = ref()  # it is alive as long as methods of the engine are replaced
    if engine is not None:
        engine.release()


def _aliases(side: Side) -> list[Tensor | None]:
    """New tensors over the gradients that are present."""
    return [None if g is None else g.detach() for g in side.present(side.grads)]


def _no_accumulators(method: str) -> ValueError:
    return ValueError(
        f"{method} should not be called with `one_copy`, because there are no retain accumulators. Run the "
        "retain backward within synthesize_in_backward, or make the buckets without `one_copy`."
    )


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of wrappers. accelerate gives it to `scaler.step`, which knows it by its identity.

    If the wrapper were unscaled in its place, the scaler would divide the gradients a second time.
    """
    while True:
        if any(kind.__module__.partition(".")[0] == "accelerate" for kind in type(optimizer).__mro__):
            require(optimizer, ["optimizer"], "accelerate", "accelerate 0.34 to 1.15")
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            return optimizer
        optimizer = inner


def _policy(nonfinite: Any) -> str:
    if nonfinite is None:
        raise ValueError("Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found None.")
    return nonfinite
