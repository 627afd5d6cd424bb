"""Private names of other libraries: each exists in the installed version, and a missing one is an error."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

import sago
from sago.core import guards
from sago.integrations import deepspeed
from sago.private import require
from sago.ranks import ddp, fsdp
from tests.support.backends import import_with_triton


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
    with pytest.raises(RuntimeError, match=f"DeepSpeedZeroOptimizer_Stage3.{missing}`"):
        sago.GradientBuckets(core)


@pytest.mark.parametrize("name", deepspeed._ADDED)
def test_a_name_that_a_later_deepspeed_added(name, monkeypatch):
    loaded = SimpleNamespace(__version__="0.17.6")
    monkeypatch.setitem(deepspeed.sys.modules, "deepspeed", loaded)
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


def test_the_guards_of_this_torch_are_used():
    assert guards.TensorGuards is not None


class OtherSignature:
    def __init__(self, tensors):
        pass


class NeverHolds:
    def __init__(self, *tensors, **options):
        self.check = lambda *_: False


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
