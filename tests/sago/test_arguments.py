"""Every bad input: which error, what it says, and that not a bit has changed.

`LISTS` has calls on lists, with one argument that is wrong. `CALLS` has the other calls of the library.
"""

import warnings
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import sago
from sago import reference
from sago.backends import choose
from sago.distributed import SumOver
from sago.integrations.trainer.options import Synthesis
from sago.monitor import ConflictMonitor
from sago.rules import cagrad, graddrop, gradvac, gru
from sago.testing import check_rule
from tests.support.captures import Window
from tests.support.properties import equal_bits

NAN, INF = float("nan"), float("inf")


def ones(*shape, **options):
    return torch.full(shape, 1.5, **options)


class Case(NamedTuple):
    error: type[Exception]
    says: str
    options: dict[str, Any]


def case(error, says, **options):
    return Case(error, says, options)


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def escaped():
    """A tensor that only means something inside of vmap."""
    found = []
    torch.func.vmap(lambda t: (found.append(t), t)[1])(ones(2, 3))
    return found[0]


def of_inference():
    with torch.inference_mode():
        return ones(3)


def freed():
    t = ones(3)
    t.untyped_storage().resize_(0)
    return t


def wrong_kinds():
    """Tensors that are no dense floating-point tensors with memory: what the message says of each."""
    found = {
        "bool": (TypeError, "float16.*torch.bool", torch.ones(3, dtype=torch.bool)),
        "int": (TypeError, "float16.*torch.int64", torch.ones(3, dtype=torch.int64)),
        "complex": (TypeError, "float16.*torch.complex64", torch.ones(3, dtype=torch.complex64)),
        "float8": (TypeError, "float16.*float8", ones(3).to(torch.float8_e5m2)),
        "COO": (TypeError, "dense.*sparse_coo", ones(3).to_sparse()),
        "CSR": (TypeError, "dense.*sparse_csr", ones(1, 3).to_sparse_csr()),
        "nested": (TypeError, "dense.*nested", torch.nested.nested_tensor([ones(1), ones(2)])),
        "jagged": (
            TypeError,
            "dense.*jagged",
            torch.nested.nested_tensor([ones(1), ones(2)], layout=torch.jagged),
        ),
        "meta": (ValueError, "hold data.*meta", ones(3, device="meta")),
        "fake": (TypeError, "hold data.*FakeTensor.*plain tensors", fake()),
        "of vmap": (TypeError, "hold data.*no memory.*plain tensors", escaped()),
        "lazy": (ValueError, "hold data.*Uninitialized.*forward", nn.UninitializedParameter()),
        "freed": (TypeError, "hold data.*no memory", freed()),
        "of numpy": (TypeError, "tensor or None.*ndarray", np.ones(3, dtype=np.float32)),
        "a list": (TypeError, "tensor or None.*list", [1.0, 2.0, 3.0]),
        "a number": (TypeError, "tensor or None.*float", 1.0),
        "a string": (TypeError, "tensor or None.*str", "retain"),
    }
    if hasattr(torch, "quantize_per_tensor"):
        found["quantized"] = (
            TypeError,
            "float16.*qint8",
            torch.quantize_per_tensor(ones(3), 0.1, 0, torch.qint8),
        )
    return found


def shared():
    """One buffer and two views of it that meet in part."""
    buffer = torch.arange(20.0)
    return buffer[:8], buffer[4:12]


def expanded():
    return torch.arange(3.0).view(3, 1).expand(3, 4)


def cases():
    a, b = shared()
    r = ones(4)
    square = torch.arange(16.0).view(4, 4)
    wide, middle = torch.arange(40.0).view(5, 8), torch.arange(12.0)
    return {
        # lengths
        "no tensors": case(ValueError, "`forget` and `retain`.*at least one.*none", forget=[], retain=[]),
        "lengths": case(
            ValueError, "`forget` and `retain`.*same length.*2 and 1", forget=[ones(2)] * 2, retain=[ones(2)]
        ),
        "length of out": case(
            ValueError, "`out`.*1 tensors, one for each gradient.*Found 2", out=[ones(3), ones(3)]
        ),
        # shapes
        "shape": case(
            ValueError,
            r"`forget\[0\]` and `retain\[0\]`.*same shape.*\(3,\) and \(4,\)",
            forget=[ones(3)],
            retain=[ones(4)],
        ),
        "shape, one would broadcast": case(
            ValueError, r"same shape.*\(1,\) and \(4,\)", forget=[ones(1)], retain=[ones(4)]
        ),
        "shape, same numel": case(
            ValueError, r"same shape.*\(2, 3\) and \(3, 2\)", forget=[ones(2, 3)], retain=[ones(3, 2)]
        ),
        "shape of the second": case(
            ValueError,
            r"`forget\[1\]` and `retain\[1\]`",
            forget=[ones(3), ones(3)],
            retain=[ones(3), ones(4)],
        ),
        "shape of out": case(ValueError, r"`out\[0\]`.*same shape.*\(3,\) and \(4,\)", out=[ones(4)]),
        "shape of out, retain None": case(
            ValueError, r"`forget\[0\]` and `out\[0\]`", retain=[None], out=[ones(4)]
        ),
        # dtypes, layouts and memory
        **{
            f"{side} {kind}": case(error, rf"`{side}\[0\]`.*{says}", **{side: [t]})
            for side in ("forget", "retain", "out")
            for kind, (error, says, t) in wrong_kinds().items()
        },
        "meta pair": case(
            ValueError,
            r"`forget\[0\]`.*meta",
            forget=[ones(3, device="meta")],
            retain=[ones(3, device="meta")],
        ),
        "out of inference mode": case(ValueError, "inference mode.*Clone", out=[of_inference()]),
        "retain of inference mode": case(ValueError, "inference mode.*Clone", retain=[of_inference()]),
        # not tensors
        "forget a number": case(TypeError, "`forget`.*tensor or a sequence.*float", forget=1.0),
        "forget None": case(TypeError, "`forget`.*NoneType", forget=None),
        "retain None": case(TypeError, "`retain`.*NoneType", retain=None),
        "retain a string": case(TypeError, "`retain`.*str", retain="retain"),
        "forget a dict": case(TypeError, "`forget`.*dict.*values as a list", forget={"w": ones(3)}),
        "retain a set": case(TypeError, "`retain`.*set", retain={ones(3)}),
        "forget an array": case(TypeError, "`forget`.*ndarray.*from_numpy", forget=np.ones(3)),
        "retain bytes": case(TypeError, "`retain`.*bytes", retain=b"abc"),
        "a list in a list": case(TypeError, r"`forget\[0\]`.*list", forget=[[ones(3)]]),
        "out a number": case(TypeError, "`out`.*int", out=3),
        "out a dict": case(TypeError, "`out`.*dict", out={"w": ones(3)}),
        "out a name in a list": case(TypeError, r"`out\[0\]`.*str", out=["forget"]),
        # out
        "out by another name": case(ValueError, "`out`.*'forget'.*Found 'retain_'", out="retain_"),
        "out expanded": case(
            ValueError,
            r"output for gradient 0.*overlap itself.*\(3, 4\).*\(1, 0\)",
            forget=[ones(3, 4)],
            retain=[ones(3, 4)],
            out=[expanded()],
        ),
        "retain expanded": case(ValueError, "overlap itself", forget=[ones(3, 4)], retain=[expanded()]),
        "forget expanded": case(
            ValueError, "overlap itself", forget=[expanded()], retain=[ones(3, 4)], out="forget"
        ),
        "out of windows": case(
            ValueError,
            "overlap itself",
            forget=[ones(5, 3)],
            retain=[ones(5, 3)],
            out=[torch.arange(7.0).unfold(0, 3, 1)],
        ),
        "in place, meeting in part": case(
            ValueError,
            r"share.*forget\[0\].*output for gradient 0|share.*output for gradient 0.*forget\[0\]",
            forget=[a],
            retain=[b],
        ),
        "out meets forget": case(ValueError, r"share", forget=[a], retain=[ones(8)], out=[b]),
        "out meets retain": case(ValueError, r"share", forget=[ones(8)], retain=[b], out=[a]),
        "out is another's retain": case(
            ValueError,
            r"`retain\[1\]`.*share|share.*`retain\[1\]`",
            forget=[ones(4), ones(4)],
            retain=[ones(4), r],
            out=[r, ones(4)],
        ),
        "forget is another's retain": case(ValueError, r"share", forget=[ones(4), r], retain=[r, ones(4)]),
        "out twice": case(
            ValueError,
            "output for gradient 0.*output for gradient 1|output for gradient 1.*output for gradient 0",
            forget=[ones(4), ones(4)],
            retain=[r, r],
        ),
        "same memory, other dtype": case(
            ValueError, "share", forget=[r.view(torch.bfloat16).view(4, 2)[:, 0]], retain=[r]
        ),
        "same memory, other order": case(ValueError, "share", forget=[square.t()], retain=[square]),
        "out in another order than forget": case(
            ValueError, "share", forget=[square.t()], retain=[ones(4, 4)], out=[square]
        ),
        "columns that meet": case(ValueError, "share", forget=[wide[:, 0:4]], retain=[wide[:, 3:7]]),
        "expanded within out": case(
            ValueError, "share", forget=[middle[2:3].expand(4)], retain=[middle[0:4]]
        ),
        # None where it would be written
        "retain None, in place": case(ValueError, r"`retain\[0\]`.*written there.*None", retain=[None]),
        "forget None, out forget": case(
            ValueError, r"`forget\[0\]`.*written there.*None", forget=[None], out="forget"
        ),
        "out None": case(ValueError, r"`out\[0\]`.*written there.*None", out=[None]),
        # rule, backend, groups
        "unknown rule": case(ValueError, "`rule`.*pcgrad.*Found 'sagp'.*as a sago.Rule", rule="sagp"),
        **{
            f"rule {name!r}": case(ValueError, f"`rule`.*pcgrad_global.*Found {name!r}", rule=name)
            for name in ("SAGO", " sago", "pcgrad-global", "")
        },
        "rule None": case(TypeError, "`rule`.*NoneType", rule=None),
        "rule a function": case(TypeError, "`rule`.*function", rule=ones),
        "rule a factory": case(TypeError, "`rule`.*function", rule=cagrad),
        "rule a class": case(TypeError, "`rule`.*type", rule=sago.Rule),
        "rule a module": case(TypeError, "`rule`.*module", rule=sago.rules.pcgrad),
        "rule with a state": case(
            ValueError, "no numbers from step to step.*GradientBuckets", rule=gradvac(decay=0.9)
        ),
        "a random gate and a reduction": case(
            ValueError, "`reduce_gram`.*random gate", rule="graddrop", reduce_gram=lambda t: t
        ),
        "unknown backend": case(ValueError, "`backend`.*compiled.*Found 'cuda'", backend="cuda"),
        "backend in capitals": case(ValueError, "`backend`.*Found 'Reference'", backend="Reference"),
        "backend a number": case(ValueError, "`backend`.*Found 3", backend=3),
        "too many groups": case(ValueError, "`groups`.*1.*Found 2", groups=["a", "b"]),
        "too few groups": case(ValueError, "`groups`.*1.*Found 0", groups=[]),
        "groups a string": case(TypeError, "`groups`.*str", groups="a"),
        "groups a number": case(TypeError, "`groups`.*int", groups=1),
        "groups a function": case(TypeError, "`groups`.*function. Pass a list", groups=ones),
        "groups a dict": case(TypeError, "`groups`.*dict.*list", groups={"a": 1}),
        "groups a set": case(TypeError, "`groups`.*set.*list", groups={"a"}),
        "groups an array": case(TypeError, "`groups`.*ndarray.*list", groups=np.zeros(1)),
        "groups a tensor": case(TypeError, "`groups`.*Tensor.*list", groups=torch.zeros(1)),
        "groups of tensors": case(TypeError, r"`groups\[0\]`.*equal.*tolist", groups=[torch.tensor(0)]),
        "groups of NaN": case(TypeError, r"`groups\[0\]`.*equal.*nan", groups=[NAN]),
        "groups unhashable": case(TypeError, r"`groups\[0\]`.*hashable.*\[1\]", groups=[[1]]),
        "groups unhashable inside": case(TypeError, r"`groups\[0\]`.*hashable", groups=[(1, [2])]),
        # weights and eps
        **{
            f"{name} {what}": case(error, f"`{name}`.*{says}", **{name: value})
            for name in ("gamma", "alpha")
            for what, error, says, value in (
                ("1-d", ValueError, r"0-d.*\(1,\)", ones(1)),
                ("2-d", ValueError, r"0-d.*\(2, 3\)", ones(2, 3)),
                ("None", TypeError, "NoneType", None),
                ("string", TypeError, "str", "1.0"),
                ("complex", TypeError, "complex", 1j),
                ("list", TypeError, "list", [1.0]),
                ("complex tensor", TypeError, "complex64", torch.tensor(1j)),
                ("bool tensor", TypeError, "bool", torch.tensor(True)),
                ("meta", TypeError, "meta", ones(device="meta")),
                ("sparse", TypeError, "sparse", ones().to_sparse()),
                ("fake", TypeError, "memory", fake().sum()),
                ("bool", TypeError, "bool", True),
                ("array", TypeError, "ndarray", np.array(1.0)),
                ("huge", ValueError, "range of float", 10**400),
            )
        },
        **{
            f"{name} {value!r}": case(error, f"`{name}`.*{says}", **{name: value})
            for name in ("eps", "retain_floor")
            for error, says, value in (
                (ValueError, "not negative.*-1e-10", -1e-10),
                (ValueError, "nan", NAN),
                (ValueError, "inf", INF),
                (ValueError, "range of float", 10**400),
                (TypeError, "str", "0"),
                (TypeError, "Tensor", torch.tensor(0.5)),
                (TypeError, "bool", True),
                (TypeError, "NoneType", None),
            )
        },
        "retain_floor without a gate": case(
            ValueError, "`retain_floor`.*without a gate.*'pcgrad'.*'sago'", rule="pcgrad", retain_floor=0.1
        ),
        "retain_floor of mudman": case(
            ValueError, "`retain_floor`.*'mudman'.*'sago'", rule="mudman", retain_floor=0.1
        ),
        **{
            f"stats {value!r}": case(TypeError, "`stats`.*True or False", stats=value)
            for value in ("no", None, 1, torch.tensor(True))
        },
        "reduce_gram": case(TypeError, "`reduce_gram`.*callable.*str", reduce_gram="sum"),
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested, CSR and quantized tensors
    LISTS = cases()


def tensors_of(options):
    for value in options.values():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, torch.Tensor):
                yield t


def state(t):
    """Every byte that a tensor shows, and how it shows it."""
    if nn.parameter.is_lazy(t):
        return None
    dense = t.to_dense() if t.layout in (torch.sparse_coo, torch.sparse_csr) else t
    try:
        memory = b"" if dense.untyped_storage().device.type == "meta" else bytes(dense.untyped_storage())
    except RuntimeError:  # the tensor has no memory
        memory = b""
    form = () if t.is_nested else (t.shape, dense.stride())
    return form, t.dtype, memory, -1 if t.is_inference() else t._version


def test_the_call_without_the_mistake_is_right():
    sago.synthesize_([ones(3)], [ones(3)], out=[ones(3)])


WEIGHTS = {"gamma", "alpha"}
# The reference has no backends, and computes the first step of a rule with a state.
NOT_OF_REFERENCE = {"backend", "rule with a state", "a random gate and a reduction"}


def synthesize_by_plan(**options):
    weights = {name: options.pop(name) for name in WEIGHTS & set(options)}
    sago.Plan(**options).synthesize_(**weights)


@pytest.mark.parametrize("name", LISTS)
def test_error_and_nothing_written(name):
    error, says, given = LISTS[name]
    entries = [sago.synthesize_, synthesize_by_plan]
    if NOT_OF_REFERENCE.isdisjoint([name, *given]):
        entries.append(reference.synthesize_)
    for entry in entries:
        options = {"forget": [ones(3)], "retain": [ones(3)], **given}
        before = [state(t) for t in tensors_of(options)]
        with pytest.raises((ValueError, TypeError), match=f"(?s){says}") as caught:
            entry(**options)
        assert caught.type is error
        assert [state(t) for t in tensors_of(options)] == before


OF_OUTPUTS = (
    "out",
    "in place",
    "share",
    "output",
    "overlap",
    "retain of inference",
)  # new tensors share nothing


@pytest.mark.parametrize(
    "name",
    [n for n, c in LISTS.items() if "out" not in c.options and not any(w in n + c.says for w in OF_OUTPUTS)],
)
def test_out_of_place_refuses_the_same(name):
    error, says, options = LISTS[name]
    with pytest.raises(error, match=f"(?s){says}"):
        sago.synthesize(**{"forget": [ones(3)], "retain": [ones(3)], **options})


class World:
    """Objects of the public interface in the middle of their work, none of which may change."""

    def __init__(self):
        self.window, self.one, self.mean = Window(), Window(one_copy=True), Window(retain_decay=0.5)
        for window in (self.window, self.one, self.mean):
            window.capture("forget", w=2.0, v=1.0)
        for window in (self.window, self.mean):
            window.capture("retain", w=-3.0)
        self.mean.buckets.synthesize_(gradvac(decay=0.9))
        self.mean.zero_()
        self.saved = self.mean.buckets.state_dict()
        self.buckets, self.f, self.r = self.window.buckets, ones(3), -ones(3)
        self.plan = sago.Plan([self.f], [self.r])
        self.report = sago.synthesize([ones(3), ones(2)], [ones(3), ones(2)])[1]
        self.without = sago.synthesize(ones(3), ones(3), stats=False)[1]
        self.monitor = ConflictMonitor()
        self.monitor.add(self.report, 5)
        self.scaler = torch.amp.GradScaler("cpu")
        self.optimizer = torch.optim.SGD(self.window.params.values(), 0.1)

    def in_backward(self, **options):
        with self.one.buckets.synthesize_in_backward(**options):
            pytest.fail("entered")

    def load(self, mean=None, rule=None, **changes):
        """Loads a state with changes: of its entries, of the mean of `w`, or of the numbers of the rule."""
        found = {**self.saved, **changes}
        if mean is not None:
            found["retain_mean"] = {**self.saved["retain_mean"], "w": mean}
        if rule is not None:
            found["rules"] = {"gradvac": rule}
        self.mean.buckets.load_state_dict(found)

    def state(self):
        windows = (self.window, self.one)
        grads = [
            None if g is None else state(g)
            for window in windows
            for g in (*window.buckets.forget_grads, *window.buckets.retain_grads, *window.grads())
        ]
        kept = self.mean.buckets.state_dict()
        numbers = [*kept["retain_mean"].values(), *kept["rules"].values(), self.f, self.r]
        params = [p for window in (*windows, self.mean) for p in window.params.values()]
        rows = [str(self.report.to_dict()), str(self.monitor.rows()), kept["retain_weight"]]
        return grads, [state(t) for t in (*numbers, *params)], rows

    def finish(self):
        """Everything can be used as if the bad call had not been."""
        self.window.finish()
        with self.one.buckets.synthesize_in_backward("sum") as step:
            self.one.loss(w=-3.0).backward()
        assert torch.equal(self.one.params["w"].grad, torch.full((3,), -1.0))
        assert step.report.summary()["fr"] == -18.0
        self.mean.buckets.load_state_dict(self.saved)
        self.monitor.add(self.report)


@pytest.fixture(scope="module")
def world():
    """One for all calls, because a bad call changes nothing."""
    made = World()
    yield made
    made.finish()


def call(error, says, function):
    return error, says, function


def w(dtype=torch.float32, **options):
    return nn.Parameter(torch.ones(2, dtype=dtype, **options))


def of_params(params, **options):
    return lambda world: sago.GradientBuckets(params, **options)


def of_rule(coefficients, scope="element", **options):
    return lambda world: sago.Rule("mine", coefficients, scope, **options)


def add(ff, fr, rr, gamma, alpha):
    return gamma, alpha


def returning(*values):
    return of_rule(lambda ff, fr, rr, gamma, alpha: values)


def on_sums(function):
    """A rule that fails at its use: it has no formula before."""
    rule = sago.Rule("mine", lambda ff, fr, rr, gamma, alpha: (function(ff), alpha), "tensor")
    return lambda world: sago.synthesize_([world.f], [world.r], rule)


def nested_calls(side, function):
    def run(world):
        with getattr(world.buckets, side)():
            function(world)

    return run


def calls():
    tensor = torch.zeros(3)
    return {
        # GradientBuckets
        "no params": call(ValueError, "`params`.*none", of_params([])),
        "no params in a module": call(ValueError, "`params`.*none", of_params(nn.Tanh())),
        "all frozen": call(
            ValueError, "`params`.*requires grad.*none", of_params([w().requires_grad_(False)])
        ),
        "params a tensor": call(TypeError, "`params`.*module or an iterable.*Parameter", of_params(w())),
        "params a number": call(TypeError, "`params`.*int", of_params(3)),
        "params None": call(TypeError, "`params`.*NoneType", of_params(None)),
        "params a string": call(TypeError, "`params`.*str", of_params("abc")),
        "params a dict": call(TypeError, r"`params`.*dict.*items\(\)", of_params({"w": w()})),
        "params a class": call(TypeError, "`params`.*type", of_params(nn.Linear)),
        "params an optimizer": call(
            TypeError, "`params`.*SGD", lambda world: sago.GradientBuckets(world.optimizer)
        ),
        "params of ints": call(TypeError, r"`params\[0\]`.*tensor.*int", of_params(range(3))),
        "params of strings": call(TypeError, r"`params\[0\]`.*tensor.*str", of_params(["w"])),
        "param groups": call(TypeError, r"`params\[0\]`.*tensor.*dict", of_params([{"params": [w()]}])),
        "params in a list": call(TypeError, r"`params\[0\]`.*tensor.*list", of_params([[w()]])),
        "params of arrays": call(TypeError, r"`params\[0\]`.*tensor.*ndarray", of_params([np.ones(3)])),
        "half of them named": call(TypeError, r"`params\[0\]`.*tensor.*tuple", of_params([("w", w()), w()])),
        "a named number": call(TypeError, "`w`.*tensor.*float", of_params([("w", 1.0)])),
        "not a leaf": call(ValueError, r"`params\[1\]`.*leaf.*Mul", of_params([w(), w() * 2])),
        "a param on meta": call(ValueError, "`m`.*data.*meta", of_params([("m", w(device="meta"))])),
        "a complex param": call(
            TypeError, r"`params\[0\]`.*float16.*complex64", of_params([w(torch.complex64)])
        ),
        "a sparse param": call(
            TypeError, r"`params\[0\]`.*dense", of_params([torch.ones(2).to_sparse().requires_grad_()])
        ),
        "a lazy param": call(ValueError, "`weight`.*Uninitialized.*forward", of_params(nn.LazyLinear(2))),
        **{
            f"accumulation {x!r}": call(
                ValueError, "`accumulation`.*'mean'", of_params([w()], accumulation=x)
            )
            for x in ("average", "MEAN", None)
        },
        **{
            f"accumulate_dtype {x}": call(
                ValueError, "`accumulate_dtype`.*float64", of_params([w()], accumulate_dtype=x)
            )
            for x in (torch.bfloat16, torch.int32, "float32", float, 32)
        },
        **{
            f"bucket_cap_mb {x}": call(ValueError, f"`bucket_cap_mb`.*{x}", of_params([w()], bucket_cap_mb=x))
            for x in (0, -1.0, NAN)
        },
        **{
            f"bucket_cap_mb {x!r}": call(
                TypeError, f"`bucket_cap_mb`.*{type(x).__name__}", of_params([w()], bucket_cap_mb=x)
            )
            for x in ("256", None, True)
        },
        **{
            f"retain_decay {x!r}": call(error, f"`retain_decay`.*{x}", of_params([w()], retain_decay=x))
            for error, x in ((ValueError, 1.0), (ValueError, 0), (ValueError, -0.1), (ValueError, NAN))
        },
        "retain_decay a string": call(TypeError, "`retain_decay`.*str", of_params([w()], retain_decay="0.9")),
        "one_copy a string": call(TypeError, "`one_copy`.*True or False", of_params([w()], one_copy="no")),
        "one_copy with a mean": call(
            ValueError, "`retain_decay`.*one_copy", of_params([w()], one_copy=True, retain_decay=0.5)
        ),
        "one_copy in fp32": call(
            ValueError,
            "`accumulate_dtype`.*one_copy",
            of_params([w()], one_copy=True, accumulate_dtype=torch.float32),
        ),
        "too few groups of params": call(
            ValueError, "`groups`.*2.*Found 1", of_params([w(), w()], groups=["a"])
        ),
        "groups of params a string": call(TypeError, "`groups`.*str", of_params([w()], groups="a")),
        "groups of params unhashable": call(
            TypeError, r"`groups\[0\]`.*hashable", of_params([w()], groups=[[1]])
        ),
        "groups of params tensors": call(
            TypeError, r"`groups\[0\]`.*equal", of_params([w()], groups=[torch.tensor(0)])
        ),
        "backend of the buckets": call(ValueError, "`backend`.*'cuda'", of_params([w()], backend="cuda")),
        # the methods of the buckets
        **{
            f"buckets.synthesize_({name}={value!r})": call(
                error,
                f"`{name}`.*{says}",
                partial(lambda o, world: world.buckets.synthesize_(**o), {name: value}),
            )
            for error, name, value, says in (
                (ValueError, "rule", "sagp", "'sagp'"),
                (ValueError, "gamma", torch.ones(2), r"0-d.*\(2,\)"),
                (TypeError, "gamma", None, "NoneType"),
                (TypeError, "alpha", "1", "str"),
                (ValueError, "eps", -1.0, "-1"),
                (ValueError, "max_norm", -1.0, "-1"),
                (ValueError, "max_norm", NAN, "nan"),
                (TypeError, "max_norm", "1", "str"),
                (TypeError, "max_norm", True, "bool"),
                (TypeError, "max_norm", torch.tensor(1.0), "Tensor"),
                (ValueError, "nonfinite", "raise", "'raise'"),
                (ValueError, "nonfinite", None, "None"),
                (TypeError, "stats", "no", "True or False"),
                (TypeError, "reduce_gram", 3, "int"),
                (ValueError, "retain_floor", NAN, "nan"),
            )
        },
        **{
            f"synthesize_in_backward({name}={value!r})": call(
                error, says, partial(lambda o, world: world.in_backward(**o), {name: value})
            )
            for error, name, value, says in (
                (ValueError, "rule", "pcgrad_global", "`pcgrad_global` needs.*synthesize_"),
                (ValueError, "rule", gradvac(decay=0.9), "`gradvac` keeps numbers.*synthesize_"),
                (TypeError, "gamma", "1", "`gamma`.*str"),
                (TypeError, "eps", "1", "`eps`.*str"),
                (TypeError, "stats", 1, "`stats`.*True or False"),
                (TypeError, "on_update", 3, "`on_update`.*int"),
                (ValueError, "retain_floor", -1.0, "`retain_floor`.*-1"),
            )
        },
        "retain() with one copy": call(
            ValueError, r"retain should not.*synthesize_in_backward", lambda world: world.one.buckets.retain()
        ),
        "synthesize_ with one copy": call(
            ValueError, "synthesize_ should not.*one_copy", lambda world: world.one.buckets.synthesize_()
        ),
        "synthesize_ inside a capture": call(
            ValueError,
            r"Captures should be closed.*forget\(\)",
            nested_calls("forget", lambda world: world.buckets.synthesize_()),
        ),
        "zero_ inside a capture": call(
            ValueError,
            "Captures should be closed",
            nested_calls("retain", lambda world: world.buckets.zero_()),
        ),
        "a capture without a backward": call(
            ValueError, "should have a backward", nested_calls("forget", lambda world: None)
        ),
        "unscale_ by no scaler": call(
            TypeError,
            "`scaler`.*GradScaler.*NoneType",
            lambda world: world.buckets.unscale_(None, world.optimizer),
        ),
        "unscale_ of no optimizer": call(
            TypeError, "`optimizer`.*Optimizer.*list", lambda world: world.buckets.unscale_(world.scaler, [])
        ),
        "state_dict in a window": call(
            ValueError, "state_dict.*between two windows", lambda world: world.buckets.state_dict()
        ),
        "load_state_dict in a window": call(
            ValueError, "load_state_dict.*between", lambda world: world.buckets.load_state_dict(world.saved)
        ),
        **{
            f"a state that is {name}": call(
                ValueError, says, partial(lambda x, world: world.mean.buckets.load_state_dict(x), value)
            )
            for name, value, says in (
                ("a number", 3, "keys.*int"),
                ("a list", [1], "keys.*list"),
                ("empty", {}, r"keys.*\[\]"),
                ("of a model", {"w": tensor}, r"keys.*\['w'\]"),
            )
        },
        **{
            f"load_state_dict({name})": call(error, says, partial(lambda o, world: world.load(**o), options))
            for name, error, says, options in (
                ("mean a list", TypeError, "`state.*retain_mean.*dict", {"retain_mean": [tensor]}),
                ("mean of others", ValueError, "one of `z`", {"retain_mean": {"z": tensor}}),
                ("mean an array", TypeError, "`w`.*Tensor.*ndarray", {"mean": np.ones(3)}),
                ("mean that broadcasts", ValueError, r"`w`.*\(3,\).*\(1,\)", {"mean": torch.ones(1)}),
                ("mean of ints", TypeError, "'w'.*int64", {"mean": torch.ones(3, dtype=torch.int64)}),
                ("complex mean", TypeError, "'w'.*complex64", {"mean": torch.ones(3) * 1j}),
                ("sparse mean", TypeError, "'w'.*dense", {"mean": torch.ones(3).to_sparse()}),
                ("mean on meta", ValueError, "'w'.*meta", {"mean": torch.ones(3, device="meta")}),
                ("weight NaN", ValueError, "retain_weight.*nan", {"retain_weight": NAN}),
                ("weight a string", TypeError, "retain_weight.*str", {"retain_weight": "1"}),
                ("weight 0", ValueError, "retain_weight.*positive", {"retain_weight": 0.0}),
                ("rules a list", TypeError, "rules.*dict.*list", {"rules": [1]}),
                ("rule in fp32", ValueError, "gradvac.*fp64.*float32", {"rule": torch.zeros(2, 1)}),
                ("rule a vector", ValueError, "gradvac.*groups, n", {"rule": torch.zeros(2).double()}),
                ("draws a tuple", TypeError, "draws.*dict.*tuple", {"draws": (1, 2)}),
                ("draws of tuples", ValueError, "int64.*tuple", {"draws": {"graddrop": (1, 2)}}),
            )
        },
        # rules
        "a rule without a function": call(TypeError, "`coefficients`.*callable.*str", of_rule("f")),
        "three arguments": call(
            ValueError,
            r"`coefficients`.*\(ff, fr, rr, gamma, alpha\).*TypeError",
            of_rule(lambda ff, fr, rr: 0),
        ),
        "six arguments": call(ValueError, "`coefficients`.*TypeError", of_rule(lambda a, b, c, d, e, f: 0)),
        "one coefficient": call(ValueError, "tuple of 2 numbers.*not gated", returning(1.0)),
        "three coefficients": call(ValueError, "tuple of 2 numbers", returning(1.0, 1.0, 1.0)),
        "two coefficients with a gate": call(
            ValueError, "tuple of 4 numbers.*is gated", of_rule(add, gated=True)
        ),
        "no coefficients": call(ValueError, "tuple.*None", of_rule(lambda *numbers: None)),
        "a list of coefficients": call(ValueError, "tuple", of_rule(lambda *numbers: [1.0, 1.0])),
        "a generator of coefficients": call(ValueError, "tuple", of_rule(lambda *n: (x for x in n[3:]))),
        "a coefficient as a string": call(ValueError, "numbers", returning("1", 1.0)),
        "a complex coefficient": call(ValueError, "number is real", returning(1j, 1.0)),
        "a complex tensor of coefficients": call(ValueError, "is real", returning(torch.tensor(1j), 1.0)),
        "a coefficient on meta": call(ValueError, "numbers", returning(torch.ones((), device="meta"), 1.0)),
        "coefficients of another shape": call(ValueError, "shape `.groups.`", returning(torch.ones(3), 1.0)),
        "coefficients of a fixed shape": call(
            ValueError,
            r"'mine'.*\(1,\) here.*\(2,\)",
            on_sums(lambda ff: torch.ones(2).double() + 0.0 * ff[:1]),
        ),
        "a column of coefficients": call(
            ValueError, "shape `.groups.`", of_rule(lambda *n: (n[0][:, None], n[4]), "tensor")
        ),
        "Python's if": call(
            ValueError,
            "where.*instead of `if`",
            of_rule(lambda *n: (n[3] if n[1] < 0 else n[4], n[4]), "tensor"),
        ),
        "item()": call(
            ValueError, "`coefficients`.*as tensors", of_rule(lambda *n: (n[0].item(), n[4]), "tensor")
        ),
        "a division by 0": call(ValueError, "ZeroDivisionError", of_rule(lambda *n: (1 / 0, n[4]))),
        "an operation in place": call(
            ValueError,
            "not change its arguments.*without `_`",
            of_rule(lambda *n: (n[0].mul_(2), n[4]), "tensor"),
        ),
        "scope": call(ValueError, "`scope`.*'layer'", of_rule(add, "layer")),
        "scope None": call(ValueError, "`scope`.*None", of_rule(add, None)),
        "an elementwise rule that reads": call(
            ValueError, "`scope`.*'element'.*reads `fr`", of_rule(lambda *n: (n[3] + n[1], n[4]))
        ),
        "name": call(TypeError, "`name`.*str.*int", lambda world: sago.Rule(3, add, "element")),
        **{
            f"{name} of a rule": call(TypeError, f"`{name}`.*{says}", of_rule(add, **{name: value}))
            for name, value, says in (
                ("gated", "no", "bool.*str"),
                ("by_class", 1, "bool.*int"),
                ("formula", 3, "str.*int"),
                ("source", None, "str.*NoneType"),
                ("guarantees", True, "Guarantees.*bool"),
                ("state", 3, "tuple of numbers.*3"),
                ("state", ("a",), "tuple of numbers"),
            )
        },
        "by_class without a gate": call(
            ValueError, "`by_class`.*without a `gate`", of_rule(add, by_class=True)
        ),
        "a seed without a gate": call(ValueError, "`seed`.*without a `gate`", of_rule(add, seed=1)),
        "a gate with gated": call(ValueError, "`gate`.*gated=True", of_rule(add, gate=sum, gated=True)),
        "a gate that is no function": call(ValueError, "`gate`.*not callable", of_rule(add, gate="sign")),
        "a gate of other numbers": call(
            ValueError, "`gate`.*0.0, 1.0 or 2.0", of_rule(add, gate=lambda f, r: f)
        ),
        "a state without its new value": call(
            ValueError, "tuple of 3 numbers.*keeps 1", of_rule(lambda *n: n[3:5], state=(0.0,))
        ),
        **{
            f"{factory.__name__}{arguments}": call(
                ValueError, f"`{name}`", partial(lambda f, a, world: f(*a), factory, arguments)
            )
            for factory, name, arguments in (
                (cagrad, "radius", (-1,)),
                (cagrad, "radius", (NAN,)),
                (cagrad, "radius", ("a",)),
                (gru, "lowest_cosine", (0.5,)),
                (gru, "lowest_cosine", ("a",)),
                (gradvac, "target", (2.0,)),
                (gradvac, "target", ("a",)),
                (gradvac, "target", (torch.ones(1),)),
                (gradvac, "decay", (0.0, 2.0)),
                (gradvac, "decay", (0.0, "a")),
                (graddrop, "seed", (1.5,)),
                (graddrop, "seed", (2**64,)),
            )
        },
        "check_rule of no rule": call(TypeError, "`rule`.*NoneType", lambda world: check_rule(None)),
        "check_rule with a wrong reference": call(
            TypeError, "`reference`.*function.*int", lambda world: check_rule("sago", reference=3)
        ),
        # lists
        "one generator for both sides": call(
            ValueError, "same length.*1 and 0", lambda world: sago.synthesize_(*[iter([world.f])] * 2)
        ),
        "a generator of groups": call(
            TypeError,
            "`groups`.*generator.*list",
            lambda world: sago.synthesize_([world.f], [world.r], groups=(x for x in "a")),
        ),
        "a plan with a random gate": call(
            ValueError, "random gate.*GradientBuckets", lambda world: sago.Plan(world.f, world.r, "graddrop")
        ),
        # reports, monitor, ranks, trainer
        **{
            f"regroup by {value!r}": call(
                error, f"`groups.*{says}", partial(lambda x, world: world.report.regroup(x), value)
            )
            for error, value, says in (
                (ValueError, ["a"], "2 keys.*row of the report.*Found 1"),
                (TypeError, "ab", r"str. Write `\[key\(name\)"),
                (TypeError, None, "NoneType"),
                (TypeError, [[1], [2]], "hashable"),
                (TypeError, [torch.tensor(1)] * 2, "equal"),
            )
        },
        **{
            f"keep={value!r}": call(ValueError, "`keep`", partial(lambda x, world: ConflictMonitor(x), value))
            for value in (0, -1, 1.5, "10", True, None)
        },
        "monitor.add(None)": call(TypeError, "`report`.*NoneType", lambda world: world.monitor.add(None)),
        "monitor.add without statistics": call(
            ValueError, "`report`.*stats=True", lambda world: world.monitor.add(world.without)
        ),
        "monitor.add at an earlier step": call(
            ValueError, "`step`.*5.*clear", lambda world: world.monitor.add(world.report, 5)
        ),
        "monitor.add at no step": call(
            TypeError, "`step`.*integer.*str", lambda world: world.monitor.add(world.report, "6")
        ),
        "SumOver without ranks": call(
            ValueError, "should be initialised.*init_process_group", lambda world: SumOver()
        ),
        **{
            f"Synthesis({name}={value!r})": call(
                error, f"`{name}`.*{says}", partial(lambda o, world: Synthesis(**o), {name: value})
            )
            for error, name, value, says in (
                (ValueError, "rule", "sagp", "'sagp'"),
                (TypeError, "rule", {"name": "cagrad"}, "dict"),
                (TypeError, "groups", "layer", "str.*Synthesis.of"),
                (ValueError, "nonfinite", "zero", "'zero'"),
                (ValueError, "accumulate_dtype", "float32", "float64.*float32"),
                (TypeError, "stats", "no", "True or False"),
                (TypeError, "one_copy", 1, "True or False"),
                (ValueError, "retain_floor", -1.0, "-1"),
            )
        },
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_refused_changes_nothing(name, world):
    error, says, function = CALLS[name]
    before = world.state()
    with pytest.raises((ValueError, TypeError), match=f"(?s){says}") as caught:
        function(world)
    assert caught.type is error
    assert world.state() == before


def test_how_many_there_are():
    assert len(LISTS) + len(CALLS) >= 300


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("wrong", [3, torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 7)])
def test_reduce_gram_gives_something_else(backend, wrong):
    retain = -ones(3)
    with pytest.raises(ValueError, match=r"`reduce_gram`.*Found"):
        sago.synthesize_(ones(3), retain, "pcgrad", reduce_gram=lambda table: wrong, backend=backend)
    assert torch.equal(retain, -ones(3))


def test_triton_asked_for_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choose, "triton_version", lambda: "3.9.0")
    retain = -ones(3)
    with pytest.raises(ValueError, match=r"'triton'.*GPU.*CPU"):
        sago.synthesize_(ones(3), retain, backend="triton")
    assert torch.equal(retain, -ones(3))


def test_triton_asked_for_without_triton(monkeypatch):
    monkeypatch.setattr(choose, "triton_version", lambda: None)
    retain = -ones(3)
    with pytest.raises(ValueError, match=r"'triton'.*Triton.*none"):
        sago.synthesize_(ones(3), retain, backend="triton")
    assert torch.equal(retain, -ones(3))


@pytest.mark.gpu
def test_devices_that_differ():
    f, r = ones(3), ones(3, device="cuda")
    for forget, retain, out in ((f, r, None), (r, f, None), (r, r, [f])):
        with pytest.raises(ValueError, match=r"same device.*(cpu.*cuda|cuda.*cpu)"):
            sago.synthesize_(forget, retain, out=out)
    with pytest.raises(ValueError, match=r"'compiled'.*CPU.*cuda"):
        sago.synthesize_(r, r, backend="compiled")
    with pytest.raises(ValueError, match=r"`gamma`.*device"):
        sago.synthesize_(f, f, gamma=ones(device="cuda"))
    assert torch.equal(r.cpu(), f)


# What looks like a mistake and is none.


def test_exact_aliases_are_accepted():
    f, r = ones(2, 3), -ones(2, 3)
    expected, _ = sago.synthesize(f, r, alpha=2.0)
    for side in (0, 1):
        both = f.clone(), r.clone()
        sago.synthesize_(*both, alpha=2.0, out=both[side].view(2, 3))
        assert equal_bits(both[side], expected)


def test_forget_may_be_retain():
    f = ones(5)
    sago.synthesize_(f, f, "sum")
    assert torch.equal(f, 2 * ones(5))


def test_neighbours_and_interleaved_columns_are_accepted():
    buffer = torch.arange(1.0, 41.0)
    matrix = buffer.clone().view(5, 8)
    for forget, retain in (
        (buffer[:20], buffer[20:]),
        (matrix[:, ::2], matrix[:, 1::2]),
        (matrix[:, :4], matrix[:, 4:]),
    ):
        expected = 2 * retain + forget
        sago.synthesize_(forget, retain, "sum", alpha=2.0)
        assert torch.equal(retain, expected)


def test_one_forget_gradient_for_two_retain_gradients():
    f = ones(4)
    updates, _ = sago.synthesize([f, f], [-ones(4), ones(4)])
    assert torch.equal(updates[0], -ones(4))
    assert torch.equal(updates[1], ones(4))


def test_weights_of_many_kinds():
    for weight in (2, 2.0, np.float32(2), np.float64(2), Fraction(2), torch.tensor(2), torch.tensor(2.0)):
        update, _ = sago.synthesize(ones(3), ones(3), gamma=weight, eps=0)
        assert torch.equal(update, 2 * ones(3))


# Calls inside of transforms, which follow the operations of torch and see no write to memory.


def in_dual_level(function):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(ones(3), ones(3)))


TRANSFORMS = {
    r"torch\.func\.vmap": lambda f: torch.func.vmap(f)(ones(2, 3)),
    r"torch\.func\.grad": lambda f: torch.func.grad(lambda t: f(t).sum())(ones(3)),
    r"torch\.func\.jvp": lambda f: torch.func.jvp(f, (ones(3),), (ones(3),)),
    r"torch\.func\.functionalize": lambda f: torch.func.functionalize(f)(ones(3)),
    r"forward_ad\.dual_level": in_dual_level,
    r"torch\.jit\.trace": lambda f: torch.jit.trace(f, (ones(3),)),
}
# Each with tensors of the transform, or with those of outside.
INSIDE = {
    "synthesize_": lambda world, t: sago.synthesize_([t], [world.r]),
    "synthesize_ on others": lambda world, t: sago.synthesize_([world.f], [world.r]),
    "synthesize": lambda world, t: sago.synthesize([t], [t]),
    "Plan": lambda world, t: sago.Plan([world.f], [world.r]),
    "a plan": lambda world, t: world.plan.synthesize_(),
    "buckets.synthesize_": lambda world, t: world.buckets.synthesize_(),
    "synthesize_in_backward": lambda world, t: world.in_backward(),
    "the reference": lambda world, t: reference.synthesize([t], [t]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("call", INSIDE)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_calls_inside_transforms_are_refused_by_their_name(name, call, world):
    sago.synthesize_([world.f], [world.r])  # such a list is not checked again
    before = world.state()

    def transformed(t):
        INSIDE[call](world, t)
        return t

    with pytest.raises(ValueError, match=rf"outside of.*Found a call inside (torch\.autograd\.)?{name}\. "):
        TRANSFORMS[name](transformed)
    assert world.state() == before


def test_gradients_of_transforms_are_synthesized_after_them():
    """The way out that the error names."""
    f, r = (torch.func.vmap(torch.func.grad(lambda t, k=k: (k * t).sum()))(ones(2, 3)) for k in (2.0, -3.0))
    sago.synthesize_(f, r)
    assert torch.equal(r, torch.full((2, 3), -3.0))


@pytest.mark.parametrize("weight", [NAN, INF, -INF])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad", "cautious"])
def test_a_weight_that_is_not_finite_is_seen_in_the_update(rule, on_device, weight):
    """No error is raised, because the host does not read the value of a weight in a tensor."""
    f = r = torch.tensor([1.0, -2.0, 3.0])
    gamma = torch.tensor(weight) if on_device else weight
    update, _ = sago.synthesize(f, 2 * r, rule, gamma=gamma)
    assert not update.isfinite().any()
