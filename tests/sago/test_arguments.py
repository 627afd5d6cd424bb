"""Every bad input: which error, what it says, and that not a bit has changed.

Each case makes the tensors of a call that is right, and what is wrong about it.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import sago
from sago.backends import choose
from tests.support.properties import equal_bits


def ones(*shape, **options):
    return torch.full(shape, 1.5, **options)


class Case(NamedTuple):
    error: type[Exception]
    says: str
    options: dict[str, Any]


def case(error, says, **options):
    return Case(error, says, options)


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
        # dtypes and layouts
        "integer forget": case(
            TypeError, r"`forget\[0\]`.*float16.*torch.int64", forget=[torch.ones(3, dtype=torch.int64)]
        ),
        "integer retain": case(
            TypeError, r"`retain\[0\]`.*torch.int8", retain=[torch.ones(3, dtype=torch.int8)]
        ),
        "bool": case(TypeError, r"`forget\[0\]`.*torch.bool", forget=[torch.ones(3, dtype=torch.bool)]),
        "integer out": case(TypeError, r"`out\[0\]`.*torch.int32", out=[torch.ones(3, dtype=torch.int32)]),
        "complex": case(
            TypeError, r"`retain\[0\]`.*torch.complex64", retain=[torch.ones(3, dtype=torch.complex64)]
        ),
        "float8": case(TypeError, r"`forget\[0\]`.*float8", forget=[ones(3).to(torch.float8_e5m2)]),
        "sparse": case(TypeError, r"`forget\[0\]`.*dense.*sparse_coo", forget=[ones(3).to_sparse()]),
        "sparse out": case(TypeError, r"`out\[0\]`.*dense.*sparse_coo", out=[ones(3).to_sparse()]),
        "meta forget": case(ValueError, r"`forget\[0\]`.*meta", forget=[ones(3, device="meta")]),
        "meta pair": case(
            ValueError,
            r"`forget\[0\]`.*meta",
            forget=[ones(3, device="meta")],
            retain=[ones(3, device="meta")],
        ),
        "meta out": case(ValueError, r"`out\[0\]`.*meta", out=[ones(3, device="meta")]),
        # not tensors
        "forget a number": case(TypeError, "`forget`.*tensor or a sequence.*float", forget=1.0),
        "forget None": case(TypeError, "`forget`.*NoneType", forget=None),
        "retain None": case(TypeError, "`retain`.*NoneType", retain=None),
        "retain a string": case(TypeError, "`retain`.*str", retain="retain"),
        "a list of numbers": case(
            TypeError, r"`forget\[0\]`.*tensor or None.*float", forget=[1.0, 2.0, 3.0], retain=[ones(1)] * 3
        ),
        "a list of lists": case(TypeError, r"`retain\[0\]`.*list", retain=[[1.0, 2.0, 3.0]]),
        "out a number": case(TypeError, "`out`.*int", out=3),
        "out of numbers": case(TypeError, r"`out\[0\]`.*int", out=[3]),
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
        "rule a function": case(TypeError, "`rule`.*function", rule=ones),
        "unknown backend": case(ValueError, "`backend`.*compiled.*Found 'cuda'", backend="cuda"),
        "backend a number": case(ValueError, "`backend`.*Found 3", backend=3),
        "too many groups": case(ValueError, "`groups`.*1.*Found 2", groups=["a", "b"]),
        "too few groups": case(ValueError, "`groups`.*1.*Found 0", groups=[]),
        "groups a string": case(TypeError, "`groups`.*str", groups="a"),
        "groups a number": case(TypeError, "`groups`.*int", groups=1),
        "groups a function": case(TypeError, "`groups`.*function. Pass a list", groups=ones),
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
            )
        },
        "eps negative": case(ValueError, "`eps`.*not negative.*-1e-10", eps=-1e-10),
        "eps NaN": case(ValueError, "`eps`.*nan", eps=float("nan")),
        "eps inf": case(ValueError, "`eps`.*inf", eps=float("inf")),
        "eps string": case(TypeError, "`eps`.*str", eps="0"),
        "eps tensor": case(TypeError, "`eps`.*Tensor", eps=torch.tensor(0.0)),
        "reduce_gram": case(TypeError, "`reduce_gram`.*callable.*str", reduce_gram="sum"),
    }


CASES = cases()


@pytest.fixture(params=CASES)
def bad(request):
    return CASES[request.param]


def tensors_of(options):
    for value in options.values():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, torch.Tensor):
                yield t


def state(t):
    """Every byte that a tensor shows, and how it shows it."""
    if t.layout != torch.strided:
        t = t.to_dense()
    memory = b"" if t.is_meta else bytes(t.untyped_storage())
    return t.shape, t.dtype, t.stride(), memory, t._version


def test_the_call_without_the_mistake_is_right():
    sago.synthesize_([ones(3)], [ones(3)], out=[ones(3)])


def test_error_and_nothing_written(bad):
    options = {"forget": [ones(3)], "retain": [ones(3)], **bad.options}
    before = [state(t) for t in tensors_of(options)]
    with pytest.raises((ValueError, TypeError), match=f"(?s){bad.says}") as caught:
        sago.synthesize_(**options)
    assert caught.type is bad.error
    assert [state(t) for t in tensors_of(options)] == before


OF_OUTPUTS = ("out", "in place", "share", "output", "overlap")  # new tensors share nothing with the inputs


@pytest.mark.parametrize(
    "name",
    [n for n, c in CASES.items() if "out" not in c.options and not any(w in n + c.says for w in OF_OUTPUTS)],
)
def test_out_of_place_refuses_the_same(name):
    error, says, options = CASES[name]
    with pytest.raises(error, match=f"(?s){says}"):
        sago.synthesize(**{"forget": [ones(3)], "retain": [ones(3)], **options})


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("wrong", [3, torch.zeros(1, 2, dtype=torch.float64)])
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
