"""The arithmetic of the emulator, against exact fractions and torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.program import THREADS, Unknown, parse
from tests.ptx.semantics import NAMES, Translator, fma, smaller, to_bf16, to_f16


def numbers(count, seed, exponents=(-20, 20)):
    generator = np.random.default_rng(seed)
    scale = np.exp2(generator.integers(*exponents, count).astype(np.float64))
    return (generator.standard_normal(count) * scale).astype(np.float32)


def nearest(exact):
    """The fp32 number that is nearest to a fraction; the one with an even last bit if two are."""
    x = np.float32(float(exact))  # within one unit in the last place, in spite of two roundings
    candidates = [np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


@pytest.mark.parametrize("kind", ["any", "cancelling", "halfway", "small"])
def test_a_fused_multiply_add_rounds_once(kind):
    x, y, z = (numbers(500, seed) for seed in range(3))
    if kind == "cancelling":
        z = -(x * y)
    if kind == "halfway":  # the product is just below half of the last bit of an odd z: fp64 would see a tie
        k = np.arange(1, 501, dtype=np.float32) * np.float32(2**-20)
        x, y, z = (1 + k) * np.float32(2**-12), (1 - k) * np.float32(2**-12), np.full_like(x, 1 + 2**-23)
    if kind == "small":
        x, y, z = x * np.float32(2**-70), y * np.float32(2**-70), z * np.float32(2**-140)
    found = fma(x, y, z)
    expected = [
        nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))
        for a, b, c in zip(x, y, z, strict=True)
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_conversions_to_16_bits():
    x = np.concatenate([numbers(5000, 3), numbers(5000, 4, (-140, -120)), [0.0, -0.0, np.inf, -np.inf]])
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        for convert, dtype in ((to_bf16, torch.bfloat16), (to_f16, torch.float16)):
            expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(convert(x), expected)
    assert to_bf16(np.array([np.nan], np.float32)).item() == 0x7FFF


def test_the_minimum_with_nan():
    x, y = np.array([1.0, np.nan, 2.0, np.nan]), np.array([2.0, 1.0, np.nan, np.nan])
    np.testing.assert_array_equal(smaller(x, y), [1.0, np.nan, np.nan, np.nan])


def execute(text, **registers):
    """The bits of `%r0` or `%p0` after one instruction. Registers are given as arrays of 128 numbers."""
    (one,) = parse(f".entry kernel() .reqntid 128 {{\n{text}\n}}").segments[0]
    translator = Translator()
    line = translator.line(one)
    given = {f"%{name}": x for name, x in registers.items()}
    values = [given.get(name) for name in translator.registers]
    exec(line, {**NAMES, "k": translator.constants, "v": values})
    return values[translator.registers["%p0" if "%p0" in text else "%r0"]]


def every(*numbers):
    return np.resize(np.array(numbers, np.float32), THREADS).view(np.uint32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lt", [0, 0, 0, 0]),
        ("ge", [1, 1, 0, 0]),
        ("ltu", [0, 0, 1, 1]),
        ("leu", [1, 0, 1, 1]),
        ("gtu", [0, 1, 1, 1]),
        ("ne", [0, 1, 0, 0]),
        ("neu", [0, 1, 1, 1]),
        ("nan", [0, 0, 1, 1]),
    ],
)
def test_comparisons_with_nan(name, expected):
    x, y = every(1.0, 2.0, np.nan, 1.0), every(1.0, 1.0, 1.0, np.nan)
    found = execute(f"setp.{name}.f32 %p0, %r1, %r2;", r1=x, r2=y)
    assert found[:4].tolist() == [bool(e) for e in expected]


def test_integers_become_floats_with_one_rounding():
    x = np.full(THREADS, 0xFFFFFF7F, np.uint32)
    found = {s: execute(f"cvt.rn.f32.{s} %r0, %r1;", r1=x).view(np.float32)[0] for s in ("u32", "s32")}
    assert found == {"u32": 2.0**32 - 256.0, "s32": -129.0}


def test_fields_of_bits():
    x = np.full(THREADS, 0xABCD1234, np.uint32)
    assert execute("bfe.u32 %r0, %r1, 8, 12;", r1=x)[0] == 0xD12
    assert execute("bfe.s32 %r0, %r1, 28, 4;", r1=x)[0] == 0xFFFFFFFA


def test_the_products_of_integers():
    x, y = np.full(THREADS, 0xFFFFFFFF, np.uint32), np.full(THREADS, 3, np.uint32)
    assert execute("mul.lo.s32 %r0, %r1, %r2;", r1=x, r2=y)[0] == 0xFFFFFFFD
    assert execute("mad.lo.s32 %r0, %r1, %r2, 5;", r1=x, r2=y)[0] == 2


@pytest.mark.parametrize(
    "text",
    ["mad.rn.f32 %r0, %r1, %r2, %r3;", "setp.lt.f32 %p0|%p1, %r1, %r2;", "fma.rn.f64 %r0, %r1, %r2, %r3;"],
)
def test_forms_that_are_refused(text):
    with pytest.raises(Unknown):
        execute(text, r1=every(1.0), r2=every(2.0), r3=every(3.0))
