"""The step benchmark counts known allocations, has every row, and refuses a wrong update."""

import gc
import json
import math
import re
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sago
from benchmarks import step, workloads
from benchmarks.__main__ import main
from benchmarks.gradients import WrongResult
from benchmarks.peak import MIB, peak
from benchmarks.released import released
from benchmarks.workloads import Decoder

GRADIENTS_DOMINATE = Decoder(512, 1, 64, 512, 64, head=64)  # 1.4 M parameters in 12 tensors
TINY = Decoder(32, 1, 64, 112, 32, head=32)
# torch raises this when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Nothing is compiled, collections look at few objects, and the profiler writes no log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        patch.setenv("KINETO_LOG_LEVEL", "6")
        patch.setattr(step, "WARM_UP", 0)
        workloads.llama(TINY, torch.float32, "meta")  # imports what it needs
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


def only(monkeypatch, *names):
    """Runs these contenders and no others."""
    every = step.cases
    monkeypatch.setattr(step, "cases", lambda *arguments: (c for c in every(*arguments) if c.name in names))


def allocate(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_older_memory_that_is_freed_is_not_counted():
    """Also if an earlier profile saw that it was allocated."""
    with peak():
        before = [allocate(10)]
    with peak() as found:
        before.clear()
        kept = allocate(2)
    assert (found.bytes, found.kept) == (2 * MIB, 2 * MIB)
    del kept


def test_memory_that_is_alive_together_adds_up():
    before = [allocate(10)]
    with peak() as found:
        before.clear()  # not counted
        first = allocate(10)
        del first
        tensors = [allocate(10), allocate(5), allocate(3)]
        tensors.clear()
        tensors.append(allocate(1))
    assert (found.bytes, found.kept) == (18 * MIB, 1 * MIB)


def test_memory_of_backwards_and_temporaries_is_counted():
    weight, x = torch.randn(1024, 1024, requires_grad=True), torch.randn(2, 1024)
    for kept in (4 * MIB, 0):  # the second gradient is added to the first and freed
        with peak() as found:
            (x @ weight).sum().backward()
        assert found.kept == kept
        assert 4 * MIB <= found.bytes < 4.1 * MIB
    y = torch.ones(MIB)  # 4 MiB
    with peak() as found:
        z = (y + y) * y
    assert (found.bytes, found.kept) == (8 * MIB, 4 * MIB)
    assert z[0] == 2


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    file = tmp_path_factory.mktemp("step") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step.SHAPES, "small", GRADIENTS_DOMINATE)
        command = ["step", "--shape=small", "--rule=sago", "--tokens=8", "--repeats=1", "--json", str(file)]
        assert main(command) == 0
    return json.loads(file.read_text())


def test_every_contender_has_a_row(record):
    assert (record["device"], record["hidden"], record["micro_batches"]) == ("cpu", 512, 1)
    ours = "ratio <= 1.03; extra_copies <= 1", "ratio <= 1.03; peak_ratio <= 1.02"
    rows = [(row["contender"], row["rule"], row["statistics"], row["target"]) for row in record["rows"]]
    assert rows == [
        ("summed loss", "sum", None, None),
        ("summed loss, two backwards", "sum", None, None),
        *(("GradientBuckets", "sago", stats, ours[0]) for stats in (True, False)),
        *(("GradientBuckets, one copy", "sago", stats, ours[1]) for stats in (True, False)),
        ("released", "sago", None, None),
        ("foreach", "sago", None, None),
        ("TorchJD", "pcgrad_symmetric", None, None),
    ]
    for row in record["rows"]:
        assert tuple(row) == step.COLUMNS
        if find_spec("torchjd") or row["contender"] != "TorchJD":
            assert row["note"] is None
            assert row["ms"] > 0
            assert row["p20"] == row["ratio"] == row["p80"]  # of one round
    assert record["rows"][0]["ratio"] == 1


def test_copies_of_the_gradients(record):
    """A backward holds the gradients of two tensors and the activations beside the copies."""
    plain, copy = record["rows"][0], 4 * record["elements"]
    tables = MIB / copy
    slack = 2 * 4 * 512 * 512 / copy + 2 * tables
    for row in record["rows"][: 8 if find_spec("torchjd") is None else 9]:
        kept = 2 if row["contender"] == "GradientBuckets" else 1
        assert row["copies_kept"] == pytest.approx(kept, abs=tables)
        # The others have temporaries, which the size of the largest tensor does not bound.
        peers = {"released": (3, 4), "foreach": (2, 4 + slack), "TorchJD": (2, 4 + slack)}
        least, most = peers.get(row["contender"], (kept, kept + slack))
        assert least <= row["copies"] < most, row
        assert plain["peak_mib"] * row["peak_ratio"] == pytest.approx(row["peak_mib"])
        if row["contender"] == "GradientBuckets":
            assert row["extra_copies"] == pytest.approx(1, abs=2 * tables)
        elif row["contender"] == "GradientBuckets, one copy":
            assert row["peak_ratio"] <= 1.02 + tables


def test_rows_without_numbers_say_why(monkeypatch):
    def too_large(params, rule, losses):
        raise torch.OutOfMemoryError

    only(monkeypatch, "summed loss", "GradientBuckets, one copy", "released", "TorchJD")
    monkeypatch.setattr(step, "by_released", too_large)
    monkeypatch.setitem(sys.modules, "torchjd.autojac", None)
    record = step.run(TINY, ["sago", "blur"], tokens=8, micro_batches=2, repeats=0)
    notes = {(row["contender"], row["rule"]): row["note"] for row in record["rows"]}
    assert notes.pop(("summed loss", "sum")) is None
    assert "torchjd" in notes.pop(("TorchJD", "pcgrad_symmetric"))
    assert notes == {
        ("GradientBuckets, one copy", "sago"): "takes one retain backward",
        ("GradientBuckets, one copy", "blur"): "takes no rule of global scope",
        ("released", "sago"): "out of memory",
        ("released", "blur"): "out of memory",
    }
    for row in record["rows"][1:]:
        assert row["peak_mib"] is row["copies"] is row["target"] is row["ms"] is None
    assert record["rows"][0]["copies"] > 2


def test_copies_for_two_micro_batches():
    for dtype, counts in {
        torch.float32: {"summed loss": 2, "summed loss, two backwards": 1, "released": 4},
        torch.bfloat16: {"GradientBuckets, float32": 5},  # 4 + 4 + 2 bytes for an element of 2
    }.items():
        model = step._Model(GRADIENTS_DOMINATE._replace(layers=2), dtype, "cpu", 4, 2, "sgd")
        copy = sum(p.nbytes for p in model.params)
        for case in step.cases(["pcgrad_global"], dtype, 2):
            if case.name in counts:
                found = model.peak(case, model.full).bytes / copy
                # More are the gradients of two tensors, and temporaries because nothing is compiled.
                assert counts[case.name] <= found < counts[case.name] + 0.9, case
                step._clear(model.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_updates_of_two_micro_batches(dtype):
    model = step._Model(TINY, dtype, "cpu", 8, 2, "sgd")
    right = step.gradients(model.params, model.full)
    names = set()
    for case in step.cases(["sago", "pcgrad", "blur"], dtype, 2):
        if case.note is None and (case.name != "TorchJD" or find_spec("torchjd")):
            case.make(model.params)[0](model.full)
            step.check(case, model.params, *right)
            step._clear(model.params)
            names.add(case.name)
    assert ("GradientBuckets, float32" in names) == (dtype == torch.bfloat16)


class Passes(TorchDispatchMode):
    """Counts the operations on whole gradients outside of backwards."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.split(".")[0]
        if name in ("clone", "add_", "fill_", "copy_", "zero_") and torch._C._current_graph_task_id() < 0:
            self.found += [name] * (args[0].numel() >= self.numel)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "passes"), [("GradientBuckets", ["fill_"] * 2), ("released", ["clone", "clone", "add_", "add_"])]
)
def test_passes_that_extraction_adds_to_a_step(name, passes):
    """Two fills, of both accumulators, where the released code clones and adds each gradient."""
    weight = torch.ones(64, 32, requires_grad=True)
    case = next(c for c in step.cases(["sago"], torch.float32, 2) if c.name == name)
    run, zero = case.make([weight])
    losses = [(lambda: -weight.sum(), lambda: weight.square().sum())] * 2
    run(losses[:1])
    with Passes(weight.numel()) as seen:
        zero()
        run(losses)
    assert [n for n in seen.found if n != "copy_"] == passes


@pytest.mark.parametrize("optimizer", step.OPTIMIZERS)
def test_the_optimizer_keeps_the_weights_and_adds_no_memory(optimizer):
    model = step._Model(TINY, torch.float32, "cpu", 8, 1, optimizer)
    before = [p.clone() for p in model.params]
    case = next(step.cases([], torch.float32, 1))
    model.whole(model.started(case), model.full)
    assert all(torch.equal(p, b) for p, b in zip(model.params, before, strict=True))
    for p in model.params:
        p.grad = torch.ones_like(p)
    with peak() as found:
        model.optimizer.step()
    assert found.bytes < max(p.nbytes for p in model.params)


def swapped(forget, retain, rule, gamma, alpha):
    return released(forget, retain, rule, alpha, gamma)


def without_the_last(forget, retain, rule, gamma, alpha):
    updates = released(forget, retain, rule, gamma, alpha)
    updates[-1].view(-1)[-1] = math.nan
    return updates


def without_a_norm(forget, retain, rule, gamma, alpha):
    """Writes no update of the smallest tensor, which has one of 200 elements of the model."""
    updates = released(forget, retain, rule, gamma, alpha)
    i = min(range(len(updates)), key=lambda i: updates[i].numel())
    return [*updates[:i], retain[i], *updates[i + 1 :]]


@pytest.fixture(scope="module")
def tiny():
    model = step._Model(TINY, torch.bfloat16, "cpu", 8, 1, "sgd")
    return model, step.gradients(model.params, model.full)


@pytest.mark.parametrize("wrong", [swapped, without_the_last, without_a_norm])
@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_a_wrong_update_is_refused(tiny, wrong, rule, monkeypatch):
    monkeypatch.setattr(step, "released", wrong)
    model, right = tiny
    (case,) = (c for c in step.cases([rule], torch.bfloat16, 1) if c.name == "released")
    case.make(model.params)[0](model.full)
    with pytest.raises(WrongResult, match=rf"released \(bfloat16, {rule}\) does not have the update"):
        step.check(case, model.params, *right)


@pytest.mark.parametrize(
    "case",
    list(step.cases(["sago", "pcgrad"], torch.bfloat16, 1)),
    ids=lambda c: f"{c.name} {c.rule} {c.stats}",
)
def test_the_tolerance_of_every_contender_refuses_other_weights(tiny, case, monkeypatch):
    if case.name == "TorchJD":
        pytest.importorskip("torchjd", reason="needs TorchJD")
    model, right = tiny
    step._clear(model.params)
    with monkeypatch.context() as patch:
        patch.setattr(step, "GAMMA", 1.0)
        case.make(model.params)[0](model.full)
    with pytest.raises(WrongResult, match=r"\(bfloat16, "):
        step.check(case, model.params, *right)


def test_a_wrong_update_ends_the_command_without_a_table(monkeypatch, capsys, tmp_path):
    only(monkeypatch, "summed loss", "released")
    monkeypatch.setitem(step.SHAPES, "small", TINY)
    monkeypatch.setattr(step, "released", without_the_last)
    file = tmp_path / "record.json"
    assert main(["step", "--shape=small", "--tokens=8", "--repeats=0", "--json", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "released (float32, sago) does not have the update of sago.reference" in printed.err
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("smollm2-135m", 272, 134_515_008),
        ("llama-3.2-1b", 146, 1_235_814_400),
        ("llama-3-8b", 291, 8_030_261_248),
    ],
)
def test_the_shapes_are_those_of_the_models(name, tensors, numel):
    params = list(workloads.llama(step.SHAPES[name], torch.bfloat16, "meta").parameters())
    assert (len(params), sum(p.numel() for p in params)) == (tensors, numel)


def test_the_small_shape_has_the_proportions_of_llama_3_8b():
    shares = []
    for name in ("small", "llama-3-8b"):
        sizes = [p.numel() for p in workloads.llama(step.SHAPES[name], torch.bfloat16, "meta").parameters()]
        shares.append(max(sizes) / sum(sizes))
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


@pytest.mark.parametrize("tokens", [4, 256])
def test_the_texts_make_the_global_rule_project(tokens):
    model = step._Model(TINY, torch.float32, "cpu", tokens, 1, "sgd")
    forget, retain = step.gradients(model.params, model.full)
    _, report = sago.synthesize(forget, retain, rule="pcgrad_global")
    assert report.summary()["cos_forget_retain"] < -0.1


@pytest.mark.parametrize("argument", ["--tokens=1", "--micro-batches=0", "--repeats=-1", "--repeats=few"])
def test_numbers_out_of_bounds_are_refused(argument, capsys):
    with pytest.raises(SystemExit):
        main(["step", argument])
    assert re.search(r"argument --\S+: should be an integer of at least \d. Found '", capsys.readouterr().err)


@pytest.mark.gpu
def test_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(step.SHAPES, "small", GRADIENTS_DOMINATE)
    file = tmp_path / "record.json"
    command = ["step", "--device=cuda", "--shape=small", "--tokens=8", "--repeats=2", "--json", str(file)]
    assert main(command) == 0
    copies = {(row["contender"], row["rule"]): row["copies"] for row in json.loads(file.read_text())["rows"]}
    assert 2 <= copies["GradientBuckets", "sago"] < 2.2
    assert 1 <= copies["GradientBuckets, one copy", "sago"] < 1.2
    assert copies["released", "sago"] >= 3
