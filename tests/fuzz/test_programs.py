"""A chunk of random programs for each target, and wrong libraries in which a chunk has to find the fault."""

import importlib
import sys
from typing import NamedTuple

import pytest
from hypothesis import Phase, given, seed, settings

from sago import synthesis
from sago.capture import pipelines, streamed, window
from sago.core import overlap
from tests.fuzz import __main__ as command
from tests.fuzz import programs
from tests.fuzz.programs import run_chunk
from tests.support.backends import INTERPRETED, has_triton
from tests.support.mutants import mutated

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {"reference": 40, "compiled": 100, "large": 20, "triton": 20, "triton windows": 5}


@pytest.mark.parametrize("target", CASES)
def test_a_chunk(target):
    if target.startswith("triton") and not (INTERPRETED and has_triton()):
        pytest.skip("the kernels run on the GPU, not interpreted, or Triton is missing")
    result = run_chunk(0, 0, target, CASES[target])
    assert result.failure is None, result.failure
    assert result.cases == CASES[target]


class Fault(NamedTuple):
    owner: object
    function: str
    old: str
    new: str


# Whether an address is used again depends on the allocator, so tests/sago/test_seen.py has that fault.
FAULTS = {
    "a plan ignores a tensor beside a float": Fault(
        synthesis.Plan,
        "synthesize_",
        'alpha=check_weight("alpha", alpha, devices)',
        'alpha=check_weight("alpha", 1.0 if type(gamma) is float is not type(alpha) else alpha, devices)',
    ),
    "the key of a pipeline counts the parameters that retain reaches": Fault(
        pipelines.Pipelines, "of", "tuple(forget), tuple(retain)", "tuple(forget), sum(retain)"
    ),
    "the elements of a group are those of its largest buffer": Fault(
        streamed.InBackward, "finish", "numel[row] += n", "numel[row] = max(numel[row], n)"
    ),
    "a window goes on after a backward that failed": Fault(
        window.Window, "_leave", "if error is not None and capture.reached:", "if False:"
    ),
    "an output may be written over another one": Fault(
        overlap, "check_overlap", "_check_shared(span, there[:k])", "pass"
    ),
}


@pytest.fixture(params=FAULTS)
def fault(request, monkeypatch, tmp_path):
    owner, function, old, new = FAULTS[request.param]
    original = getattr(owner, function)
    wrong = mutated(sys.modules[original.__module__], original, old, new, tmp_path)
    users = [m for n, m in sys.modules.items() if n.startswith("sago") and vars(m).get(function) is original]
    for user in users or [owner]:
        monkeypatch.setattr(user, function, wrong)


def test_a_fault_is_found(fault):
    """Mostly within the first hundred programs."""
    assert any(run_chunk(0, chunk, "compiled", 100, shrinks=False).failure for chunk in range(10))


def test_the_programs_depend_on_their_seed_alone(tmp_path, monkeypatch):
    """By default, Hypothesis also draws numbers that it finds in the sources of imported modules."""
    first = drawn()
    (tmp_path / "many_numbers.py").write_text(f"NUMBERS = {list(range(1, 1000))}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("many_numbers")
    assert drawn() == first


def drawn():
    found = []

    @seed(0)
    @settings(programs.SETTINGS, max_examples=40, phases=[Phase.generate])
    @given(programs.programs("compiled"))
    def keep(program):
        found.append(repr(program))

    keep()
    return found


@pytest.fixture
def command_of(monkeypatch, tmp_path, capsys):
    """Runs the command with chunks of one program, and returns its exit code and what it prints."""
    monkeypatch.setattr(command, "SIZE", 1)
    monkeypatch.setattr(command, "TURNS", ("reference",))

    def run(*arguments):
        code = command.main(["--record", str(tmp_path / "record"), *arguments])
        return code, capsys.readouterr().out

    return run


def test_a_run_continues_where_it_stopped(command_of, monkeypatch):
    run = []

    def counted(seed, chunk, *rest):
        run.append(chunk)
        return run_chunk(seed, chunk, *rest)

    monkeypatch.setattr(command, "run_chunk", counted)
    for cases, chunks in (("2", [0, 1]), ("4", [2, 3]), ("4", [])):
        run.clear()
        code, printed = command_of("--cases", cases)
        assert (code, run) == (0, chunks)
        assert f"{cases} programs" in printed.splitlines()[-1]
    command_of("--cases", "1", "--seed", "1")
    assert run == [0]
    monkeypatch.setattr(command, "hash_of_sources", lambda: "of other sources")
    command_of("--cases", "1")
    assert run == [0, 0]


def test_a_failure_ends_the_run_with_the_command_that_repeats_it(command_of, monkeypatch):
    monkeypatch.setattr("sago.synthesis.count_versions", lambda updates: updates[0].zero_())
    monkeypatch.setattr(command, "TURNS", ("compiled",))
    monkeypatch.setattr(command, "SIZE", 20)
    code, printed = command_of("--cases", "40")
    assert code == 1
    assert "AssertionError" in printed
    assert "run(Program(" in printed
    assert printed.splitlines()[-1] == "Repeat it with: python -m tests.fuzz --seed 0 --chunk 0"
