"""A chunk of random programs for each target, and wrong libraries in which a chunk has to find the fault."""

import sys
from typing import NamedTuple

import pytest

from sago import synthesis
from sago.capture import buckets, streamed, window
from sago.core import overlap, seen
from tests.fuzz.programs import run_chunk
from tests.support.backends import INTERPRETED, has_triton
from tests.support.mutants import mutated

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("target", "cases"), [("reference", 40), ("compiled", 100), ("large", 15), ("triton", 20)]
)
def test_a_chunk(target, cases):
    if target == "triton" and not (INTERPRETED and has_triton()):
        pytest.skip("the kernels run on the GPU, not interpreted, or Triton is missing")
    result = run_chunk(0, 0, target, cases)
    assert result.failure is None, result.failure
    assert result.cases == cases


class Fault(NamedTuple):
    owner: object
    function: str
    old: str
    new: str
    within: int  # so many programs on the backend "compiled"


FAULTS = {
    "a plan ignores a tensor beside a float": Fault(
        synthesis.Plan,
        "synthesize_",
        'alpha=check_weight("alpha", alpha, devices)',
        'alpha=check_weight("alpha", 1.0 if type(gamma) is float is not type(alpha) else alpha, devices)',
        150,
    ),
    "the key of a pipeline counts the parameters that retain reaches": Fault(
        buckets.GradientBuckets,
        "_pipeline",
        "tuple(forget), tuple(retain)",
        "tuple(forget), sum(retain)",
        150,
    ),
    "lists with the addresses of earlier ones are not compared": Fault(
        seen, "find", " and seen.guards.hold(tensors)", "", 150
    ),
    "the elements of a group are those of its largest buffer": Fault(
        streamed.InBackward, "finish", "numel[row] += n", "numel[row] = max(numel[row], n)", 150
    ),
    "a window goes on after a backward that failed": Fault(
        window.Window, "_leave", "if error is not None and capture.reached:", "if False:", 150
    ),
    "an output may be written over another one": Fault(
        overlap, "check_overlap", "_check_shared(span, there[:k])", "pass", 150
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, monkeypatch, tmp_path):
    """By programs that `test_a_chunk` has run with the right library."""
    owner, function, old, new, within = FAULTS[name]
    original = getattr(owner, function)
    module = sys.modules[original.__module__]
    wrong = mutated(module, original, old, new, tmp_path)
    users = [m for n, m in sys.modules.items() if n.startswith("sago") and vars(m).get(function) is original]
    for user in users or [owner]:
        monkeypatch.setattr(user, function, wrong)
    result = run_chunk(0, 0, "compiled", 250, shrinks=False)
    assert result.failure is not None, f"not found by {result.cases} programs"
    print(name, result.cases + 1)
