"""`GradientBuckets`: the two gradients of a training step, and the update in their place."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sago.backends.choose import check_backend, choose_backend
from sago.backends.streams import Cache, is_capturing
from sago.capture.flat import flatten
from sago.capture.opening import find_engine, open_host
from sago.capture.others import Others
from sago.capture.parameters import choose
from sago.capture.streamed import InBackward, check_exact
from sago.capture.window import State, Window
from sago.core.checks import ReduceGram, check_call, check_groups, non_negative
from sago.core.pairs import Call, Pairs, Weight
from sago.core.pipeline import Pipeline, count_versions
from sago.core.report import SynthesisReport
from sago.ranks import ddp as data_parallel
from sago.ranks import dtensor as shards
from sago.ranks.dtensor import Shards
from sago.rules import Rule

_PATTERNS = 8  # of parameters without a gradient, whose pipelines are kept


class GradientBuckets:
    """The forget and the retain gradient of a model, accumulated apart and synthesized in place.

        buckets = sago.GradientBuckets(model.named_parameters())
        with buckets.forget():
            forget_loss.backward()
        with buckets.retain():
            retain_loss.backward()
        report = buckets.synthesize_(rule="sago", gamma=1.0, alpha=1.0, max_norm=1.0)
        optimizer.step()
        buckets.zero_()

    Within `forget()` and `retain()`, `p.grad` is the accumulator of that side, and autograd itself adds to
    it. Outside it is None, until `synthesize_` writes the update over the retain gradient and makes that
    `p.grad`. The accumulators are two flat copies of the gradients, allocated here; no other memory of that
    size is. After `zero_` there is nothing in them: no checkpoint needs them. A CUDA graph that has captured
    a synthesis needs the buckets alive.

    A window is what lies between two updates: captures of both sides, in any order and number, nested or
    not, each with any number of backwards. A parameter that no backward of a side reaches has no gradient
    there, like None in `sago.synthesize_`; one that neither side reaches has None in `p.grad` afterwards, as
    in any training.

    Within a capture, what foreign code writes to `p.grad` counts as a gradient, zeros too. Only
    `zero_grad(set_to_none=True)` is told apart: it drops what the side has so far (not with
    `accumulate_dtype`, where `p.grad` is never the accumulator).

    Args:
        params: A module, `model.parameters()` or `model.named_parameters()`, or a DeepSpeed engine. Frozen
            parameters among them are left alone, one that is given twice counts once. The others are dense
            leaves in bf16, fp16, fp32 or fp64, with dense gradients: the first capture of a side refuses
            sparse ones.
        groups: One hashable for each of `params`, as in `sago.synthesize_`. By default every parameter is a
            group, called by its name, or by its position in `params` where there are no names.
        accumulate_dtype: `torch.float32` or `torch.float64`: narrower gradients are accumulated in it, by a
            hook in the place of autograd's addition. A bf16 parameter then costs 4 + 4 + 2 bytes an element,
            for the accumulators and the update, instead of 2 + 2.
        accumulation: Whether the gradient of a side is the "sum" over its captures or their "mean". The
            division costs no pass: it is in the coefficients.
        bucket_cap_mb: MiB that a flat buffer has at most; a larger tensor has a buffer of its own.
        backend: As in `sago.synthesize_`.

    On several ranks: DTensor parameters (FSDP2, HSDP, tensor parallel) are captured and synthesized shard by
    shard. The gradients of a DistributedDataParallel module are averaged over its ranks once a window, in the
    flat accumulators, at the start of `synthesize_` or `unscale_`; its own reduction, which would miss the
    second of two backwards, is switched off here for good. Make the buckets after the model was wrapped and
    before the first forward.

    Of a DeepSpeed engine at ZeRO stage 3 the partitions are captured and synthesized; one at stage 0 is as
    DDP. `engine.backward(loss)` belongs in the captures, `engine.step()` behind `synthesize_`; within
    captures it does nothing, because the backward of accelerate calls it.

    Freeze the trained parameters of the same modules that are not given: a backward in a capture that reaches
    one is an error, because its own gradient would be the sum of both sides. Parameters that other buckets
    capture at the same time are exempt. Before the first capture, all live modules are searched once for such
    parameters. Those that belong to no module, or to one that `gc.freeze` hides, are not found.

    Where DTensors are sharded, the ranks compare once a window which parameters were reached, and raise where
    one was reached on some ranks only. The host waits for that.

    A step of an optimizer that holds a captured parameter is an error within a capture, where `p.grad` is the
    gradient of one side. Between a capture and `synthesize_` it finds no gradients, and a RuntimeWarning says
    so once.

    Buckets cannot be copied or pickled: keep them beside the module, not inside of it, as an optimizer is.

    A parameter that is frozen later has no gradient from then on. One that is unfrozen, moved, cast or
    resized, and, if a module is given, one that is added to it, is an error in the next window: make new
    buckets then.

    Attributes:
        nbytes: Of all buffers.

    Raises:
        ValueError, TypeError: For parameters that cannot be right; in methods, for calls that cannot be.
            Nothing has been written then, and no gradient is lost.

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
    ) -> None:
        check_backend(backend)
        if accumulation not in ("sum", "mean"):
            raise ValueError(f"Parameter `accumulation` should be 'sum' or 'mean'. Found {accumulation!r}.")
        if accumulate_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"Parameter `accumulate_dtype` should be None, float32 or float64. Found {accumulate_dtype}."
            )
        if not non_negative("bucket_cap_mb", bucket_cap_mb, finite=False) > 0.0:
            raise ValueError(f"Parameter `bucket_cap_mb` should be positive. Found {bucket_cap_mb}.")
        engine = find_engine(params)
        source = params if engine is None else engine.module
        chosen = choose(source, groups, None if engine is None else engine.wanted)
        capacity = bucket_cap_mb * 2**20
        opened = open_host(engine, source, chosen, accumulate_dtype, capacity)
        self._params, self._keys = chosen.tensors, chosen.keys
        self._grouped = groups is not None
        self._mean = accumulation == "mean"
        self._forget, self._retain = opened.forget, opened.retain
        self._window = Window(chosen.names, self._params, opened.host, self._forget, self._retain)
        self._ranks, self._shards = opened.ranks, opened.shards
        self._looked = engine is not None  # for DDP that came later, and for parameters that were not given
        self._sharded = opened.sharded
        self._engine = engine
        self._updates, self._update_grads = list(self._retain.views), list(self._retain.grads)
        self._backends = {v.device: choose_backend(backend, v.device) for v in self._retain.views}
        apart = [i for i, v in enumerate(self._retain.views) if v.dtype != opened.dtypes[i]]
        like = [self._retain.views[i] for i in apart]
        updates = flatten(like, [opened.dtypes[i] for i in apart], capacity)
        for i, view in zip(apart, updates.views, strict=True):
            self._updates[i], self._update_grads[i] = view, shards.wrap(view, self._params[i])
        self._in_place = not apart and not opened.padded
        buffers = [*self._forget.buffers, *self._retain.buffers, *updates.buffers]
        self.nbytes: int = sum(buffer.nbytes for buffer in buffers)
        everything: list[int | None] = [None, *range(len(self._retain.buffers))]
        owner = self._retain.owner
        self._members = {b: [i for i, o in enumerate(owner) if b is None or o == b] for b in everything}
        self._pipelines = {b: Cache(_PATTERNS) for b in everything}
        if self._ranks is not None:
            self._ranks.start()

    def forget(self) -> AbstractContextManager[None]:
        """Backwards within `with buckets.forget():` accumulate the forget gradient, as minimised."""
        self._check_around()
        return self._window.capture(self._forget)

    def retain(self) -> AbstractContextManager[None]:
        """Backwards within `with buckets.retain():` accumulate the retain gradient."""
        self._check_around()
        return self._window.capture(self._retain)

    @property
    def forget_grads(self) -> list[Tensor | None]:
        """The sums over the window's closed captures, one a parameter; None where no backward came."""
        return self._forget.present(self._forget.grads)

    @property
    def retain_grads(self) -> list[Tensor | None]:
        """The sums over the window's closed captures, one a parameter; None where no backward came."""
        return self._retain.present(self._retain.grads)

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
    ) -> SynthesisReport:
        """`p.grad = u` for every parameter, `u` as `sago.synthesize_` writes it into the retain gradient.

        Nothing is read back from the device, except that the ranks of sharded DTensors compare which
        parameters they reached (not while a CUDA graph is captured). Checks of memory and layout were done
        when the buckets were made. The window ends: both gradients are used up.

        Args:
            rule, gamma, alpha, eps, stats, reduce_gram: As in `sago.synthesize_`.
            max_norm: Clips as `torch.nn.utils.clip_grad_norm_(params, max_norm)` would afterwards, except
                that a norm that is not finite makes the whole update NaN. `report.total_norm` is the norm
                before it was clipped. It follows from the inner products, so nothing is read or written
                twice for it; an elementwise rule then reads its gradients once more, for the products. Where
                the gradients all but cancel, the norm has the error of the sums, about 3e-4 of their norms.
            nonfinite: "propagate": an element of the update is NaN where that of either gradient is NaN or
                inf, even if the rule would have left it out, so that `torch.amp.GradScaler` finds it.
                "zero_update": the update is 0 everywhere if any element of a gradient is NaN or inf, or a
                coefficient or the norm to clip is; decided on the device, and counted in the report. A loss
                scale would never be lowered then: not for use with GradScaler.

        Returns:
            The statistics, of the update before it was clipped.

        Raises:
            ValueError, TypeError: For arguments that cannot be right, and unless both sides have been
                captured, all captures are closed and no backward ran outside of them.
        """
        self._window.check_ready(self._forget, self._retain)
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
        )
        self._check_unscaled(call)
        self._meet()
        pipeline = self._pipeline(call)
        try:
            found = pipeline.synthesize(call)
        except BaseException as error:
            if pipeline.writing:
                self._window.fail(f"a synthesis ended in {error!r}")
            raise
        self._finish()
        return found

    @contextmanager
    def synthesize_in_backward(
        self,
        rule: str | Rule = "sago",
        gamma: Weight = 1.0,
        alpha: Weight = 1.0,
        eps: float = 0.0,
        stats: bool = True,
    ) -> Iterator[InBackward]:
        """The last retain capture and `synthesize_` in one: buckets are synthesized while backward runs.

            with buckets.synthesize_in_backward(rule="sago") as step:
                retain_loss.backward()
            step.report.summary()

        As soon as all retain gradients of a flat buffer have arrived, its update is written, in a hook. The
        result is that of `synthesize_`, bit for bit. There has to be one backward in the block, the last of
        the window; forget has to be complete. Non-finite gradients propagate. Clipping and "zero_update"
        need the whole gradient first, so they are left to `synthesize_`.

        Raises:
            ValueError: Where it would not be exact: for rules of global scope and groups that lie in several
                buffers; with parameters on several devices; where torch.distributed has several ranks,
                because gradients are reduced over them after the hook; if a gradient arrives a second time,
                because of a second backward or of reentrant checkpointing: the window is lost then.
        """
        window, retain = self._window, self._retain
        window.check_ready(self._forget)
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
        )
        rows, keys = self._rows(call.rule)
        check_exact(call, rows, keys, retain.owner, list(self._backends))
        expected = [p.requires_grad for p in self._params]
        step = InBackward(
            call, keys, window.names, retain.owner, expected, lambda bucket: self._pipeline(call, bucket)
        )
        with window.capture(retain, step.arrived):
            yield step
        try:
            step.finish()
        except BaseException as error:
            window.fail(f"a synthesis ended in {error!r}")
            raise
        self._finish()

    def unscale_(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """`scaler.unscale_(optimizer)` of both gradients, ahead of `synthesize_`.

        Needed for `max_norm` and `eps`, which mean unscaled gradients; without them unscaling may as well be
        left to `scaler.step`, after the synthesis. One pass over both gradients, in place. Parameters of the
        optimizer that are not in these buckets are unscaled in their `p.grad`, as ever; with several
        optimizers, call it for each. fp16 gradients are refused by torch: accumulate them in fp32. What the
        scaler looks at are the accumulators: an fp16 update that overflows only when it is stored (a gradient
        beyond 65504 after unscaling) is not noticed.

        Both losses have to be scaled by one GradScaler, with one scale: other scales for the two sides are
        other weights, which is not noticed. Gradients that are unscaled already are a ValueError.
        """
        self._window.check_ready(self._forget, self._retain)
        if self._engine is not None:
            raise ValueError("unscale_ should not be called with DeepSpeed, which unscales in engine.step().")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # that accelerate wraps, and that scaler.step gets
        index = {id(p): i for i, p in enumerate(self._params)}
        given = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._window.check_scaled(index[key] for key in given if key in index)
        self._meet()
        forget, retain = self.forget_grads, self.retain_grads
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
                part = shards.local(g)
                like = torch.empty((), dtype=g.dtype, device=g.device).expand(part.shape)
                holder = shards.wrap(like, g)
                holder.grad = g
                holders.append(holder)
        groups = optimizer.param_groups
        optimizer.param_groups = [{"params": holders}]
        try:
            scaler.unscale_(optimizer)
        finally:
            optimizer.param_groups = groups
        self._window.note_unscaled(found)

    def zero_(self) -> None:
        """Forgets both gradients and the update: `p.grad` is None, the accumulators are zero.

        Also the way out of a window whose backward failed. After `optimizer.zero_grad(set_to_none=True)`
        in its place the accumulators are cleared by the next captures. `zero_` does not warn about a window
        that was not synthesized, because the caller may have needed only its gradients.
        """
        self._window.zero_()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "GradientBuckets should not be copied or pickled, because a copy would allocate two more "
            "gradients: keep them beside the module, not inside of it, as an optimizer is kept, and make new "
            "ones for a copy of the module."
        )

    def __repr__(self) -> str:
        return (
            f"GradientBuckets({len(self._params)} parameters, {len(self._retain.buffers)} buffers a side, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def _check_around(self) -> None:
        """Before a capture. Living objects are looked through before the first one only."""
        if self._ranks is not None:
            self._ranks.check_not_joined()
        if self._looked:
            return
        if self._ranks is None:
            data_parallel.check_not_wrapped(self._params)
        self._window.others = Others(self._params, self._sharded)
        self._looked = True

    def _meet(self) -> None:
        """Compares and averages over the ranks, once a window, before the synthesis."""
        if self._shards is not None and self._engine is None:
            self._check_agreed(self._shards)
        self._average()

    def _check_agreed(self, spread: Shards) -> None:
        """Raises on every rank where a backward reached a parameter on some ranks only."""
        device = self._retain.views[0].device
        if self._window.agreed or is_capturing(self._backends):
            return
        spread.over.check_same(spread.layout, device)
        sides = self._forget, self._retain
        same = spread.over.agree([t for side in sides for t in side.touched], device)
        if not all(same):
            side, i = divmod(same.index(False), len(self._params))
            name, found = sides[side].name, self._window.names[i]
            self._window.fail(f"{name} backwards reached `{found}` on some ranks only")
            raise ValueError(
                f"Parameter `{found}` should be reached by {name} backwards on every rank or on none, as "
                "the ranks reduce their gradients together. Found that some ranks only reached it, so that "
                "gradients may be mixed: on the other ranks, add 0 times what it computes to the loss."
            )
        self._window.agreed = True

    def _average(self) -> None:
        """Over the ranks of DistributedDataParallel."""
        if self._ranks is None or self._window.state is not State.CAPTURING:
            return
        sides = self._forget, self._retain
        trained = [p.requires_grad for p in self._params]
        self._ranks.check_reached(sides, self._window.names, trained)
        try:
            self._ranks.average(sides, trained)
        except BaseException as error:
            self._window.fail(f"the average over the ranks ended in {error!r}")
            raise
        self._window.state = State.REDUCED

    def _scales(self, retain_captures: int) -> tuple[float, float]:
        return (1 / self._forget.captures, 1 / retain_captures) if self._mean else (1.0, 1.0)

    def _rows(self, rule: Rule) -> tuple[list[int], list[Hashable]]:
        grouped = self._grouped or rule.scope != "global"
        return check_groups(self._keys if grouped else None, len(self._keys), rule)

    def _pipeline(self, call: Call, bucket: int | None = None) -> Pipeline:
        """The pipeline of a bucket or of all, for the gradients that there are in this window."""
        members = self._members[bucket]
        forget, retain = self._forget.touched, self._retain.touched
        if bucket is not None:
            forget, retain = [forget[i] for i in members], [retain[i] for i in members]
        one_row = call.rule.scope == "global" and not self._grouped
        no_rows = call.rule.scope == "element" and call.sums == 0
        # Where parameters need no rows of their own, a buffer is as good as the parameters in it.
        whole = (one_row or no_rows) and self._in_place and all(forget) and all(retain)
        if self._shards is not None and not no_rows:
            whole = whole and all(self._shards.counted)
        key = one_row, whole, tuple(forget), tuple(retain)
        return self._pipelines[bucket].get(
            key, self._backends, lambda: self._new_pipeline(call.rule, members, whole)
        )

    def _new_pipeline(self, rule: Rule, members: Sequence[int], whole: bool) -> Pipeline:
        rows, keys = self._rows(rule)
        forget, retain = (
            [side.present(side.views)[i] for i in members] for side in (self._forget, self._retain)
        )
        neither = [f is None and r is None for f, r in zip(forget, retain, strict=True)]
        updates = [None if n else self._updates[i] for i, n in zip(members, neither, strict=True)]
        devices = {self._retain.views[i].device for i in members}
        pairs = Pairs(
            forget,
            retain,
            updates,
            updates,
            rows=[rows[i] for i in members],
            keys=keys,
            backends={d: b for d, b in self._backends.items() if d in devices},
            spread=self._shards,
        )
        numel, own = pairs.numel(), pairs.numel(everywhere=False)
        if whole:
            owners = list(dict.fromkeys(self._retain.owner[i] for i in members))
            pairs.forget = [self._forget.buffers[b] for b in owners]
            pairs.retain = [self._retain.buffers[b] for b in owners]
            pairs.out, pairs.rows = pairs.retain, [0] * len(owners)
            if self._shards is not None:
                pairs.spread = self._shards._replace(counted=[True] * len(owners))
        return Pipeline(pairs, numel, own)

    def _check_unscaled(self, call: Call) -> None:
        """Raises where scaled and unscaled gradients would meet in one sum, or eps in one of them."""
        if self._engine is not None and self._engine.scaled and (call.max_norm is not None or call.eps):
            raise ValueError(
                "`max_norm` and `eps` should be left out where DeepSpeed scales losses, because they mean "
                "unscaled gradients: `gradient_clipping` in its configuration clips the update. Found "
                f"max_norm={call.max_norm}, eps={call.eps}."
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

    def _finish(self) -> None:
        written = [f or r for f, r in zip(self._forget.touched, self._retain.touched, strict=True)]
        count_versions([u for u, w in zip(self._updates, written, strict=True) if w])
        grads = zip(self._update_grads, written, strict=True)
        self._window.finish([u if w else None for u, w in grads])


def _policy(nonfinite: Any) -> str:
    if nonfinite is None:
        raise ValueError("Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found None.")
    return nonfinite
