"""Translates PTX instructions into Python code over numpy arrays with one value for each thread.

A register is an array of unsigned integers of its width, and a predicate one of booleans. An instruction
looks at the bits as its types say. An instruction that is not listed raises Unknown.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import THREADS, Instruction, Unknown

_RAW = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
_CLASSES = {"%rs": 16, "%r": 32, "%rd": 64, "%f": 32, "%fd": 64}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
_UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # of floats: true unless this comparison is


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even; NaN becomes the canonical one."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in fp32 with one rounding.

    The product is exact in fp64. Where the sum is not, its last bit is made odd, so that the second rounding
    gives what a single one would (Boldo and Melquiond, 2008).
    """
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    even = total.view(np.uint64) & np.uint64(1) == 0
    away = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    found: np.ndarray = np.where((error != 0) & np.isfinite(total) & even, away, total).astype(np.float32)
    return found


def smaller(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The minimum, or NaN if one of them is NaN."""
    return np.where(np.isnan(x), x, np.where(np.isnan(y), y, np.minimum(x, y)))


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two values of one width in one of twice the width."""
    return np.stack([low, high], axis=1).reshape(-1).view(f"u{2 * low.itemsize}")


def half(x: np.ndarray, which: int) -> np.ndarray:
    return np.ascontiguousarray(x.view(f"u{x.itemsize // 2}")[which::2])


def unwritten(register: str) -> np.ndarray:
    """A register before an instruction writes it: the bits of NaN, or false."""
    if register.startswith("%p"):
        return np.zeros(THREADS, bool)
    return ~np.zeros(THREADS, f"u{register_bits(register) // 8}")


def full(value: Any) -> np.ndarray:
    return np.full(THREADS, value)


NAMES = {"np": np, **{f.__name__: f for f in (from_bf16, to_bf16, to_f16, fma, smaller, pack, half, full)}}


class Translator:
    """Writes the code of straight-line instructions. `registers` numbers the registers of the program."""

    def __init__(self) -> None:
        self.registers: dict[str, int] = {}
        self.constants: list[Any] = []

    def line(self, one: Instruction) -> str:
        """A statement over `v`, the registers, and `k`, the constants."""
        name, types = one.opcode[0], _types(one.opcode)
        write = _WRITERS.get(name)
        if write is None:
            raise Unknown(f"Unknown instruction: {one.text}")
        modifiers = [x for x in one.opcode[1:] if x not in types]
        known = _MODIFIERS.get(name, ())
        rounds = name in ("add", "sub", "mul", "div", "sqrt", "fma") and types[0][0] == "f"
        if any(x not in known for x in modifiers) or (rounds and "rn" not in modifiers):
            raise Unknown(f"Unknown modifiers: {one.text}")
        targets, value = write(self, one, types)
        lines = []
        for i, target in enumerate(targets):
            if target == "_":
                continue
            found = value if len(targets) == 1 else f"both[{i}]"
            if one.predicate:
                # `~` would make -1 of a predicate that is no array.
                found = f"np.where({self._predicate(one)}, {found}, {self.register(target)})"
            lines.append(f"{self.register(target)} = {found}")
        if len(targets) > 1:
            lines.insert(0, f"both = {value}")
        return "; ".join(lines)

    def _predicate(self, one: Instruction) -> str:
        assert one.predicate is not None
        return f"{'~' if one.negated else ''}{self.register(one.predicate)}"

    def register(self, name: str) -> str:
        if not re.fullmatch(r"%(p|rs|rd|r|f|fd)\d+", name):
            raise Unknown(f"Unknown register: {name}")
        return f"v[{self.registers.setdefault(name, len(self.registers))}]"

    def value(self, operand: str, kind: str) -> str:
        """An operand, as an array or a constant of a type such as `s32` or `bf16`."""
        if operand == "%tid.x":
            return "tid"
        if operand == "%ctaid.x":
            return "ctaid"
        if operand.startswith("%"):
            found = self.register(operand)
            if kind == "pred":
                return found
            if register_bits(operand) != bits(kind):
                raise Unknown(f"Unknown use of {operand} as {kind}")
            if kind == "bf16":
                return f"from_bf16({found})"
            return found if kind[0] in "ub" else f"{found}.view('{view(kind)}')"
        self.constants.append(constant(operand, kind))
        return f"k[{len(self.constants) - 1}]"


def bits(kind: str) -> int:
    """The width of a type; of `bf16x2` that of both."""
    found = re.fullmatch(r"[a-z]+(\d+)(x2)?", kind)
    if found is None:
        raise Unknown(f"Unknown type: {kind}")
    return int(found[1]) * (2 if found[2] else 1)


def view(kind: str) -> str:
    """The numpy dtype of one element of a type."""
    return f"{_KINDS[kind[0]]}{bits(kind.removesuffix('x2')) // 8}"


def constant(operand: str, kind: str) -> Any:
    """A constant of the given type."""
    if kind == "bf16":
        raise Unknown(f"Unknown constant of type bf16: {operand}")
    if operand == "global_smem":  # shared memory begins at 0
        return np.dtype(view(kind)).type(0)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
        return np.float32(struct.unpack(">f", bytes.fromhex(operand[2:]))[0]).view(view(kind))
    if re.fullmatch(r"0d[0-9A-Fa-f]{16}", operand):
        return np.float64(struct.unpack(">d", bytes.fromhex(operand[2:]))[0]).view(view(kind))
    width = bits(kind)
    number = int(operand, 0) % 2**width
    return _RAW[width](number).view(view(kind))


def register_bits(register: str) -> int:
    return _CLASSES[re.sub(r"\d+$", "", register)]


def _types(opcode: tuple[str, ...]) -> list[str]:
    return [x for x in opcode[1:] if re.fullmatch(r"(pred|[subf]\d+|bf16)(x2)?", x)]


def _raw(value: str, kind: str) -> str:
    """The bits of a value of this type."""
    return value if kind[0] in "ubp" else f"{value}.view('u{bits(kind) // 8}')"


Written = tuple[list[str], str]
Writer = Callable[[Translator, Instruction, list[str]], Written]


def _arithmetic(operator: str) -> Writer:
    def write(t: Translator, one: Instruction, types: list[str]) -> Written:
        target, *operands = one.operands
        kind = types[0]
        if kind.startswith("bf"):
            raise Unknown(f"Unknown instruction: {one.text}")
        if len(types) == 2:  # `sub.rn.f32.bf16`: the first operand has the second type
            x, y = t.value(operands[0], types[1]), t.value(operands[1], types[0])
            values = [x if types[1] == "bf16" else f"{x}.astype('f4')", y]
        else:
            values = [t.value(o, kind) for o in operands]
        return [target], _raw(f"({operator.format(*values)})", kind)

    return write


def _multiply(t: Translator, one: Instruction, types: list[str]) -> Written:
    (kind,) = types
    if kind[0] == "f" and one.opcode[0] == "mul":
        return _arithmetic("{} * {}")(t, one, types)
    x, y = (t.value(o, kind) for o in one.operands[1:3])
    width = bits(kind)
    if "wide" in one.opcode:
        large = f"{_KINDS[kind[0]]}{width // 4}"
        x, y, width = f"{x}.astype('{large}')", f"{y}.astype('{large}')", 2 * width
    elif "lo" not in one.opcode:
        raise Unknown(f"Unknown instruction: {one.text}")
    value = f"({x} * {y}).view('u{width // 8}')"
    if one.opcode[0] == "mad":
        value = f"({value} + {t.value(one.operands[3], f'u{width}')})"
    return one.operands[:1], value


def _fused(t: Translator, one: Instruction, types: list[str]) -> Written:
    if types[0] not in ("f32", "f32x2"):
        raise Unknown(f"Unknown instruction: {one.text}")
    if len(types) == 1:
        return _arithmetic("fma({}, {}, {})")(t, one, types)
    target, x, y, z = one.operands  # `fma.rn.f32.bf16`: the factors have the second type
    factors = (
        t.value(o, types[1]) if types[1] == "bf16" else f"{t.value(o, types[1])}.astype('f4')" for o in (x, y)
    )
    return [target], _raw("fma({}, {}, {})".format(*factors, t.value(z, types[0])), types[0])


def _field(t: Translator, one: Instruction, types: list[str]) -> Written:
    """`bfe`: bits `start` to `start + length` as a number."""
    target, x, start, length = one.operands
    kind, width = types[0], bits(types[0])
    start, length = int(start), int(length)
    if start + length > width:
        raise Unknown(f"Unknown instruction: {one.text}")
    t.constants += [np.dtype(view(kind)).type(n) for n in (width - start - length, width - length)]
    left, right = (f"k[{len(t.constants) - i}]" for i in (2, 1))
    return [target], _raw(f"(({t.value(x, kind)} << {left}) >> {right})", kind)


def _minimum(t: Translator, one: Instruction, types: list[str]) -> Written:
    x, y = (t.value(o, types[0]) for o in one.operands[1:])
    if one.opcode[:2] == ("min", "NaN") and types[0] in ("f32", "f64"):
        return one.operands[:1], _raw(f"smaller({x}, {y})", types[0])
    if types[0] in ("f32", "f64") and "NaN" not in one.opcode:  # the other one if one of them is NaN
        return one.operands[:1], _raw(f"np.f{one.opcode[0]}({x}, {y})", types[0])
    if types[0][0] not in "su" or "NaN" in one.opcode:
        raise Unknown(f"Unknown instruction: {one.text}")
    return one.operands[:1], _raw(f"np.{one.opcode[0]}imum({x}, {y})", types[0])


def _shift(operator: str) -> Writer:
    def write(t: Translator, one: Instruction, types: list[str]) -> Written:
        amount = int(one.operands[2], 0)
        if not 0 <= amount < bits(types[0]):
            raise Unknown(f"Unknown shift: {one.text}")
        x = t.value(one.operands[1], types[0])
        t.constants.append(np.dtype(view(types[0])).type(amount))
        return one.operands[:1], _raw(f"({x} {operator} k[{len(t.constants) - 1}])", types[0])

    return write


def _set_predicate(t: Translator, one: Instruction, types: list[str]) -> Written:
    operator = next(x for x in one.opcode[1:] if x not in types)
    kind = types[0].removesuffix("x2")
    targets = one.operands[0].split("|")
    if len(targets) != (2 if types[0].endswith("x2") else 1):
        raise Unknown(f"Unknown comparison: {one.text}")
    x, y = (
        f"from_bf16({t.register(o)}.view('u2'))" if types[0] == "bf16x2" else t.value(o, types[0])
        for o in one.operands[1:]
    )
    floats = kind[0] == "f" or kind == "bf16"
    if operator == "nan" and floats:
        value = f"(np.isnan({x}) | np.isnan({y}))"
    elif operator == "neu" and floats:  # or one of them is NaN
        value = f"({x} != {y})"
    elif operator == "ne":
        value = f"(({x} < {y}) | ({x} > {y}))" if floats else f"({x} != {y})"
    elif operator in _UNORDERED and floats:
        value = f"~({x} {_UNORDERED[operator]} {y})"
    elif operator in _COMPARE:
        value = f"({x} {_COMPARE[operator]} {y})"
    else:
        raise Unknown(f"Unknown comparison: {one.text}")
    if types[0].endswith("x2"):
        return targets, f"np.ascontiguousarray({value}.reshape(-1, 2).T)"
    return targets, value


def _select(t: Translator, one: Instruction, types: list[str]) -> Written:
    target, x, y, predicate = one.operands
    kind = f"u{bits(types[0])}"
    return [target], f"np.where({t.register(predicate)}, {t.value(x, kind)}, {t.value(y, kind)})"


def _convert(t: Translator, one: Instruction, types: list[str]) -> Written:
    to, source = types
    values = [t.value(o, source) for o in one.operands[1:]]
    if to in ("bf16x2", "f16x2") and source == "f32":
        high, low = values
        return one.operands[:1], f"pack(to_{to[:-2]}({low}), to_{to[:-2]}({high}))"
    if to in ("bf16", "f16") and source == "f32":
        return one.operands[:1], f"to_{to}({values[0]})"
    narrows = bits(to) < bits(source)
    floats = to in ("f32", "f64") and source[0] in "fb" and not (narrows and "rn" not in one.opcode)
    floats |= to == "f32" and source in ("s32", "u32") and "rn" in one.opcode
    if floats or (to[0] in "su" and source[0] in "su"):
        value = f"{values[0]}.astype('{view(to)}')"
        return one.operands[:1], _raw(value, to)
    raise Unknown(f"Unknown conversion: {one.text}")


def _move(t: Translator, one: Instruction, types: list[str]) -> Written:
    target, source = one.operands
    if target.startswith("{"):
        targets = [x.strip() for x in target[1:-1].split(",")]
        return targets, f"[half({t.register(source)}, 0), half({t.register(source)}, 1)]"
    if source.startswith("{"):
        low, high = (t.value(x.strip(), f"u{bits(types[0]) // 2}") for x in source[1:-1].split(","))
        return [target], f"pack({low}, {high})"
    value = t.value(source, "pred" if types[0] == "pred" else f"u{bits(types[0])}")
    return [target], value if value.startswith("v") or value in ("tid", "ctaid") else f"full({value})"


def _shuffle(t: Translator, one: Instruction, types: list[str]) -> Written:
    target, source, mask, clamp, members = one.operands
    if one.opcode != ("shfl", "sync", "bfly", "b32") or (clamp, members) != ("31", "-1"):
        raise Unknown(f"Unknown shuffle: {one.text}")
    t.constants.append(np.arange(THREADS) ^ int(mask))
    return [target], f"{t.register(source)}[k[{len(t.constants) - 1}]]"


_FLOAT = ("rn",)
_MODIFIERS = {
    **dict.fromkeys(("add", "sub", "div", "sqrt", "cvt"), _FLOAT),
    **dict.fromkeys(("mul", "mad"), (*_FLOAT, "lo", "wide")),
    "fma": _FLOAT,
    "min": ("NaN",),
    "setp": (*_COMPARE, *_UNORDERED, "ne", "neu", "nan"),
    "shfl": ("sync", "bfly"),
}
_WRITERS: dict[str, Writer] = {
    "add": _arithmetic("{} + {}"),
    "sub": _arithmetic("{} - {}"),
    "div": _arithmetic("{} / {}"),
    "and": _arithmetic("{} & {}"),
    "or": _arithmetic("{} | {}"),
    "xor": _arithmetic("{} ^ {}"),
    "not": _arithmetic("~{}"),
    "neg": _arithmetic("-{}"),
    "abs": _arithmetic("np.abs({})"),
    "sqrt": _arithmetic("np.sqrt({})"),
    "bfe": _field,
    "fma": _fused,
    "mul": _multiply,
    "mad": _multiply,
    "min": _minimum,
    "max": _minimum,
    "shl": _shift("<<"),
    "shr": _shift(">>"),
    "setp": _set_predicate,
    "selp": _select,
    "cvt": _convert,
    "mov": _move,
    "shfl": _shuffle,
}
