"""The CPU path: accuracy and bits of its sums, its memory, and life without a compiler."""

import contextlib
import itertools
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch

import sago
from sago.backends import compiled, graphs, inductor, packs
from tests.support import checks, inputs, oracle, properties
from tests.support.backends import Backend

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
COMPILED = Backend("compiled", "cpu")
MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("compiled_at_once")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "compiled_code", lambda *_: None)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Resets the module to the state of a new process."""
    monkeypatch.setattr(inductor, "_uncompiled", Counter())
    monkeypatch.setattr(inductor, "_compiled", {})
    for function in (inductor._announce, inductor._warn_uncompiled):
        function.cache_clear()


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
    f, r, expected = large(FP32, 1 << 22)
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


def results(forget, retain, rule):
    updates, report = COMPILED(forget, retain, rule, gamma=0.75, alpha=1.5)
    return [*updates, *(getattr(report, name) for name in properties.FIELDS)]


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (torch.float64, FP32)], ids=str)
@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad"])
def test_compiled_and_uncompiled_bits(monkeypatch, dtypes, rule):
    """Updates and sums are equal, for special values and for several slices, blocks and a tail."""
    specials = [t[0].repeat(1 + inductor.COMPILE_FROM // t[0].numel()) for t in inputs.specials(*dtypes)]
    pair = [t.to(d) for t, d in zip(inputs.pair((1 << 22) + 12345), dtypes, strict=True)]
    for f, r in (specials, pair):
        if rule != "pcgrad":
            properties.assert_as_reference(COMPILED, [f], [r], rule, gamma=0.75, alpha=1.5)
        fast = results([f], [r], rule)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "compiled_code", lambda *_: None)
            eager = results([f], [r], rule)
        properties.assert_equal_bits(fast, eager)


@contextlib.contextmanager
def global_state(name, value):
    """Sets what TorchDynamo would guard on, and puts it back."""
    before = {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    try:
        if name == "threads":
            torch.set_num_threads(value)
        elif name == "default dtype":
            torch.set_default_dtype(value)
        elif name == "deterministic":
            torch.use_deterministic_algorithms(value)
        with contextlib.ExitStack() as stack:
            if name == "grad":
                stack.enter_context(torch.set_grad_enabled(value))
            elif name == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=value))
            elif name == "inference":
                stack.enter_context(torch.inference_mode())
            yield
    finally:
        torch.set_num_threads(before["threads"])
        torch.set_default_dtype(before["default dtype"])
        torch.use_deterministic_algorithms(before["deterministic"])


STATES = [
    *(("threads", n) for n in range(1, 10)),
    *(("default dtype", d) for d in (torch.float64, BF16)),
    *(("autocast", d) for d in (BF16, torch.float16)),
    *(("grad", g) for g in (True, False)),
    ("deterministic", True),
    ("inference", True),
]


@pytest.mark.usefixtures("nothing_compiled")
def test_global_state_costs_no_compilation():
    """Each graph is compiled once, whatever the threads, the modes and the limits of TorchDynamo are."""
    f, r = (t.to(BF16) for t in inputs.pair(inductor.COMPILE_FROM + 5))
    expected = None
    with torch._dynamo.config.patch(cache_size_limit=1):  # the name that torch 2.6 has, too
        for name, value in STATES:
            with global_state(name, value):
                update, report = sago.synthesize(f, r, "sago", backend="compiled")
                found = [update, *(getattr(report, name) for name in properties.FIELDS)]
            expected = found if expected is None else expected
            properties.assert_equal_bits(found, expected)
    assert len(inductor._compiled) == 2  # the sums and the update


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("rule", ["sago", "pcgrad", "ties"])
def test_a_tensor_beside_one_that_is_not_finite(rule, special):
    """Neither the update nor the sums of small tensors depend on the other tensors of a pack."""
    forget, retain = ([inputs.normal(40 + i, 10 * k + i).float() for i in range(8)] for k in (1, 2))
    expected, before = sago.synthesize(forget, retain, rule)
    forget[3][7] = special
    updates, report = sago.synthesize(forget, retain, rule)
    others = [0, 1, 2, 4, 5, 6, 7]
    properties.assert_equal_bits([updates[i] for i in others], [expected[i] for i in others])
    for name in properties.FIELDS:
        found, wanted = (getattr(x, name) for x in (report, before))
        if found.numel() > 1:  # one row for each tensor
            properties.assert_equal_bits([found[others]], [wanted[others]])


def test_packs_are_bounded():
    """Their buffers are memory that a synthesis adds."""
    pairs = [torch.ones(101)] * 3000
    packed, alone = packs.lay_out(pairs, pairs, range(3000))
    assert not alone
    assert sorted(i for pack in packed for i in pack.pairs) == list(range(3000))
    assert packs.PACK - 128 < max(pack.numel for pack in packed) <= packs.PACK


def test_the_sums_of_a_group_do_not_depend_on_other_groups():
    dtypes = (FP64, FP32, FP64, FP32, FP64)
    for seed in range(5):
        forget, retain = (
            [inputs.normal(301, 100 * seed + 10 * k + i).to(d) for i, d in enumerate(dtypes)] for k in (1, 2)
        )
        updates, report = sago.synthesize(forget, retain, "pcgrad", groups=["b", *"aaaa"])
        alone, alone_report = sago.synthesize(forget[1:], retain[1:], "pcgrad", groups=["a"] * 4)
        properties.assert_equal_bits(updates[1:], alone)
        properties.assert_equal_bits([report.fr[1:], report.uu[1:]], [alone_report.fr, alone_report.uu])


@pytest.mark.usefixtures("nothing_compiled")
def test_machines_with_other_vectors_can_share_the_cache(tmp_path, monkeypatch):
    """Code for the vectors of another machine leaves elements unwritten, or writes outside of the tensors."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    f, r = (t.to(BF16) for t in inputs.pair(inductor.COMPILE_FROM + 5))
    expected = sago.synthesize(f, r, "sago", stats=False, backend="reference")[0]
    for capability in ("avx2", "", "default", "avx2"):  # what a machine has, or less
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        inductor._compiled.clear()
        found = sago.synthesize(f, r, "sago", stats=False, backend="compiled")[0]
        properties.assert_equal_bits([found], [expected])
        assert None not in inductor._compiled.values()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_failed_compilation_leaves_the_same_bits_and_says_so_once(monkeypatch):
    forget, retain = ([t.float()] for t in inputs.pair(inductor.COMPILE_FROM))
    expected = results(forget, retain, "pcgrad")
    inductor._compiled.clear()

    def refused(*args, **options):
        raise torch._dynamo.exc.BackendCompilerFailed(refused, AssertionError("no"))

    monkeypatch.setattr(torch._inductor, "compile", refused)
    with pytest.warns(RuntimeWarning, match=r"cannot compile.*BackendCompilerFailed.*eager torch") as caught:
        properties.assert_equal_bits(results(forget, retain, "pcgrad"), expected)
    assert len(caught) == 1
    properties.assert_equal_bits(results(forget, retain, "pcgrad"), expected)  # without a warning


@pytest.mark.usefixtures("nothing_compiled")
def test_small_work_is_not_compiled(monkeypatch, caplog):
    """Until the elements that were processed without it would have paid for a compilation; and it is said."""
    monkeypatch.setattr(inductor, "COMPILE_AT_ONCE", 1 << 20)
    monkeypatch.setattr(inductor, "COMPILE_AFTER", 5 * inductor.COMPILE_FROM)
    f, r = torch.ones(inductor.COMPILE_FROM), torch.ones(inductor.COMPILE_FROM)
    compilations = []
    for _ in range(7):
        sago.synthesize_(f, r, "sum", stats=False)
        compilations.append(len(inductor._compiled))
    assert compilations == [0, 0, 0, 0, 0, 1, 1]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "sago"]
    assert "compiling code for gradients on the CPU" in said
    large = torch.ones(1 << 20, dtype=BF16)
    sago.synthesize_(large, large.clone(), "sum", stats=False)
    assert len(inductor._compiled) == 2


@pytest.mark.usefixtures("nothing_compiled")
def test_compilation_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    f, r = torch.ones(inductor.COMPILE_FROM), -torch.ones(inductor.COMPILE_FROM)
    sago.synthesize_(f, r, alpha=2.0)
    assert torch.equal(r, torch.full_like(r, -2.0))
    assert not inductor._compiled


@pytest.mark.usefixtures("nothing_compiled")
def test_a_thread_that_compiles_holds_up_no_other():
    """The other one runs uncompiled, and so does a child process that was forked meanwhile."""
    f, r = torch.ones(inductor.COMPILE_FROM), -torch.ones(inductor.COMPILE_FROM)
    with inductor._lock:
        sago.synthesize_(f, r, alpha=2.0)
        assert not inductor._compiled
        before = inductor._lock
        inductor._new_lock()  # as in a child process
        assert not inductor._lock.locked()
        inductor._lock = before
    assert torch.equal(r, torch.full_like(r, -2.0))


@pytest.mark.parametrize("family", ["tails", "unaligned"])
def test_slices_and_blocks_of_the_uncompiled_path(monkeypatch, family):
    """With slices so short that every boundary is met."""
    monkeypatch.setattr(compiled, "_EAGER", graphs.BLOCK)
    forget, retain = inputs.IN_RANGE[family](FP32, BF16)
    f, r = inputs.pair(3 * 4096 + 5)
    forget, retain = [*forget, f], [*retain, r.float()]
    for rule in ("sago", "pcgrad_global"):
        updates, report = COMPILED(forget, retain, rule)
        properties.assert_updates(updates, forget, retain, rule)
        properties.assert_report(report, forget, retain, rule)


@pytest.mark.parametrize("check", [checks.small_tensors, checks.zeros_of_some, checks.sums_beside_inf])
def test_packs(check):
    check(COMPILED)


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
    """Compiled code works on tensors that share a storage."""
    size = inductor.COMPILE_FROM + 7
    buffer = inputs.normal(4 * size, 0).float()
    forget, retain = list(buffer[: 2 * size].split(size)), list(buffer[2 * size :].split(size))
    kept = [t.clone() for t in forget]
    expected, _ = COMPILED([t.clone() for t in forget], [t.clone() for t in retain], "pcgrad")
    sago.synthesize_(forget, retain, "pcgrad", backend="compiled")
    properties.assert_equal_bits([*retain, *forget], [*expected, *kept])


def test_the_update_of_a_gram_rule_over_large_tensors():
    forget, retain = ([t.float()] for t in inputs.pair(3 * inductor.COMPILE_FROM + 1))
    for rule in ("pcgrad", "blur"):
        properties.assert_as_oracle(COMPILED, forget, retain, rule, gamma=0.75, alpha=1.5)


@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_counts_over_large_tensors(rule):
    """Hidden among many, in two tensors of one row and none of the other."""
    forget, retain = (
        list(side)
        for side in zip(*(inputs.pair(3 * inductor.COMPILE_FROM, i) for i in range(3)), strict=True)
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


def test_on_a_machine_without_a_compiler(tmp_path):
    """For real: CXX names nothing, nothing is cached."""
    program = """
        import warnings, torch, sago
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            f, r = torch.ones(1 << 20), -torch.ones(1 << 20)
            for _ in range(2):
                sago.synthesize_(f, r, alpha=2.0)
        assert torch.equal(r, torch.full((1 << 20,), -4.0))
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
    assert done.stdout.startswith("1 sago: torch cannot compile code for the CPU (")
    assert "compiler" in done.stdout


def test_importing_sago_imports_no_compiler():
    program = (
        "import sys, sago; print([m for m in ('triton', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
