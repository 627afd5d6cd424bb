"""The CPU path: accuracy and bits of its sums, its memory, and life without a compiler."""

import itertools
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import sago
from sago import compiled
from tests import inputs, oracle, properties
from tests.backends import Backend

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
COMPILED = Backend("compiled", "cpu")
MIB = 1 << 20


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large(dtype, numel):
    """`numel` elements that repeat 2^20, and the sums of those 2^20 in float64, scaled up."""
    f, r = inputs.pair(MIB)  # f and n - f/2, so that f + r is f/2 + n
    f, r = f.to(dtype), (f + r).to(dtype)
    known = oracle.expect([f], [r], "sum")
    expected = {name: numel / MIB * known.sums[name][0] for name in ("ff", "fr", "rr", "conflicts")}
    return f.repeat(numel // MIB), r.repeat(numel // MIB), expected


def assert_sums(report, expected, error):
    """All of them are positive, <f,r> by half of the magnitudes that it adds."""
    for name in ("ff", "fr", "rr"):
        assert getattr(report, name).item() == pytest.approx(expected[name], rel=error)
    assert report.conflict_fraction.item() == expected["conflicts"] / report.numel.item()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_sums_of_2_to_the_26_elements(dtype):
    f, r, expected = large(dtype, 1 << 26)
    assert 0.351 < expected["conflicts"] / (1 << 26) < 0.353  # arctan(2) / pi
    assert_sums(sago.synthesize_(f, r, "pcgrad", backend="compiled"), expected, oracle.PROMISED)


def test_sums_of_the_reference():
    """In float64 throughout, so fewer elements do; it keeps about ten float64 copies of them."""
    f, r, expected = large(BF16, 1 << 22)
    _, report = sago.reference.synthesize([f], [r], "pcgrad")
    assert_sums(report, expected, oracle.rounding_error(1 << 22, FP64))


@pytest.mark.usefixtures("uncompiled")
def test_sums_without_a_compiler():
    f, r, expected = large(FP32, 1 << 24)
    assert_sums(sago.synthesize_(f, r, "pcgrad", backend="compiled"), expected, oracle.PROMISED)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_bits_do_not_depend_on_threads(threads, rule):
    numel = (1 << 21) + 12345
    forget, retain = ([t.to(BF16)] for t in inputs.pair(numel))
    found = []
    for n in (1, 2):
        threads(n)
        updates, report = COMPILED(forget, retain, rule)
        found.append([*updates, *(getattr(report, name) for name in properties.FIELDS)])
    properties.assert_equal_bits(found[1], found[0])


def test_bits_do_not_depend_on_threads_without_a_compiler(threads, uncompiled):
    test_bits_do_not_depend_on_threads(threads, "pcgrad")


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32)], ids=str)
def test_compiled_and_uncompiled_elementwise_bits(monkeypatch, dtypes):
    """Above the size from which the code is compiled, with all that a dtype can hold."""
    f, r = (t[0].repeat(1 + compiled.COMPILE_FROM // t[0].numel()) for t in inputs.specials(*dtypes))
    for rule in ("sum", "sago"):
        fast, _ = COMPILED([f], [r], rule, gamma=0.75, alpha=1.5)
        properties.assert_as_reference(COMPILED, [f], [r], rule, gamma=0.75, alpha=1.5)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has_compiler", lambda: False)
            eager, _ = COMPILED([f], [r], rule, gamma=0.75, alpha=1.5)
        properties.assert_equal_bits(fast, eager)


@pytest.mark.parametrize("family", ["tails", "unaligned"])
def test_slices_and_blocks_of_the_uncompiled_path(monkeypatch, family):
    """With slices so short that every boundary is met."""
    monkeypatch.setattr(compiled, "_EAGER", 2048)
    forget, retain = inputs.IN_RANGE[family](FP32, BF16)
    f, r = inputs.pair(3 * 2048 + 5)
    forget, retain = [*forget, f], [*retain, r.float()]
    for rule in ("sago", "pcgrad_global"):
        updates, report = COMPILED(forget, retain, rule)
        properties.assert_updates(updates, forget, retain, rule)
        properties.assert_report(report, forget, retain, rule)


def test_large_tensors_in_every_layout():
    """One compiled graph serves contiguous memory; the rest takes the uncompiled path and agrees."""
    f, r = (t.float() for t in inputs.pair(2 * 40000))
    square = f.view(2, 40000), r.view(2, 40000)
    for f2, r2 in (
        (square[0].t(), square[1].t()),
        (square[0][:, ::2], square[1][:, ::2]),
        (square[0].t(), square[1].view(40000, 2)),
        (f[1:], r[1:]),
        (None, r),
        (f, None),
    ):
        properties.assert_as_reference(COMPILED, [f2], [r2], "sago", alpha=1.5)


def test_large_views_of_one_buffer_in_place():
    """torch.compile must not be led astray by storages that are shared."""
    size = compiled.COMPILE_FROM + 7
    buffer = inputs.normal(4 * size, 0).float()
    forget, retain = list(buffer[: 2 * size].split(size)), list(buffer[2 * size :].split(size))
    kept = [t.clone() for t in forget]
    expected, _ = COMPILED([t.clone() for t in forget], [t.clone() for t in retain], "pcgrad")
    sago.synthesize_(forget, retain, "pcgrad", backend="compiled")
    properties.assert_equal_bits([*retain, *forget], [*expected, *kept])


def test_the_update_of_a_gram_rule_over_large_tensors():
    forget, retain = ([t.float()] for t in inputs.pair(3 * compiled.COMPILE_FROM + 1))
    for rule in ("pcgrad", "blur"):
        properties.assert_as_oracle(COMPILED, forget, retain, rule, gamma=0.75, alpha=1.5)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_counts_over_large_tensors(rule):
    """Hidden among many, in two tensors of one row and none of the other."""
    forget, retain = (
        list(side)
        for side in zip(*(inputs.pair(3 * compiled.COMPILE_FROM, i) for i in range(3)), strict=True)
    )
    forget, retain = [t.to(BF16) for t in forget], [t.to(BF16) for t in retain]
    forget[0][-1], forget[0][40000], forget[1][0], retain[1][7] = torch.inf, torch.nan, -torch.inf, torch.nan
    _, report = COMPILED(forget, retain, rule, groups=["a", "a", "b"])
    expected = oracle.expect(forget, retain, rule, groups=["a", "a", "b"]).sums
    for name in properties.COUNTS:
        assert getattr(report, name).tolist() == expected[name].tolist()
    assert report.conflict_fraction.tolist() == (expected["conflicts"] / expected["numel"]).tolist()


def peak_memory(call):
    """Bytes that torch holds at most, beyond what it held before, while `call` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_extra_memory(rule, stats):
    """Below 0.1 % of the gradients plus 1 MiB."""
    f, r = torch.ones(16 * MIB, dtype=BF16), -torch.ones(16 * MIB, dtype=BF16)
    sago.synthesize_(f[:MIB], r[:MIB], rule, stats=stats, backend="compiled")  # compiling takes some as well
    peak = peak_memory(lambda: sago.synthesize_(f, r, rule, stats=stats, backend="compiled"))
    assert peak < (f.nbytes + r.nbytes) / 1000 + MIB


def test_the_measure_of_memory_sees_a_gradient():
    f = torch.ones(MIB)
    assert peak_memory(lambda: f.mul(f).add_(f * f)) == 2 * f.nbytes


def test_without_a_compiler_it_says_so_once(monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled.has_compiler.cache_clear()
    try:
        forget, retain = ([t.float()] for t in inputs.pair(compiled.COMPILE_FROM))
        with pytest.warns(RuntimeWarning, match=r"no working C\+\+ compiler.*eager") as caught:
            properties.assert_as_reference(COMPILED, forget, retain, "sago")
        assert len(caught) == 1
        with warnings.catch_warnings(record=True, action="always") as again:
            properties.assert_as_reference(COMPILED, forget, retain, "sago")
        assert not again
    finally:
        compiled.has_compiler.cache_clear()


def test_on_a_machine_without_a_compiler(tmp_path):
    """For real: CXX names nothing, nothing is cached."""
    program = """
        import warnings, torch, sago
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            f, r = torch.ones(40000), -torch.ones(40000)
            for _ in range(2):
                sago.synthesize_(f, r, alpha=2.0)
        assert torch.equal(r, torch.full((40000,), -4.0))
        messages = [str(w.message) for w in caught if "sago" in str(w.message)]
        print(len(messages), messages[0])
    """
    environment = {
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PATH": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 sago: torch.compile found no working C++ compiler")


def test_importing_sago_imports_no_compiler():
    program = (
        "import sys, sago; print([m for m in ('triton', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
