"""DeepSpeed on two and four ranks against one process with the concatenated batches."""

import functools
import importlib.util
import inspect
import os
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import sago
from sago.integrations import deepspeed as integration
from tests.support.oracle import PROMISED, rounding_error
from tests.support.ranks import RankError, Ranks, error_of

if importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("needs deepspeed and accelerate", allow_module_level=True)

STEPS, LR, EPSILON = 3, 1e-2, 1e-3
# How far the parameters may end apart: gradients of size 1, of 8 rows a micro-batch, are off by at most some
# 8 roundings to fp32. AdamW moves a parameter by at most LR / EPSILON times that. Sums are off by 10 times
# what parameters are, and by what the library promises.
DRIFT = STEPS * LR / EPSILON * rounding_error(8, torch.float32)
SUMS = {"rel": 10 * DRIFT, "abs": PROMISED}


LATE = 20.0  # seconds that a collective waits for a rank that fails


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


class Net(torch.nn.Module):
    """Parameters of sizes that two ranks do not divide, one smaller than the number of ranks, one that
    only forget reaches, one that only retain reaches, and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = torch.nn.Linear(5, 7)
        self.inner = torch.nn.Linear(7, 7)
        self.leave = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.forgets = torch.nn.Parameter(torch.randn(3))
        self.retains = torch.nn.Parameter(torch.randn(3))
        self.frozen = torch.nn.Parameter(torch.randn(7), requires_grad=False)

    def forward(self, x, forget):
        if forget is None:
            return self.scale * x
        ends = self.forgets + self.retains if forget == "all" else self.forgets if forget else self.retains
        h = torch.tanh(self.enter(x)) + self.frozen
        h = torch.tanh(self.inner(h)) * self.scale
        return self.leave(h) + ends


def loss(model, batch, forget):
    x, y = (t.to(next(model.parameters()).dtype) for t in batch)
    error = (model(x, forget) - y).square().mean()
    return -0.3 * error if forget is True else error


def batches(accumulation):
    """A forget and a retain batch of 8 rows for every micro-batch of every step."""
    g = torch.Generator().manual_seed(1)

    def batch():
        return torch.randn(8, 5, generator=g), torch.randn(8, 3, generator=g)

    return [[(batch(), batch()) for _ in range(accumulation)] for _ in range(STEPS)]


def optimizer_of(model):
    """With an epsilon that keeps it from magnifying the rounding of a gradient near 0 to a whole step."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=LR, eps=EPSILON, weight_decay=0.1)


def alone(rule, accumulation=1, max_norm=None, clipping=None):
    """Parameters and reports of a single process."""
    model = Net()
    optimizer = optimizer_of(model)
    buckets = sago.GradientBuckets(model)
    reports = []
    for step in batches(accumulation):
        for forget, retain in step:
            with buckets.forget():
                (loss(model, forget, True) / accumulation).backward()
            with buckets.retain():
                (loss(model, retain, False) / accumulation).backward()
        report = buckets.synthesize_(rule, gamma=0.7, alpha=1.3, max_norm=max_norm)
        reports.append({**report.to_dict(), "numel": report.numel.tolist()})
        if clipping is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        buckets.zero_()
    return {name: p.detach() for name, p in model.named_parameters()}, reports


def assert_same(found, expected):
    assert set(found) == {name for name in expected if name != "frozen"}
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=DRIFT, msg=lambda m, n=name: f"{n}: {m}")


# What follows runs on the ranks.


@contextmanager
def their_warnings():
    """DeepSpeed and accelerate call what torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of C++, for what gloo does
    return deepspeed


def config_of(stage, accumulation=1, **config):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **config.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }


def start(*args, **config):
    """An engine."""
    with their_warnings():
        model = Net()
        deepspeed = load()
        return deepspeed.initialize(
            model=model, optimizer=optimizer_of(model), config=config_of(*args, **config)
        )[0]


def start_with_a_limit(stage):
    """An engine. torch would give the process group that DeepSpeed makes a timeout of 30 minutes."""
    with pytest.MonkeyPatch.context() as patch:
        limited = functools.partial(dist.new_group, timeout=timedelta(seconds=LATE))
        patch.setattr(dist, "new_group", limited)
        return start(stage)


def mine(batch):
    return tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in batch)


def whole(engine):
    """The parameters that are trained."""
    if engine.zero_optimization_stage() == 0:
        return {n: p.detach() for n, p in engine.module.named_parameters() if p.requires_grad}
    from deepspeed.utils import safe_get_full_fp32_param

    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in named}


def capture(buckets, engine, forget, retain, order="interleaved"):
    forget, retain = mine(forget), mine(retain)
    if order == "interleaved":
        with buckets.forget():
            engine.backward(loss(engine, forget, True))
        with buckets.retain():
            engine.backward(loss(engine, retain, False))
    elif order == "retain first":
        with buckets.retain():
            engine.backward(loss(engine, retain, False))
        with buckets.forget():
            engine.backward(loss(engine, forget, True))
    else:
        forget_loss, retain_loss = loss(engine, forget, True), loss(engine, retain, False)
        with buckets.forget():
            engine.backward(forget_loss)
        with buckets.retain():
            engine.backward(retain_loss)


def train(stage, rule, accumulation=1, order="interleaved", steps="one", max_norm=None, own=False, **config):
    """Parameters and reports. `steps`: one for a window, or one for every micro-batch."""
    engine = start(stage, accumulation, **config)
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        reports = []
        for step in batches(accumulation):
            for i, (forget, retain) in enumerate(step):
                if steps == "all" and i > 0:
                    assert not engine.is_gradient_accumulation_boundary()
                    engine.step()
                capture(buckets, engine, forget, retain, order)
            reduce_gram = (lambda table: table) if own else None
            report = buckets.synthesize_(
                rule, gamma=0.7, alpha=1.3, max_norm=max_norm, reduce_gram=reduce_gram
            )
            reports.append({**report.to_dict(), "numel": report.numel.tolist()})
            engine.step()
            buckets.zero_()
        assert engine.global_steps == STEPS
        assert "step" not in vars(engine)
        return whole(engine), reports


def train_with_accelerate(stage, accumulation):
    with their_warnings():
        load()
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # asked for, not used
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DeepSpeedPlugin

        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage, accumulation))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation)
        model = Net()
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        buckets = sago.GradientBuckets(model)
        taken = 0
        for step in batches(accumulation):
            for forget, retain in step:
                with accelerator.accumulate(model):
                    before = whole(model)
                    with buckets.forget():
                        accelerator.backward(loss(model, mine(forget), True))
                    with buckets.retain():
                        accelerator.backward(loss(model, mine(retain), False))
                    assert model.global_steps == taken
                    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
                    if accelerator.sync_gradients:
                        buckets.synthesize_("pcgrad", gamma=0.7, alpha=1.3)
                        model.step()
                        buckets.zero_()
                        taken += 1
                    optimizer.step()  # which does nothing
                    optimizer.zero_grad()
        assert model.global_steps == taken == STEPS
        return whole(model)


def parts_of(engine):
    """Name, parameter and its partition in DeepSpeed, padding included, of what is trained."""
    from deepspeed.utils import safe_get_local_grad

    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return [(n, p, safe_get_local_grad(p)) for n, p in named]


def there(p, part):
    """How many elements of a partition are of the parameter."""
    return min(max(p.ds_numel - dist.get_rank() * part.numel(), 0), part.numel())


def padding(rule, reduce_scatter):
    """NaN where it should not be looked at, after it was found to be zero."""
    engine = start(3, zero={"reduce_scatter": reduce_scatter})
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        forget, retain = map(mine, batches(1)[0][0])
        with buckets.forget():
            engine.backward(-0.3 * loss(engine, forget, "all"))
        with buckets.retain():
            engine.backward(loss(engine, retain, "all"))
        ends = []
        for (name, p, part), view in zip(parts_of(engine), buckets.retain_grads, strict=True):
            n = there(p, part)
            assert view.numel() == n
            ends.append(part[n:])
            assert ends[-1].count_nonzero() == 0, name
        for (name, p, _), forget in zip(parts_of(engine), buckets._window.forget.partitions, strict=True):
            ends.append(forget[there(p, forget) :])
            assert ends[-1].count_nonzero() == 0, name
        for end in ends:
            end.data.fill_(torch.nan)  # unseen by the counter of versions
        report = buckets.synthesize_(rule, gamma=0.7, alpha=1.3)
        sizes = [p.ds_numel for _, p, _ in parts_of(engine)]
        assert report.numel.tolist() == (sizes if rule == "pcgrad" else [sum(sizes)])
        assert report.nonfinite_forget.sum() == report.nonfinite_retain.sum() == 0
        for name, p, part in parts_of(engine):
            assert part[: there(p, part)].isfinite().all(), name
        return sum(end.numel() for end in ends), report.to_dict()


def errors(stage, **config):
    """What is refused, and that the window goes on."""
    engine = start(stage, **config)
    step = batches(1)[0][0]
    forget, retain = mine(step[0]), mine(step[1])
    with their_warnings():
        with pytest.raises(ValueError, match=r"the DeepSpeed engine, as deepspeed\.initialize"):
            sago.GradientBuckets(engine.module.parameters())
        if stage == 3:
            with pytest.raises(ValueError, match="grad_accum_dtype"):
                sago.GradientBuckets(engine, accumulate_dtype=torch.float32)
        buckets = sago.GradientBuckets(engine)
        with buckets.forget():
            engine.backward(loss(engine, forget, True))
        with pytest.raises(ValueError, match=r"synthesized before engine.step\(\)"):
            engine.step()
        with buckets.retain():
            engine.backward(loss(engine, retain, False))
            engine.step()  # put off
        assert engine.global_steps == 0
        with pytest.raises(ValueError, match=r"unscales in engine\.step"):
            buckets.unscale_(None, engine.optimizer)
        buckets.synthesize_()
        with pytest.raises(ValueError, match="last update should be used"), buckets.forget():
            pass
        engine.step()
        assert engine.global_steps == 1

        engine.backward(loss(engine, retain, False))
        with pytest.raises(ValueError, match="Backwards should run within"), buckets.forget():
            pass
        buckets.zero_()
        capture(buckets, engine, *step)
        engine.backward(loss(engine, retain, False))
        with pytest.raises(ValueError, match="Backwards should run within"):
            buckets.synthesize_()
        buckets.zero_()
        with pytest.raises(ValueError, match="should have a backward"), buckets.retain():
            pass
        window = buckets._window
        if stage == 3:  # also on one rank, which synthesize_in_backward does not refuse
            with (
                pytest.raises(ValueError, match="synthesize_in_backward should not"),
                window.capture(window.retain, print),
            ):
                pass
        return engine.global_steps


def recognised():
    engine = start(0)
    return [integration.is_engine(model) for model in (engine.module, engine)]


def refused(stage):
    engine = start(stage)
    with pytest.raises(ValueError, match="ZeRO") as error:
        sago.GradientBuckets(engine)
    return str(error.value)


def held_back():
    """Gradients that DeepSpeed does not reduce within the capture."""
    engine = start(3)
    forget, retain = map(mine, batches(1)[0][0])
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        with (
            pytest.raises(ValueError, match="should reduce gradients in every backward"),
            engine.coalesce_grad_reduction(),
            buckets.forget(),
        ):
            engine.backward(loss(engine, forget, True))
        buckets.zero_()
        with buckets.forget(), engine.coalesce_grad_reduction():
            engine.backward(loss(engine, forget, True))
        with buckets.retain():
            engine.backward(loss(engine, retain, False))
        return buckets.synthesize_("pcgrad").to_dict()


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("out of memory")


def after_a_failed_backward(stage):
    engine = start(stage)
    step = batches(1)[0][0]
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        hook = engine.module.inner.register_forward_hook(lambda module, args, out: Fail.apply(out))
        with pytest.raises(RuntimeError, match="out of memory"), buckets.forget():
            engine.backward(loss(engine, mine(step[0]), True))
        hook.remove()
        with pytest.raises(ValueError, match=r"out of memory.* Call zero_"), buckets.retain():
            pass
        buckets.zero_()
        capture(buckets, engine, *step)
        report = buckets.synthesize_("pcgrad").to_dict()
        engine.step()
        buckets.zero_()
        return report, whole(engine)


def other_arguments(stage):
    """The errors of another weight and another rule on one rank, and the report of a synthesis after them."""
    engine = start_with_a_limit(stage)
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        capture(buckets, engine, *batches(1)[0][0])
        last = dist.get_rank() == dist.get_world_size() - 1
        errors = [
            error_of(buckets.synthesize_, "pcgrad", gamma=0.8 if last else 0.7, alpha=1.3),
            error_of(buckets.synthesize_, "sago" if last else "pcgrad", gamma=0.7, alpha=1.3),
        ]
        report = buckets.synthesize_("pcgrad", gamma=0.7, alpha=1.3).to_dict()
        engine.step()
        return errors, report


def fails(stage, how):
    """The last rank dies or is late before the synthesis, or raises in the first capture."""
    engine = start_with_a_limit(stage)
    last = dist.get_rank() == dist.get_world_size() - 1
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        if last and how == "raises":
            with buckets.forget():
                raise ZeroDivisionError
        capture(buckets, engine, *batches(1)[0][0])
        if last and how == "dies":
            os._exit(3)
        if last and how == "is late":
            time.sleep(1.5 * LATE)
        buckets.synthesize_("pcgrad")


def windows(stage):
    """Sums of windows of other shapes than one backward a capture."""
    engine = start(stage)
    (forget, retain), (other, _) = batches(2)[0]
    forget, retain, other = mine(forget), mine(retain), mine(other)
    reports = []
    with their_warnings():
        buckets = sago.GradientBuckets(engine)

        first, second = loss(engine, forget, True), loss(engine, other, True)
        with buckets.retain():
            engine.backward(loss(engine, retain, False))
            with buckets.forget():
                engine.backward(second)
                engine.backward(first)
        reports.append(buckets.synthesize_("pcgrad").to_dict())
        engine.step()

        first, second = loss(engine, forget, True), loss(engine, other, True)
        with buckets.forget():
            engine.backward(first)
        with buckets.retain():
            engine.backward(second)
        reports.append(buckets.synthesize_("pcgrad").to_dict())
        if stage == 3:  # nothing is left of the first window where the second has no gradient
            left = {name: part for name, _, part in parts_of(engine)}["retains"]
            assert left.count_nonzero() == 0
        buckets.zero_()
    return reports


def windows_alone():
    model = Net()
    optimizer = optimizer_of(model)
    (forget, retain), (other, _) = batches(2)[0]
    buckets = sago.GradientBuckets(model)
    reports = []
    with buckets.forget():
        loss(model, forget, True).backward()
        loss(model, other, True).backward()
    with buckets.retain():
        loss(model, retain, False).backward()
    reports.append(buckets.synthesize_("pcgrad").to_dict())
    optimizer.step()
    buckets.zero_()
    with buckets.forget():
        loss(model, forget, True).backward()
    with buckets.retain():
        loss(model, other, True).backward()
    reports.append(buckets.synthesize_("pcgrad").to_dict())
    return reports


def one_element(stage):
    """A window whose retain gradient has one element, of which one rank has nothing; then another window."""
    engine = start(stage)
    forget, retain = batches(1)[0][0]
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        with buckets.forget():
            engine.backward(loss(engine, mine(forget), True))
        with buckets.retain():
            engine.backward(engine(mine(retain)[0], None).mean())
        first = buckets.synthesize_("pcgrad")
        buckets.zero_()
        reports = [first.to_dict()]
        capture(buckets, engine, forget, retain)
        return [*reports, buckets.synthesize_("pcgrad").to_dict()]


def one_element_alone():
    model = Net()
    forget, retain = batches(1)[0][0]
    buckets = sago.GradientBuckets(model)
    with buckets.forget():
        loss(model, forget, True).backward()
    with buckets.retain():
        model(retain[0], None).mean().backward()
    return buckets.synthesize_("pcgrad").to_dict()


def scaled(scale):
    """A loss scale, which the step divides by; and a gradient that is not finite, which it leaves out."""
    engine = start(3)
    engine.optimizer.override_loss_scale(scale)
    forget, retain = batches(1)[0][0]
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        capture(buckets, engine, forget, retain)
        for argument in ({"max_norm": 1.0}, {"eps": 1e-10}) if scale != 1.0 else ():
            with pytest.raises(ValueError, match="where DeepSpeed scales losses"):
                buckets.synthesize_("pcgrad", **argument)
        found = buckets.synthesize_("pcgrad").to_dict()
        engine.step()
        assert engine.was_step_applied()
        before = whole(engine)
        with buckets.forget():
            engine.backward(torch.inf * loss(engine, mine(forget), True))
        with buckets.retain():
            engine.backward(loss(engine, mine(retain), False))
        buckets.synthesize_("sago")
        engine.step()
        assert not engine.was_step_applied()
        assert all(torch.equal(p, before[name]) for name, p in whole(engine).items())
        return found, before


@contextmanager
def fp16_on_a_cpu():
    """DeepSpeed uses fp16 only if the accelerator says that it has fp16. torch has it on every CPU."""
    accelerator = type(load().accelerator.get_accelerator())
    supported = [torch.float32, torch.bfloat16, torch.float16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "is_fp16_supported", lambda self: True)
        patch.setattr(accelerator, "supported_dtypes", lambda self: supported)
        yield


def wrapped(dtype, scale):
    """An engine at stage 0 in bf16 or fp16, whose optimizer DeepSpeed wraps, and its parameters in fp32."""
    config = {"bf16": {"enabled": True}}
    if dtype == torch.float16:
        config = {"fp16": {"enabled": True, "loss_scale": scale}}
    engine = start(0, **config)
    assert type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"
    for group in engine.optimizer.param_groups:  # an update that is off by no more than its gradient
        group.update(lr=0.1, eps=1.0, weight_decay=0.0)
    return engine, [p for group in engine.optimizer.fp32_groups for p in group]


def moved_in_a_wrapper(dtype, scale, own):
    """The movement of the parameters by the sum of both gradients, with or without buckets."""
    forget, retain = batches(1)[0][0]
    with fp16_on_a_cpu(), their_warnings():
        engine, masters = wrapped(dtype, scale)
        before = torch.cat([p.detach().flatten() for p in masters])
        if own:
            buckets = sago.GradientBuckets(engine)
            capture(buckets, engine, forget, retain)
            for argument in ({"max_norm": 1.0}, {"eps": 1e-10}) if scale != 1.0 else ():
                with pytest.raises(ValueError, match="where DeepSpeed scales losses"):
                    buckets.synthesize_("pcgrad", **argument)
            buckets.synthesize_("sum")
        else:
            engine.backward(loss(engine, mine(forget), True) + loss(engine, mine(retain), False))
        engine.step()
        assert engine.was_step_applied()
        return torch.cat([p.detach().flatten() for p in masters]) - before


def sent():
    """The collectives of three windows at stage 0: of the captures, and of the synthesis."""
    engine = start(0, accumulation=2)
    counts, all_reduce = [], dist.all_reduce

    def count(*args, **kwargs):
        counts[-1] += 1
        return all_reduce(*args, **kwargs)

    with their_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", count)
        buckets = sago.GradientBuckets(engine)
        for step in batches(2):
            counts.append(0)
            for forget, retain in step:
                capture(buckets, engine, forget, retain)
            counts.append(0)
            buckets.synthesize_("pcgrad", stats=False)
            engine.step()
            buckets.zero_()
    return counts


def between_plain_steps(stage):
    """A window between two steps of a training without buckets."""
    engine = start(stage)
    first, second, third = batches(1)
    with their_warnings():
        buckets = sago.GradientBuckets(engine)
        engine.backward(loss(engine, mine(first[0][1]), False))
        engine.step()
        capture(buckets, engine, *second[0])
        buckets.synthesize_("pcgrad_global")
        engine.step()
        buckets.zero_()
        engine.backward(loss(engine, mine(third[0][1]), False))
        engine.step()
        return whole(engine)


def between_plain_steps_alone():
    model = Net()
    optimizer = optimizer_of(model)
    buckets = sago.GradientBuckets(model)
    first, second, third = batches(1)
    for batch in (first[0][1], second[0], third[0][1]):
        if batch is second[0]:
            with buckets.forget():
                loss(model, batch[0], True).backward()
            with buckets.retain():
                loss(model, batch[1], False).backward()
            buckets.synthesize_("pcgrad_global")
        else:
            loss(model, batch, False).backward()
        for p in model.parameters():  # DeepSpeed has a gradient of 0 where torch has none
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def in_bf16(dtype):
    """The two gradients are those that DeepSpeed has, bit for bit, and the update is the reference's."""
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": str(dtype).removeprefix("torch.")},
    }
    forget, retain = map(mine, batches(1)[0][0])
    with their_warnings():
        engine = start(3, **config)
        plain = []
        for batch, side in ((forget, True), (retain, False)):
            engine.optimizer.zero_grad()
            engine.backward(loss(engine, batch, side))
            plain.append([part[: there(p, part)].clone() for _, p, part in parts_of(engine)])
        engine.optimizer.zero_grad()

        buckets = sago.GradientBuckets(engine)
        names = [name for name, _, _ in parts_of(engine)]
        capture(buckets, engine, forget=batches(1)[0][0][0], retain=batches(1)[0][0][1])
        kept = []
        for found, expected in zip((buckets.forget_grads, buckets.retain_grads), plain, strict=True):
            for name, f, e in zip(names, found, expected, strict=True):
                if f is not None:
                    assert f.dtype == dtype
                    assert torch.equal(f.float(), e), name
            kept.append([None if f is None else f.clone() for f in found])
        buckets.synthesize_("sago", gamma=0.7, alpha=1.3)
        for (name, p, part), f, r in zip(parts_of(engine), *kept, strict=True):
            f, r = (torch.zeros(there(p, part), dtype=dtype) if t is None else t for t in (f, r))
            expected, _ = sago.reference.synthesize([f], [r], "sago", gamma=0.7, alpha=1.3)
            assert torch.equal(part[: there(p, part)], expected[0].float()), name
        before = whole(engine)
        engine.step()
        after = whole(engine)
        return [name for name in names if torch.equal(before[name], after[name])]


# What follows runs here.


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "pcgrad_global"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("order", ["interleaved", "forwards first"])
def test_zero3_equals_one_process(two, order, accumulation, rule):
    check_equal(two(train, 3, rule, accumulation, order), *alone(rule, accumulation))


@pytest.mark.parametrize(
    ("rule", "accumulation", "order"),
    [
        ("sago", 1, "forwards first"),
        ("pcgrad", 3, "forwards first"),
        ("pcgrad_global", 3, "interleaved"),
    ],
)
def test_zero0_equals_one_process(two, order, accumulation, rule):
    check_equal(two(train, 0, rule, accumulation, order), *alone(rule, accumulation))


def check_equal(ranks, expected, reports):
    (first, reports_of_first), (second, reports_of_second) = ranks
    assert_same(first, expected)
    for name, p in first.items():
        assert torch.equal(p, second[name]), name
    assert repr(reports_of_first) == repr(reports_of_second)  # in which NaN is NaN
    for found, report in zip(reports_of_first, reports, strict=True):
        assert found["numel"] == report["numel"]
        for column in ("ff", "fr", "rr", "uu"):
            assert found[column] == pytest.approx(report[column], **SUMS), column


@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global"])
def test_coefficients_of_a_rank_alone_are_not_equal(two, rule):
    expected, _ = alone(rule)
    (found, _), _ = two(train, 3, rule, own=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(found, expected)


def test_a_step_for_every_micro_batch(two):
    """As DeepSpeed counts them: all but the last do nothing."""
    check_equal(two(train, 3, "pcgrad", 3, "retain first", "all"), *alone("pcgrad", 3))


@pytest.mark.parametrize(("stage", "accumulation"), [(3, 1), (3, 3), (0, 3)])
def test_backward_of_accelerate_does_not_step(two, stage, accumulation):
    expected, _ = alone("pcgrad", accumulation)
    for found in two(train_with_accelerate, stage, accumulation):
        assert_same(found, expected)


@pytest.mark.parametrize("rule", ["pcgrad", "pcgrad_global"])
def test_padding_is_zero_and_not_looked_at(two, rule):
    for reduce_scatter in (True, False):
        (size, report), (other_size, other_report) = two(padding, rule, reduce_scatter)
        assert size + other_size > 0
        assert repr(report) == repr(other_report)


@pytest.mark.parametrize("stage", [3, 0])
def test_errors(two, stage):
    assert two(errors, stage) == [1, 1]


def test_accumulation_that_deepspeed_does_not_manage(two):
    config = {"managed_gradient_accumulation": False}
    assert two(errors, 3, **config) == [1, 1]
    check_equal(two(train, 3, "pcgrad", 3, **config), *alone("pcgrad", 3))


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_add_gradients_up_are_refused(two, stage):
    for message in two(refused, stage):
        assert f"Found stage {stage}" in message
        assert "averaged_gradients" in message
        assert "to 3 or 0" in message


def test_reduction_within_the_capture(two):
    _, (expected, *_) = alone("pcgrad")
    for report in two(held_back):
        assert report["ff"] == pytest.approx(expected["ff"], **SUMS)
        assert report["rr"] == pytest.approx(expected["rr"], **SUMS)


@pytest.mark.parametrize("stage", [3, 0])
def test_zero_after_a_failed_backward(two, stage):
    _, (expected, *_) = alone("pcgrad")
    for report, _ in two(after_a_failed_backward, stage):
        assert report["ff"] == pytest.approx(expected["ff"], **SUMS)
        assert report["rr"] == pytest.approx(expected["rr"], **SUMS)


@pytest.fixture(scope="module", params=[2, 4])
def several(request):
    ranks = Ranks(request.param, LATE)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("stage", [3, 0])
def test_another_argument_on_a_rank_is_an_error_on_all(several, stage):
    _, (expected, *_) = alone("pcgrad")
    for errors, report in several(other_arguments, stage):
        assert [error for error, _ in errors] == [ValueError, ValueError]
        for argument, (_, text) in zip(("gamma", "rule"), errors, strict=True):
            assert f"Parameter `{argument}` should be the same on every rank" in text
        for column in ("ff", "fr", "rr", "uu"):
            assert report[column] == pytest.approx(expected[column], **SUMS), column


@pytest.mark.parametrize("how", ["dies", "is late", "raises"])
@pytest.mark.parametrize("stage", [3, 0])
def test_a_rank_that_fails_is_an_error_on_the_others(several, stage, how):
    with pytest.raises(RankError) as caught:
        several(fails, stage, how)
    *others, last = caught.value.errors
    own = {"dies": "died, exit code 3", "is late": "RuntimeError", "raises": "ZeroDivisionError"}
    assert own[how] in last
    for error in others:
        assert error.splitlines()[-1].startswith("RuntimeError")
        assert "synthesize_" in error or how == "raises"
    assert several(int) == [0] * several.world  # a new group


@pytest.mark.parametrize("stage", [3, 0])
def test_windows(two, stage):
    expected = windows_alone()
    for reports in two(windows, stage):
        for found, report in zip(reports, expected, strict=True):
            for column in ("ff", "fr", "rr", "uu"):
                assert found[column] == pytest.approx(report[column], **SUMS), column


@pytest.mark.parametrize("stage", [3, 0])
def test_plain_steps_in_between(two, stage):
    expected = between_plain_steps_alone()
    for found in two(between_plain_steps, stage):
        assert_same(found, expected)


@pytest.mark.parametrize(("stage", "offload"), [(3, False), (3, True), (0, False)])
def test_clipping_by_deepspeed(two, stage, offload):
    config = {"gradient_clipping": 0.3, "zero": {"offload_optimizer": {"device": "cpu"}} if offload else {}}
    expected, _ = alone("pcgrad", clipping=0.3)
    for found, _ in two(train, stage, "pcgrad", **config):
        assert_same(found, expected)


def test_clipping_by_sago(two):
    expected, _ = alone("sago", max_norm=0.3)
    for found, _ in two(train, 3, "sago", max_norm=0.3):
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16(two, dtype):
    """One that is not reached by its side alone stays as it is."""
    assert two(in_bf16, dtype) == [[], []]


@pytest.mark.parametrize("stage", [3, 0])
def test_parameter_of_which_a_rank_has_nothing(two, stage):
    expected = one_element_alone()
    _, (other, *_) = alone("pcgrad")
    for first, second in two(one_element, stage):
        for column in ("ff", "fr", "rr"):
            assert first[column] == pytest.approx(expected[column], **SUMS), column
            assert second[column] == pytest.approx(other[column], **SUMS), column


def test_loss_scale(two):
    _, (expected, *_) = alone("pcgrad")
    (found, p), _ = two(scaled, 128.0)
    (_, q), _ = two(scaled, 1.0)
    assert found["fr"] == pytest.approx(
        [128.0**2 * x for x in expected["fr"]], rel=10 * DRIFT, abs=128.0**2 * PROMISED
    )
    assert_same(p, q)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 128.0)])
def test_stage_0_in_a_wrapper_of_the_optimizer(two, dtype, scale):
    """The step of the wrapper takes the update from `p.grad`, as the gradient of a plain training.

    The gradients differ by at most four roundings (of a side, of the average, and of their sum), of terms of
    which the sum is at least a quarter.
    """
    both = (two(moved_in_a_wrapper, dtype, scale, own) for own in (True, False))
    for found, expected in zip(*both, strict=True):
        assert expected.norm() > 0.0
        assert (found - expected).norm() < rounding_error(16, dtype) * expected.norm()


def test_deepspeed_has_the_classes_that_are_recognised_by_name():
    """At stage 0 every other class is refused. The names of stage 3 are checked when buckets are made."""
    load()
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3, IPGBucketZ3

    scaling = (FP16_Optimizer, FP16_UnfusedOptimizer)
    assert tuple(kind.__name__ for kind in scaling) == integration._SCALING
    for kind in (*scaling, DeepSpeedZeroOptimizer_Stage3):
        assert isinstance(inspect.getattr_static(kind, "loss_scale"), property)
        assert not issubclass(kind, torch.optim.Optimizer)
    bucket = IPGBucketZ3()
    assert [name for name in integration._BUCKET if not hasattr(bucket, name)] == []


def test_deepspeed_recognises_an_engine(two):
    assert two(recognised) == [[False, True]] * 2


def test_stage_0_sends_once_a_window(two):
    """Two buffers, which parameters were reached and, in windows 1 and 2, the arguments.

    The inner products are then the same on every rank.
    """
    assert two(sent) == [[0, 4, 0, 4, 0, 3]] * 2
