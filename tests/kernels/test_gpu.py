"""What only a GPU can show: large tensors, CUDA graphs, and that the host never waits."""

import pytest
import torch

import sago
from tests.support import inputs, oracle, properties
from tests.support.backends import Backend
from tests.support.sync import no_sync

pytestmark = pytest.mark.gpu

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CUDA = Backend("triton", "cuda")
RULES = ["sago", "pcgrad", "blur"]


def pairs(dtype, sizes=(5000, 3, 70000, 16), seed=0):
    both = [inputs.pair(n, seed + i) for i, n in enumerate(sizes)]
    return [f.to(dtype).cuda() for f, _ in both], [r.to(dtype).cuda() for _, r in both]


def skip_without(gibibytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, found {free / 2**30:.1f}")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_sums_of_2_to_the_26_elements(dtype, rule):
    part = 1 << 20
    f, r = (t.to(dtype) for t in inputs.pair(part))
    expected = oracle.expect([f], [r], "sum").sums
    report = sago.synthesize_(f.cuda().repeat(64), r.cuda().repeat(64), rule, backend="triton")
    for name in ("ff", "fr", "rr"):
        # Of the same order as the magnitudes: <f,r> is about half of -<f,f>.
        assert getattr(report, name).item() == pytest.approx(64 * expected[name][0], rel=oracle.PROMISED)
    assert report.conflict_fraction.item() == expected["conflicts"][0] / part


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_large_tensors_bitwise_or_against_the_oracle(rule):
    forget, retain = ([t.to(BF16)] for t in inputs.pair((1 << 22) + 13))
    if rule == "sago":
        properties.assert_as_reference(CUDA, forget, retain, rule, gamma=0.75, alpha=1.5)
    else:
        properties.assert_as_oracle(CUDA, forget, retain, rule, gamma=0.75, alpha=1.5)


def test_offsets_beyond_32_bits():
    """Both a 32-bit element offset and a 32-bit byte offset would wrap to the start."""
    numel = (1 << 31) + 100
    skip_without(9)
    f = torch.zeros(numel, dtype=BF16, device="cuda")
    r = torch.zeros(numel, dtype=BF16, device="cuda")
    f[-100:], r[-100:], f[:100], r[:100] = 2.0, -3.0, 4.0, 5.0
    report = sago.synthesize_(f, r, "sago", backend="triton")
    assert (r[-100:] == -3.0).all()
    assert (r[:100] == 4.0).all()
    assert not r[100:-100].any()
    assert report.ff.item() == 100 * (4 + 16)
    assert report.fr.item() == 100 * (-6 + 20)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stats", [True, False])
def test_the_host_never_waits(rule, stats):
    forget, retain = pairs(BF16)
    gamma = torch.full((), 0.5, device="cuda")
    with no_sync():
        for _ in range(3):  # the first compiles, the second finds its tables
            report = sago.synthesize_(forget, retain, rule, gamma=gamma, stats=stats)
            sago.synthesize(forget, retain, rule, gamma=gamma, stats=stats, groups=["a", "b", "a", "b"])
            assert (report.cos_update_retain is None) == ("cos_update_retain" in report.absent)
        with pytest.raises(RuntimeError, match="synchroniz"):
            gamma.item()
        if stats:
            with pytest.raises(RuntimeError, match="synchroniz"):
                report.summary()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stats", [True, False])
def test_a_cuda_graph(rule, stats):
    """Captured once, replayed on new gradients and weights in the same memory."""
    forget, retain = pairs(FP32)
    out = [torch.full_like(r, torch.nan) for r in retain]
    gamma = torch.ones((), dtype=FP64, device="cuda")

    def step():
        return sago.synthesize_(forget, retain, rule, gamma=gamma, alpha=1.5, out=out, stats=stats)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step()
        ff = report.ff
    for seed, weight in ((10, 0.5), (20, 2.0), (30, 0.25)):
        new_forget, new_retain = pairs(FP32, seed=seed)
        for t, new in zip(forget + retain, new_forget + new_retain, strict=True):
            t.copy_(new)
        gamma.fill_(weight)
        for t in out:
            t.fill_(torch.nan)
        graph.replay()
        expected, again = CUDA(forget, retain, rule, gamma=weight, alpha=1.5, stats=stats)
        properties.assert_equal_bits([t.cpu() for t in out], expected)
        if ff is not None:
            properties.assert_equal_bits([ff], [again.ff])


@pytest.mark.parametrize("rule", RULES)
def test_the_first_call_of_a_list_in_a_cuda_graph(rule):
    """Its tables are made in the capture, where the report is also read and the sums are reduced."""

    def doubled(table):
        return table * 2

    def synthesize(forget, retain, out):
        report = sago.synthesize_(forget, retain, rule, gamma=0.5, out=out, groups=[0, 1, 0, 1])
        sums, reduced = report.conflict_fraction, report.numel
        again = sago.synthesize_(forget, retain, rule, out=out, groups=[0, 1, 0, 1], reduce_gram=doubled)
        return sums, reduced, again.ff, again.numel, again.conflict_fraction

    other = pairs(FP32, (5000, 3, 70000, 17), seed=5)
    synthesize(*other, [torch.empty_like(t) for t in other[1]])  # compiles
    forget, retain = pairs(FP32, (5001, 5, 70001, 19))
    out = [torch.full_like(t, torch.nan) for t in retain]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = synthesize(forget, retain, out)
    for seed in (10, 20):
        new_forget, new_retain = pairs(FP32, (5001, 5, 70001, 19), seed=seed)
        for t, new in zip(forget + retain, new_forget + new_retain, strict=True):
            t.copy_(new)
        graph.replay()
        again = [torch.empty_like(t) for t in retain]
        expected = synthesize(forget, retain, again)
        properties.assert_equal_bits([t.cpu() for t in out], [t.cpu() for t in again])
        properties.assert_equal_bits([t.cpu() for t in found], [t.cpu() for t in expected])
    assert found[3].tolist() == [2 * n for n in found[1].tolist()]


def test_two_graphs_and_eager_calls_between():
    """Each graph keeps the tables that it was captured with."""
    sets = [pairs(FP32, seed=seed) for seed in (0, 40)]
    graphs, outs = [], []
    for forget, retain in sets:
        out = [torch.full_like(r, torch.nan) for r in retain]
        sago.synthesize_(forget, retain, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sago.synthesize_(forget, retain, out=out)
        graphs.append(graph)
        outs.append(out)
    kept = [pairs(FP32, (100 + i, 7), seed=i) for i in range(300)]  # more tables than are kept
    for forget, retain in kept:
        sago.synthesize_(forget, retain, stats=False)
    for graph, out, (forget, retain) in zip(graphs, outs, sets, strict=True):
        for t in out:
            t.fill_(torch.nan)
        graph.replay()
        expected, _ = CUDA(forget, retain)
        properties.assert_equal_bits([t.cpu() for t in out], expected)


@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_the_same_from_run_to_run(rule):
    forget, retain = pairs(BF16, [100_003] * 40)
    properties.assert_repeatable(CUDA, forget, retain, rule)


def test_the_number_of_launches():
    forget, retain = pairs(BF16, [100 + i for i in range(300)])
    for rule, limit in (("sago", 1), ("sum", 1), ("pcgrad", 2), ("pcgrad_global", 2), ("blur", 2)):
        for stats in (True, False):
            sago.synthesize_(forget, retain, rule, stats=stats)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                sago.synthesize_(forget, retain, rule, stats=stats)
                torch.cuda.synchronize()
            kernels = [
                event.name
                for event in profile.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            ours = [name for name in kernels if "_kernel" in name and ("_gram" in name or "_combine" in name)]
            assert len(ours) == limit, kernels


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_extra_memory(rule):
    """Below 0.1 % of the gradients plus 1 MiB."""
    numel = 1 << 27
    f, r = (torch.ones(numel, dtype=BF16, device="cuda") for _ in range(2))
    sago.synthesize_(f, r, rule)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sago.synthesize_(f, r, rule)
    assert torch.cuda.max_memory_allocated() - before < (f.nbytes + r.nbytes) / 1000 + 2**20


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_the_default_on_a_gpu(rule):
    forget, retain = pairs(BF16)
    expected, _ = CUDA(forget, retain, rule)
    updates, _ = sago.synthesize(forget, retain, rule)
    properties.assert_equal_bits([u.cpu() for u in updates], expected)


def test_on_a_stream_of_its_own():
    forget, retain = pairs(BF16, [1 << 20])
    expected, _ = CUDA(forget, retain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        updates, _ = sago.synthesize(forget, retain)
    stream.synchronize()
    properties.assert_equal_bits([u.cpu() for u in updates], expected)


def test_tensors_on_the_cpu_and_on_the_gpu():
    """One list over two devices: one row over both."""
    f, r = inputs.pair(100)
    both = [f.float(), f.float()], [r.float(), r.float()]
    placed = [[side[0].clone(), side[1].cuda()] for side in both]
    updates, report = sago.synthesize(*placed, "pcgrad_global")
    properties.assert_updates([u.cpu() for u in updates], *both, "pcgrad_global")
    properties.assert_report(report, *both, "pcgrad_global")
