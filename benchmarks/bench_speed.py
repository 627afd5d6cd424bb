"""The contenders of `benchmarks.speed` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Lists have their full size on a GPU and are shrunk on the CPU. Every update is compared with the reference
before it is timed.
"""

import pytest
import torch

from benchmarks import speed, timing
from benchmarks.gradients import Gradients
from benchmarks.workloads import WORKLOADS, shrink

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    f"{case.workload}-{case.dtype}-{contender.label}": (case.workload, case.dtype, contender)
    for case in speed.cases(DEVICE == "cuda", list(WORKLOADS), ["sago", "pcgrad"])
    for contender in case.contenders
}

# torch raises this when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


_kept = {}  # the pairs of one list: two lists may not fit in memory


def gradients(workload, dtype):
    if (workload, dtype) not in _kept:
        _kept.clear()
        shapes = WORKLOADS[workload] if DEVICE == "cuda" else shrink(WORKLOADS[workload], 1 << 16)
        _kept[workload, dtype] = Gradients(shapes, getattr(torch, dtype), DEVICE)
    return _kept[workload, dtype]


@pytest.mark.parametrize("case", CASES)
def test_speed(benchmark, case):
    workload, dtype, contender = CASES[case]
    benchmark.group = f"{workload} {dtype}"
    pairs = gradients(workload, dtype)
    try:
        prepared, _ = speed.first(contender, pairs)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    clock = timing.Clock(pairs.device)

    def run():
        prepared.run()
        clock.wait()

    def setup():
        prepared.restore()
        clock.flush()

    numel = sum(pairs.numels)
    benchmark.extra_info.update(elements=numel, bytes=contender.passes * pairs.dtype.itemsize * numel)
    benchmark.pedantic(run, setup=setup, rounds=10 if DEVICE == "cuda" else 3)
