"""Compiled kernels that are wrong on purpose. docs/ptx.md says which check catches which."""

from collections.abc import Callable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sago
from sago.rules import RULES
from tests.ptx.compiler import Compiler
from tests.ptx.memory import Fault
from tests.ptx.program import Unknown
from tests.ptx.races import Race
from tests.support import checks, inputs, properties
from tests.support.backends import INTERPRETED, Backend, import_with_triton
from tests.support.processes import need_stub_driver

if not INTERPRETED:
    pytest.skip("a GPU runs the kernels", allow_module_level=True)
kernels = import_with_triton("sago.kernels")
need_stub_driver()

RUN = Backend("triton", "cpu")
ORDERS = 3  # of the blocks, in one of which a wrong kernel must be caught
BARRIER = "bar.sync \t0;"
# The options of each check of the table. Values and bounds are always checked.
OPTIONS = {
    "values": {"races": False},
    "bounds": {"races": False},
    "races": {"races": True},
    "late stores": {"races": False, "late": True},
}


def barrier(before: bool) -> Callable[[str], str]:
    """Removes the barriers at every atomic operation: those since the last store, or the one behind it."""

    def change(ptx: str) -> str:
        pieces = ptx.split("atom.global")
        for i in range(len(pieces) - 1):
            if before:
                stored = max(pieces[i].rfind("st.global"), 0)
                pieces[i] = pieces[i][:stored] + pieces[i][stored:].replace(BARRIER, "")
            else:
                pieces[i + 1] = pieces[i + 1].replace(BARRIER, "", 1)
        return "atom.global".join(pieces)

    return change


def order(name: str) -> Callable[[str], str]:
    return lambda ptx: ptx.replace("atom.global.gpu.acq_rel", f"atom.global.gpu.{name}")


def rows_of_chunks(run):
    """Rows of several chunks and of several spans."""
    checks.sums_over_chunks(run)
    checks.sums_over_spans(run)


def in_place(run):
    """The update is written over retain, in a tensor that is all tail."""
    f, r = (t.float() for t in inputs.pair(9))
    expected, _ = sago.reference.synthesize([f], [r], "sago")
    sago.synthesize_([f], [r], "sago", stats=False, backend=run.name)
    properties.assert_equal_bits([r], expected)


class Wrong(NamedTuple):
    check: Callable[[Backend], None]
    change: Callable[[str], str] = str  # of the PTX
    constants: dict[str, object] = {}  # noqa: RUF012 (nothing writes it)
    source: tuple[str, str, str] | tuple[()] = ()  # a file, a text in it and the text in its place


ATOMIC = 'tl.atomic_add(counter, 1, sem="acq_rel") == count - 1'
WRONG = {
    "relaxed atomic operation": Wrong(rows_of_chunks, order("relaxed")),
    "acquire only": Wrong(rows_of_chunks, order("acquire")),
    "release only": Wrong(rows_of_chunks, order("release")),
    "no barrier in front of the atomic operation": Wrong(rows_of_chunks, barrier(before=True)),
    "no barrier behind the atomic operation": Wrong(rows_of_chunks, barrier(before=False)),
    "hint of 16 bytes on an unaligned address": Wrong(checks.unaligned, constants={"ALIGNED": True}),
    "tail mask one element too long": Wrong(
        checks.tails, source=("stream.py", "at < size, f, r", "at < size + 1, f, r")
    ),
    "counter that is not reset": Wrong(
        checks.products_again, source=("stream.py", "tl.store(counter, 0)", "tl.store(counter, count)")
    ),
    "tail that several threads load": Wrong(
        in_place, source=("stream.py", "at = body + tl.arange(0, THREADS)", "at = body + tl.arange(0, 16)")
    ),
    "one counter for all spans": Wrong(
        rows_of_chunks, source=("stream.py", "counter + 1 + span", "counter + 1")
    ),
    "sums of spans over those of chunks": Wrong(
        rows_of_chunks,
        source=("stream.py", "of_spans = partials + tl.load(entry + 3)", "of_spans = partials + first_slot"),
    ),
    "NaN in conflict": Wrong(
        checks.negative_nan, source=("stream.py", "PropagateNan.ALL", "PropagateNan.NONE")
    ),
}


def table() -> dict[str, set[str]]:
    """For each wrong kernel the checks that catch it, as docs/ptx.md has them."""
    lines = (Path(__file__).parents[2] / "docs" / "ptx.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[1:] == list(OPTIONS))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return {
        name: {check for check, cell in zip(OPTIONS, cells, strict=True) if cell == "yes"}
        for name, *cells in rows[start + 2 : end]
    }


def caught(emulated, wrong: Wrong, compiler: Compiler, options: dict[str, bool], seed: int) -> str | None:
    """How the wrong kernel was noticed, if it was."""
    setting = {"change": wrong.change, "constants": wrong.constants, "compiler": compiler}
    try:
        with emulated("sm_90", options={**options, "seed": seed}, **setting):
            wrong.check(RUN)
    except Race:
        return "races"
    except Fault:
        return "bounds"
    except (AssertionError, ValueError):  # a count that is NaN has no integer
        return "late stores" if options.get("late") else "values"
    return None


def test_the_table_has_every_wrong_kernel():
    assert table().keys() == WRONG.keys()


@pytest.mark.parametrize("check", dict.fromkeys(wrong.check for wrong in WRONG.values()))
def test_the_right_kernel_passes_with_late_stores(emulated, check):
    """The other options are those of `test_kernels.py`."""
    with emulated("sm_90", options={**OPTIONS["late stores"], "seed": 1}):
        check(RUN)


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_kernel_is_caught(emulated, name):
    wrong, missing = WRONG[name], table()[name]
    assert missing
    compiler = Compiler(wrong.source)
    try:
        for check in sorted(missing):
            for seed in range(ORDERS):
                missing -= {caught(emulated, wrong, compiler, OPTIONS[check], seed)}
                if check not in missing:
                    break
    finally:
        compiler.close()
    assert not missing


def test_the_change_of_the_ptx_is_one(emulated):
    """Each change of the PTX removes or weakens something in a kernel with several chunks a row."""
    seen = []

    def changed(change):
        return lambda ptx: seen.append(change(ptx) != ptx) or ptx

    for name in list(WRONG)[:5]:
        with emulated("sm_90", change=changed(WRONG[name].change)):
            checks.products_over_chunks(RUN)
    assert seen.count(True) == 5  # those of gram; a combine without sums has no atomic operation


def test_offsets_that_wrap(emulated):
    """Chunks on both sides of element 2**31, of memory that is mapped and mostly not there."""
    numel = 2**31 + inputs.CHUNK + 5
    sides = []
    for _ in range(2):
        memory = mmap(-1, 2 * numel, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        sides.append(torch.frombuffer(memory, dtype=torch.bfloat16))
    forget, retain = sides
    only = [0, 2**31 // inputs.CHUNK - 1, 2**31 // inputs.CHUNK, -(-numel // inputs.CHUNK) - 1]
    parts = [slice(i * inputs.CHUNK, (i + 1) * inputs.CHUNK) for i in only]
    for part in parts:
        for side, t in zip(sides, inputs.pair(len(retain[part]), seed=part.start % 97), strict=True):
            side[part] = t.bfloat16()
    given = [(forget[part].clone(), retain[part].clone()) for part in parts]
    batch = kernels.Batch(torch.device("cpu"), [forget], [retain], [retain], [0], 1)

    def combine(compiler):
        with emulated("sm_90", compiler=compiler, only=only, options={"races": False}):
            kernels.combine(batch, RULES["sago"], 0.75, 1.5, 0.0, None, 0)

    wrong = Compiler(("stream.py", "start = index * CHUNK", "start = (index * CHUNK).to(tl.int32)"))
    try:
        with pytest.raises(Fault, match="out of bounds"):
            combine(wrong)
    finally:
        wrong.close()
    for part, (_, r) in zip(parts, given, strict=True):
        retain[part] = r
    right = Compiler()
    try:
        combine(right)
    finally:
        right.close()
    for part, (f, r) in zip(parts, given, strict=True):
        expected, _ = sago.reference.synthesize([f], [r], "sago", gamma=0.75, alpha=1.5)
        properties.assert_equal_bits([retain[part]], expected)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mul.rn.f32", "mul.rz.f32", "Unknown modifiers"),
        ("mul.rn.f32", "mul.f32", "Unknown modifiers"),
        ("mul.rn.f32", "ex2.rn.f32", "Unknown instruction"),
        ("mul.rn.f32", "mad.rn.f32", "Unknown"),
        ("ld.global.b64", "ld.global.nc.b64", "Unknown access"),
        ("\n\tret;", "\n\tcall f;\n\tret;", "Unknown instruction"),
        (".reqntid 128", ".reqntid 256", "128 threads"),
    ],
)
def test_what_is_not_known_is_refused(emulated, old, new, says):
    def change(ptx):
        assert old in ptx
        return ptx.replace(old, new, 1)

    with emulated("sm_90", change=change), pytest.raises(Unknown, match=says):
        checks.tails(RUN)
