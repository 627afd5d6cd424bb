"""Private names of other libraries: each exists in the installed version, and a missing one is an error."""

import importlib
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import sago
from sago.capture import hooks
from sago.core import guards, transforms
from sago.integrations import deepspeed
from sago.integrations.trainer import adapter
from sago.private import has_since, require, version
from sago.ranks import ddp, fsdp
from tests.support.backends import import_with_triton
from tests.support.ranks import Ranks

ROOT = Path(sago.__file__).parents[1]


class Owner:
    annotated: int

    def __init__(self, names):
        self.__dict__.update(dict.fromkeys(names))


def test_a_missing_name_is_named():
    require(Owner(["a"]), ["a", "annotated"], "Library", "version 1")
    with pytest.raises(
        RuntimeError, match=r"Library should have the private attribute `Owner\.b`.*version 1"
    ):
        require(Owner(["a"]), ["a", "b"], "Library", "version 1")


def test_a_name_is_required_from_the_version_that_added_it(monkeypatch):
    loaded = SimpleNamespace(__version__="1.9.3")
    monkeypatch.setitem(sys.modules, "library", loaded)
    since = "library", (1, 10), "Library", "version 1"
    assert not has_since(Owner([]), "a", *since)
    assert has_since(Owner(["a"]), "a", *since)
    loaded.__version__ = "1.10.0rc1+cpu"
    assert version("library") == (1, 10, 0)
    assert has_since(Owner(["a"]), "a", *since)
    with pytest.raises(RuntimeError, match=r"Library should have the private attribute `Owner\.a`"):
        has_since(Owner([]), "a", *since)


@pytest.mark.parametrize(
    ("library", "tested"),
    [
        ("transformers", adapter.TESTED),
        ("accelerate", adapter.ACCELERATE),
        ("deepspeed", deepspeed._TESTED),
    ],
)
def test_the_tested_versions_are_within_the_bounds_of_the_package(library, tested):
    """Each requirement has an upper bound, and errors name the versions inside the bounds."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(rf'"{library}(>=[^"]*)?"', text)
    assert found
    (bounds,) = set(found)
    low, high = re.fullmatch(r">=([0-9.]+),<([0-9.]+)", bounds).groups()
    names = re.findall(r"[0-9.]+", tested)
    assert names[0] == low or len(names) == 1
    assert all(numbers(low) <= numbers(name) < numbers(high) for name in names)


def numbers(text):
    return [int(x) for x in text.split(".")]


@pytest.mark.parametrize(
    "name",
    [
        *ddp._DDP[:3],
        *fsdp._GROUP[1:],
        *fsdp._PARAM,
        deepspeed.PARTITIONS,
        "loss_scale",
        hooks.HOOKS,
        "_current_level",
        "_functorch",
    ],
)
def test_a_private_name_is_used_in_one_file(name):
    texts = {p: p.read_text(encoding="utf-8") for p in (ROOT / "sago").rglob("*.py")}
    users = [p.name for p, text in texts.items() if re.search(rf"""[."']{name}\b""", text)]
    assert len(users) == 1


def test_a_tensor_has_its_hooks_under_the_private_name():
    p = torch.nn.Parameter(torch.ones(1))
    hooks.check_hooks(["p"], [p])
    p.register_post_accumulate_grad_hook(print)
    assert list(getattr(p, hooks.HOOKS).values()) == [print]
    with pytest.raises(RuntimeError, match=f"torch should have the private attribute `Owner.{hooks.HOOKS}`"):
        hooks.check_hooks(["p"], [Owner([])])


def module_with(group):
    return SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_groups=[group]))


@pytest.mark.parametrize("missing", [*fsdp._GROUP, *fsdp._PARAM])
def test_fsdp2_without_a_name(missing):
    def without(names):
        return [n for n in names if n != missing]

    group = Owner(without(fsdp._GROUP))
    if missing != "fsdp_params":
        group.fsdp_params = [Owner(without(fsdp._PARAM))]
    with pytest.raises(RuntimeError, match=f"FSDP2 should have the private attribute `Owner.{missing}`"):
        fsdp.check_known([module_with(group)])


def test_fsdp2_has_the_names_of_its_parameters_before_the_first_forward():
    found = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param").FSDPParam
    assert set(fsdp._PARAM) <= set(found.__annotations__)


@pytest.fixture(scope="module")
def rank():
    """One process with a process group, because the engines need one."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


def missing_in_fsdp2():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    module = fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    fsdp.check_known([module])
    (group,) = fsdp._groups([module])
    (p, _) = group.fsdp_params
    return [n for n in fsdp._GROUP if not hasattr(group, n)], [
        n for n in fsdp._PARAM if not hasattr(p, n) and n not in type(p).__annotations__
    ]


def test_the_classes_of_fsdp2_have_the_names(rank):
    assert rank(missing_in_fsdp2) == [([], [])]


def missing_in_ddp():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    found = [n for n in ddp._DDP if not hasattr(model, n)]
    switched = []
    for on in (False, True):
        ddp.reduce_in_backward(model, on)
        model(torch.ones(1, 2)).sum().backward()
        # `no_sync` of torch itself switches the reduction off by the same attribute.
        with model.no_sync():
            switched.append(model.require_backward_grad_sync)
        switched.append(model.require_backward_grad_sync)
    return found, switched, hasattr(model._join_config, "enable")


def test_ddp_has_the_names(rank):
    assert rank(missing_in_ddp) == [([], [False, False, False, True], True)]


def test_the_reduction_of_ddp_is_not_switched_by_an_attribute_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"`Owner\.require_backward_grad_sync`"):
        ddp.reduce_in_backward(Owner([]), False)


def test_fsdp2_without_a_state():
    with pytest.raises(RuntimeError, match="_get_fsdp_state"):
        fsdp.check_known([torch.nn.Linear(1, 1)])
    with pytest.raises(RuntimeError, match="_fsdp_param_group`"):
        fsdp.check_known([SimpleNamespace(_get_fsdp_state=lambda: Owner([]))])


@pytest.mark.parametrize("missing", ddp._DDP)
def test_ddp_without_a_name(missing, monkeypatch):
    monkeypatch.setattr(ddp.dist, "is_initialized", lambda: True)
    wrapped = Owner([n for n in ddp._DDP if n != missing])
    monkeypatch.setattr(ddp, "owners", lambda *_: [wrapped])
    with pytest.raises(RuntimeError, match=f"DistributedDataParallel should have .*`Owner.{missing}`"):
        ddp.take_over(None, [], [])


@pytest.mark.parametrize("missing", deepspeed._ENGINE)
def test_a_deepspeed_engine_without_a_name(missing):
    core = Owner([n for n in deepspeed._ENGINE if n != missing])
    core.zero_optimization_stage = lambda: 0
    with pytest.raises(RuntimeError, match=f"DeepSpeed should have the private attribute `Owner.{missing}`"):
        sago.GradientBuckets(core)


@pytest.mark.parametrize("missing", deepspeed._STAGE3)
def test_an_optimizer_of_stage_3_without_a_name(missing):
    names = dict.fromkeys(n for n in deepspeed._STAGE3 if n != missing)
    core = Owner(deepspeed._ENGINE)
    core.zero_optimization_stage = lambda: 3
    core.optimizer = type("DeepSpeedZeroOptimizer_Stage3", (), names)()
    for ask in (sago.GradientBuckets, deepspeed.trained):
        with pytest.raises(RuntimeError, match=f"DeepSpeedZeroOptimizer_Stage3.{missing}`"):
            ask(core)


@pytest.mark.parametrize("missing", deepspeed._BUCKET)
def test_a_bucket_of_stage_3_without_a_name(missing):
    names = dict.fromkeys(deepspeed._STAGE3)
    names["ipg_buckets"] = {torch.float32: Owner([n for n in deepspeed._BUCKET if n != missing])}
    core = Owner(deepspeed._ENGINE)
    core.zero_optimization_stage = lambda: 3
    core.optimizer = type("DeepSpeedZeroOptimizer_Stage3", (), names)()
    with pytest.raises(RuntimeError, match=f"Owner.{missing}`"):
        sago.GradientBuckets(core)


def engine_of_stage_0(optimizer):
    core = Owner(deepspeed._ENGINE)
    core.zero_optimization_stage = lambda: 0
    core.mp_world_size = core.sequence_parallel_size = 1
    core.is_deepcompile_enabled = lambda: False
    core.optimizer = optimizer
    core.module = torch.nn.Linear(2, 2)
    return core


class LaterOptimizer:
    """An optimizer that a later DeepSpeed may have."""

    loss_scale = 1.0


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (LaterOptimizer, r"LaterOptimizer, which sago does not know.*torch\.optim\.Optimizer.*stage 3"),
        (type("BF16_Optimizer", (), {}), "BF16_Optimizer, which adds"),
        (type("DummyOptim", (), {}), "none"),
        (type("DeepSpeedZeRoOffload", (), {}), "none"),
        (type(None), "none"),
    ],
)
@pytest.mark.parametrize("ask", [deepspeed.Engine, deepspeed.trained])
def test_an_optimizer_of_stage_0_that_is_not_known_is_refused(ask, kind, found):
    with pytest.raises(ValueError, match=f"Found {found}"):
        ask(engine_of_stage_0(kind()))


@pytest.mark.parametrize("name", deepspeed._SCALING)
def test_an_optimizer_of_stage_0_without_its_scale(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.17.6"))
    for scale in (1.0, 128.0):
        core = engine_of_stage_0(type(name, (), {"loss_scale": scale, "fp16_groups": []})())
        assert deepspeed.Engine(core).scaled is (scale != 1.0)
    with pytest.raises(RuntimeError, match=rf"DeepSpeed should have .*`{name}\.loss_scale`"):
        deepspeed.Engine(engine_of_stage_0(type(name, (), {})()))


def test_an_optimizer_of_torch_has_no_scale(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.17.6"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert not deepspeed.Engine(engine_of_stage_0(optimizer)).scaled


@pytest.mark.parametrize("name", deepspeed._ADDED)
def test_a_name_that_a_later_deepspeed_added(name, monkeypatch):
    loaded = SimpleNamespace(__version__="0.17.6")
    monkeypatch.setitem(sys.modules, "deepspeed", loaded)
    assert deepspeed._added(Owner([]), name, "before") == "before"
    assert deepspeed._added(Owner([name]), name, "before") is None
    loaded.__version__ = "0.20.1+cpu"
    with pytest.raises(RuntimeError, match=name):
        deepspeed._added(Owner([]), name, "before")


@pytest.mark.parametrize(
    ("version", "directly"), [("3.4.0", True), ("3.9.1", True), ("3.10.0", False), ("4.0", False)]
)
def test_only_tested_versions_of_triton_are_launched_directly(version, directly, monkeypatch, caplog):
    import_with_triton("triton")
    launch = importlib.import_module("sago.kernels.launch")
    monkeypatch.setattr(launch.triton, "__version__", version)
    with caplog.at_level(logging.WARNING, "sago"):
        assert launch.launches_directly.__wrapped__() == directly
    assert ("slower dispatch" in caplog.text) != directly


def test_the_transforms_of_this_torch_are_known():
    assert transforms._innermost is importlib.import_module("torch._C._functorch").peek_interpreter_stack
    with forward_ad.dual_level():
        assert transforms._levels._current_level == 0
    assert transforms._levels._current_level == -1


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("torch.autograd.forward_ad", "_current_level", 0),
        ("torch._C._functorch", "TransformType", SimpleNamespace(Grad=0)),
    ],
)
def test_names_of_transforms_with_other_values(module, name, value, monkeypatch, caplog):
    monkeypatch.setattr(importlib.import_module(module), name, value)
    with caplog.at_level(logging.WARNING, "sago"):
        innermost, _ = transforms._private_names()
    assert "its names have other values" in caplog.text
    assert innermost() is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._C._functorch", "peek_interpreter_stack"),
        ("torch._C._functorch", "TransformType"),
        ("torch.autograd.forward_ad", "_current_level"),
    ],
)
def test_transforms_without_a_name(module, name, monkeypatch, caplog):
    """Their tensors are refused all the same."""
    monkeypatch.delattr(importlib.import_module(module), name)
    with caplog.at_level(logging.WARNING, "sago"):
        innermost, levels = transforms._private_names()
    assert "does not tell whether a transform" in caplog.text
    assert name in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(transforms, "_innermost", innermost)
    monkeypatch.setattr(transforms, "_levels", levels)
    r = torch.ones(3)

    def transformed(t):
        sago.synthesize_(t, r)
        return t.sum()

    for transform, x in ((torch.func.vmap, torch.ones(2, 3)), (torch.func.grad, torch.ones(3))):
        with pytest.raises(TypeError, match=r"`forget\[0\]` should hold data"):
            transform(transformed)(x)
    assert torch.equal(r, torch.ones(3))
    sago.synthesize_(r, r, "sum")


def test_the_guards_of_this_torch_are_used():
    assert guards.TensorGuards is not None


class OtherSignature:
    def __init__(self, tensors):
        pass


class NeverHolds:
    def __init__(self, *tensors, **options):
        self.check = lambda *_: False


COMPARED = {
    "type": type,
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
    "shape": lambda t: t.shape,
    "number of dimensions": lambda t: t.ndim,
    "stride": lambda t: t.stride(),
    "requires_grad": lambda t: t.requires_grad,
    "negative bit": lambda t: t.is_neg(),
}


def guards_that_compare(names):
    """A class like TensorGuards that compares these properties and no others."""

    def metadata(tensors):
        return [[COMPARED[name](t) for name in names] for t in tensors]

    class Partial:
        def __init__(self, *tensors, **options):
            before = metadata(tensors)
            self.check = lambda *tensors: metadata(tensors) == before

    return Partial


def test_guards_that_compare_everything_are_used(monkeypatch):
    complete = guards_that_compare(COMPARED)
    monkeypatch.setattr(importlib.import_module("torch._C._dynamo.guards"), "TensorGuards", complete)
    assert guards._tensor_guards() is complete


@pytest.mark.parametrize("name", [n for n in COMPARED if n != "number of dimensions"])
def test_guards_that_leave_out_a_property_are_left_alone(name, monkeypatch, caplog):
    """Kernels would read memory with the metadata of another tensor."""
    left_out = {"shape": ("shape", "number of dimensions")}.get(name, (name,))
    others = guards_that_compare([n for n in COMPARED if n not in left_out])
    monkeypatch.setattr(importlib.import_module("torch._C._dynamo.guards"), "TensorGuards", others)
    with caplog.at_level(logging.WARNING, "sago"):
        assert guards._tensor_guards() is None
    assert f"its check accepts another {name}" in caplog.text


def test_the_guards_of_this_torch_compare_every_property_that_is_probed():
    first, like, others = guards._probes()
    assert others.keys() == COMPARED.keys()
    found = guards.Guards([first])
    assert found.hold([like])
    for name, other in others.items():
        apart = {n for n, compared in COMPARED.items() if compared(other) != compared(first)}
        assert apart == {name} or (name == "number of dimensions" and apart == {"shape", "stride", name})
        assert not found.hold([other])


@pytest.mark.parametrize("other", [None, OtherSignature, NeverHolds])
def test_other_guards_are_left_alone(other, monkeypatch, caplog):
    module = importlib.import_module("torch._C._dynamo.guards")
    if other is None:
        monkeypatch.delattr(module, "TensorGuards")
    else:
        monkeypatch.setattr(module, "TensorGuards", other)
    with caplog.at_level(logging.WARNING, "sago"):
        found = guards._tensor_guards()
    assert found is None
    assert "cannot be used" in caplog.text
    monkeypatch.setattr(guards, "TensorGuards", found)
    p = torch.nn.Parameter(torch.ones(3))
    buckets = sago.GradientBuckets([p])
    for side, x in ((buckets.forget, 2.0), (buckets.retain, 3.0)):
        with side():
            (x * p).sum().backward()
    buckets.synthesize_("sum")
    assert (p.grad == 5.0).all()
    buckets.zero_()
    p.data = torch.ones(4)
    with pytest.raises(ValueError, match="should be as it was"), buckets.forget():
        pass
