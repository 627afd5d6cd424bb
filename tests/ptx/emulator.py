"""Runs a program: blocks in random order, each thread of a block one lane of numpy arrays."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import triton

from .memory import Fault, Memory, Shared
from .program import THREADS, Instruction, Program, Unknown
from .races import Clocks, Shadow
from .semantics import NAMES, Translator, bits, full, unwritten

_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_ATOMIC = ("atom", "global", "gpu", "add", "u32")
_ORDERS = {
    "acq_rel": (True, True),
    "acquire": (True, False),
    "release": (False, True),
    "relaxed": (False, False),
}
_MATRICES = ("ldmatrix", "sync", "aligned", "m8n8")
_LANES = np.arange(THREADS)
_END = -1


class Access(NamedTuple):
    """The fixed part of a load or store: `count` values of `width` bytes."""

    shared: bool
    width: int
    count: int
    text: str


class Kernel:
    """A program as Python functions, one a segment."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._translator = Translator()
        self._constants = self._translator.constants
        codes = [self._segment(i, segment) for i, segment in enumerate(program.segments)]
        names: dict[str, Any] = {**NAMES, "k": self._constants, "tid": np.arange(THREADS, dtype=np.uint32)}
        self.segments: list[Callable[[list[Any], Block], int]] = []
        for code in codes:
            exec(code, names)
            self.segments.append(names["segment"])
        # The bits of NaN, for a register that an instruction with a predicate leaves without a value.
        self.registers = [unwritten(name) for name in self._translator.registers]

    def run(
        self,
        blocks: Sequence[int],
        arguments: Sequence[int],
        memory: Memory,
        shared: int,
        seed: int = 0,
        races: bool = True,
        late: bool = False,
    ) -> np.ndarray | None:
        """Runs the program ids `blocks`, of which a random one goes on after each segment.

        Args:
            arguments: The parameters, as integers of their bits.
            memory: All that the kernel may touch.
            shared: The size of the shared memory of a block, in bytes.
            seed: Of the random order.
            races: Whether accesses are checked for races and for reads of memory that was not written.
            late: Whether a plain store is visible only where a barrier or an atomic operation orders the
                load after it, as a weak memory allows.

        Returns:
            Which granules of the memory were written, if `races`.
        """
        if len(arguments) != len(self.program.parameters):
            raise ValueError(f"{len(self.program.parameters)} parameters, and {len(arguments)} arguments")
        clocks = Clocks(len(blocks)) if races or late else None
        launch = _Launch(memory, clocks, races, late, arguments)
        running = [Block(self, launch, i, program) for i, program in enumerate(blocks)]
        # Reductions of Triton 3.9 store equal values from several warps.
        together = THREADS if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 32
        for block in running:
            block.shared = Shared(shared)
            block.shadow = Shadow(block.shared.granules, clocks, together) if clocks and races else None
        draw = random.Random(seed)
        with np.errstate(all="ignore"):
            while running:
                i = draw.randrange(len(running))
                block = running[i]
                block.at = self.segments[block.at](block.registers, block)
                if block.at == _END:
                    running[i] = running[-1]
                    running.pop()
        launch.settle()
        return launch.shadow.written if launch.shadow else None

    def _segment(self, number: int, instructions: list[Instruction]) -> CodeType:
        lines = [self._line(one) for one in instructions]
        if not instructions or instructions[-1].opcode[0] != "ret":
            following = number + 1 if number + 1 < len(self.program.segments) else _END
            lines.append(f"return {following}")
        source = "def segment(v, t):\n    ctaid = t.ctaid\n" + "".join(f"    {line}\n" for line in lines)
        return compile(source, f"<segment {number}>", "exec")

    def _line(self, one: Instruction) -> str:
        name = one.opcode[0]
        mask = "None"
        if one.predicate:
            mask = f"{'~' if one.negated else ''}{self._translator.register(one.predicate)}"
        if name == "ret" and not one.predicate:
            return f"return {_END}"
        if name == "bra":
            target = self.program.labels[one.operands[0]]
            if mask == "None":
                return f"return {target}"
            return f"if t.uniform({mask}, {one.text!r}): return {target}"
        if name == "bar" and one.opcode == ("bar", "sync") and one.operands == ["0"] and mask == "None":
            return "t.barrier()"
        if name == "ldmatrix":
            return self._matrices(one, mask)
        if name in ("ld", "st", "atom"):
            return self._memory(one, mask)
        return self._translator.line(one)

    def _memory(self, one: Instruction, mask: str) -> str:
        name, space = one.opcode[0], one.opcode[1].removesuffix("::cta")  # the memory of a block
        registers, address = (one.operands[::-1] if name == "st" else one.operands)[:2]
        if (name, space) == ("ld", "param"):
            return self._parameter(one, mask)
        found = _ADDRESS.fullmatch(address)
        kind = one.opcode[-1]
        rest = [x for x in one.opcode[2:-1] if x not in ("v2", "v4", "cg")]
        if found is None or space not in ("global", "shared") or (rest and name != "atom"):
            raise Unknown(f"Unknown access: {one.text}")
        at = self._translator.value(found[1], f"u{64 if space == 'global' else 32}")
        at = f"np.broadcast_to({at}, ({THREADS},)).astype(np.int64) + {int(found[2] or '0', 0)}"
        targets = [x.strip() for x in registers.strip("{}").split(",")]
        if len(targets) != next((int(x[1]) for x in one.opcode if x in ("v2", "v4")), 1):
            raise Unknown(f"Unknown access: {one.text}")
        self._constants.append(Access(space == "shared", bits(kind) // 8, len(targets), one.text))
        access = f"k[{len(self._constants) - 1}]"
        if name == "st":
            values = ", ".join(self._translator.value(x, f"u{bits(kind)}") for x in targets)
            return f"t.store({access}, {at}, {mask}, [{values}])"
        if name == "atom":
            if (*one.opcode[:3], *one.opcode[4:]) != _ATOMIC or one.opcode[3] not in _ORDERS:
                raise Unknown(f"Unknown atomic operation: {one.text}")
            target, added = (
                self._translator.register(targets[0]),
                self._translator.value(one.operands[2], "u32"),
            )
            order = _ORDERS[one.opcode[3]]
            return f"{target} = t.atomic({access}, {at}, {mask}, {added}, {target}, {order})"
        old = ", ".join(self._translator.register(x) if mask != "None" else "None" for x in targets)
        into = ", ".join(self._translator.register(x) for x in targets)
        if kind[0] == "s" and targets[0].startswith("%rd") and bits(kind) == 32:
            return f"{into} = t.load({access}, {at}, {mask}, [{old}])[0].view('i4').astype('i8').view('u8')"
        return f"{into}, = t.load({access}, {at}, {mask}, [{old}])"

    def _matrices(self, one: Instruction, mask: str) -> str:
        """`ldmatrix`: each group of eight lanes has the addresses of the rows of a matrix of 8 x 16 bytes."""
        targets = [x.strip() for x in one.operands[0].strip("{}").split(",")]
        found = _ADDRESS.fullmatch(one.operands[1])
        if found is None or mask != "None" or one.opcode != (*_MATRICES, f"x{len(targets)}", "shared", "b16"):
            raise Unknown(f"Unknown access: {one.text}")
        self._constants.append(Access(True, 4, 1, one.text))
        access = f"k[{len(self._constants) - 1}]"
        rows = f"t.rows({self._translator.value(found[1], 'u32')}, {int(found[2] or '0', 0)}, {one.text!r})"
        loads = (
            f"{self._translator.register(x)}, = t.load({access}, rows[{i}], None, [None])"
            for i, x in enumerate(targets)
        )
        return "; ".join([f"rows = {rows}", *loads])

    def _parameter(self, one: Instruction, mask: str) -> str:
        target, address = one.operands
        number = int(re.fullmatch(r"\[\w+_param_(\d+)\]", address)[1])  # type: ignore[index]
        kind, width = one.opcode[2], 64 if target.startswith("%rd") else 32
        if mask != "None" or len(one.opcode) != 3 or bits(kind) != bits(self.program.parameters[number]):
            raise Unknown(f"Unknown access: {one.text}")
        return f"{self._translator.register(target)} = t.parameter({number}, {kind!r}, {width})"


class _Store(NamedTuple):
    block: int
    access: Access
    address: np.ndarray
    values: np.ndarray
    threads: np.ndarray
    clocks: np.ndarray


class _Launch:
    """The blocks of a launch share it. It has the global memory, its checks, and stores not yet visible."""

    def __init__(
        self, memory: Memory, clocks: Clocks | None, races: bool, late: bool, arguments: Sequence[int]
    ) -> None:
        self.memory = memory
        self.clocks = clocks
        self.shadow = Shadow(memory.granules, clocks) if clocks and races else None
        self.arguments = arguments
        self.late: list[_Store] | None = [] if late else None

    def settle(self) -> None:
        """At the end of a launch every store is visible."""
        for one in self.late or ():
            self._write(one, np.ones(len(one.address), bool))

    def overlay(
        self, block: int, access: Access, address: np.ndarray, threads: np.ndarray, found: np.ndarray
    ) -> None:
        """Puts the late stores that these loads must see over what they have found in memory."""
        assert self.clocks is not None
        for one in self.late or ():
            low, high = one.address[0], one.address[-1]
            if access.width != one.access.width or not ((address >= low) & (address <= high)).any():
                continue
            where = np.searchsorted(one.address, address)
            where = np.minimum(where, len(one.address) - 1)
            same = one.address[where] == address
            seen = self.clocks.knows(block, threads, one.threads[where], one.clocks[where])
            found[same & seen] = one.values[where][same & seen]

    def _write(self, one: _Store, mask: np.ndarray) -> None:
        self.memory.write(one.address[mask], one.access.width, one.values[mask])


class Block:
    """One block: its registers, its shared memory, and the segment that it runs next."""

    shared: Shared
    shadow: Shadow | None

    def __init__(self, kernel: Kernel, launch: _Launch, number: int, program: int) -> None:
        self.registers = list(kernel.registers)
        self.ctaid = full(np.uint32(program))
        self.at = 0
        self._launch = launch
        self._number = number
        self._threads = np.arange(THREADS, dtype=np.int64) + 1 + number * THREADS

    def parameter(self, number: int, kind: str, width: int) -> np.ndarray:
        value = self._launch.arguments[number] % 2 ** bits(kind)
        if kind[0] == "s" and value >= 2 ** (bits(kind) - 1):
            value -= 2 ** bits(kind)
        return full(np.array([value % 2**width], f"u{width // 8}")[0])

    def uniform(self, predicate: np.ndarray, text: str) -> bool:
        if predicate.any() != predicate.all():
            raise Fault(f"the threads of a block part, in {text}")
        return bool(predicate[0])

    def rows(self, address: np.ndarray, offset: int, text: str) -> list[np.ndarray]:
        """The address of the four bytes that each lane loads of each of four matrices."""
        address = np.broadcast_to(address, (THREADS,)).astype(np.int64) + offset
        if (address % 16).any():
            raise Fault(f"misaligned: a row of a matrix, in {text}")
        first = _LANES // 32 * 32 + _LANES % 32 // 4  # the lane with the row of the first matrix
        return [address[first + 8 * i] + 4 * (_LANES % 4) for i in range(4)]

    def barrier(self) -> None:
        if self._launch.clocks:
            self._launch.clocks.barrier(self._number)

    def load(
        self, access: Access, address: np.ndarray, mask: np.ndarray | None, old: list[np.ndarray | None]
    ) -> list[np.ndarray]:
        """The loaded values; `old` where the predicate is false."""
        threads = self._threads
        if mask is not None:
            if not mask.any():
                return old  # type: ignore[return-value]
            address, threads = address[mask], threads[mask]
        memory, shadow, granules, written = self._located(access, address)
        if shadow:
            shadow.read(
                self._number,
                threads,
                granules,
                np.broadcast_to(written[:, None], granules.shape),
                access.text,
            )
        found = []
        for i in range(access.count):
            at = address + i * access.width
            one = memory.read(at, access.width)
            if self._launch.late is not None and not access.shared:
                self._launch.overlay(self._number, access, at, threads, one)
            if mask is not None:
                both = old[i].copy()  # type: ignore[union-attr]
                both[mask] = one
                one = both
            found.append(one)
        return found

    def store(self, access: Access, address: np.ndarray, mask: np.ndarray | None, values: list[Any]) -> None:
        threads = self._threads
        both = np.stack([np.broadcast_to(x, (THREADS,)) for x in values], axis=1)
        if mask is not None:
            if not mask.any():
                return
            address, threads, both = address[mask], threads[mask], both[mask]
        memory, shadow, granules, _ = self._located(access, address)
        if shadow:
            shadow.write(self._number, threads, granules, both, access.text)
        for i in range(access.count):
            at = address + i * access.width
            if self._launch.late is None or access.shared:
                memory.write(at, access.width, both[:, i])
            else:
                order = np.argsort(at, kind="stable")
                clocks = self._launch.clocks.own[threads]  # type: ignore[union-attr]
                late = _Store(self._number, access, at[order], both[order, i], threads[order], clocks[order])
                self._launch.late.append(late)

    def atomic(
        self,
        access: Access,
        address: np.ndarray,
        mask: np.ndarray | None,
        added: Any,
        old: np.ndarray | None,
        order: tuple[bool, bool],
    ) -> np.ndarray:
        """Adds, thread after thread, and returns the values before."""
        found = full(np.uint32(0)) if old is None else old.copy()
        added = np.broadcast_to(added, (THREADS,))
        for lane in np.flatnonzero(np.ones(THREADS, bool) if mask is None else mask):
            at, thread = address[lane : lane + 1], int(self._threads[lane])
            memory, shadow, granules, _ = self._located(access, at)
            if shadow:
                shadow.atomic(self._number, thread, granules[0], access.text)
            if self._launch.clocks:
                self._launch.clocks.atomic(self._number, thread, int(at[0]), *order)
            before = memory.read(at, access.width)
            found[lane] = before[0]
            memory.write(at, access.width, before + added[lane])
        return found

    def _located(
        self, access: Access, address: np.ndarray
    ) -> tuple[Memory | Shared, Shadow | None, np.ndarray, np.ndarray]:
        memory = self.shared if access.shared else self._launch.memory
        first, written = memory.locate(address, access.width * access.count, access.text)
        steps = np.arange(access.width * access.count // 2)
        shadow = self.shadow if access.shared else self._launch.shadow
        return memory, shadow, first[:, None] + steps, written
