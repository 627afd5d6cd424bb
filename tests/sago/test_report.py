"""The report: its numbers against the oracle, its absence, and that nothing is read before it is.

Sums to 1e-6 of the magnitudes that are added up, cosines and norms as they follow from the sums.
"""

import copy
import io
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import sago
from tests.support import inputs, oracle, properties
from tests.support.backends import GLOBAL, GRAM, RULES

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
FIELDS = (
    *("ff", "fr", "rr", "uu", "uf", "ur", "conflict_fraction", "nonfinite_forget", "nonfinite_retain"),
    *(
        "cos_forget_retain",
        "cos_update_forget",
        "cos_update_retain",
        "norm_forget",
        "norm_retain",
        "norm_update",
    ),
)


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "equal", "is_nonzero"), f"{name} reads a value"
        return func(*args, **(kwargs or {}))


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP64, FP64)], ids=str)
def test_against_the_oracle(backend, rule, dtypes):
    for name in ("scale_1", "antiparallel", "missing", "scale_1e-18"):
        forget, retain = inputs.IN_RANGE[name](*dtypes)
        _, report = backend(forget, retain, rule, gamma=0.75, alpha=1.5)
        properties.assert_report(report, forget, retain, rule, gamma=0.75, alpha=1.5)


def test_rich_prints_the_table_with_names_as_they_are():
    forget, retain = [tensor(1.0, -2.0), tensor(1e9)], [tensor(3.0, 1.0), tensor(1e-9)]
    _, report = sago.synthesize(forget, retain, groups=["layers.0", "[red]head[/red]"])
    console = Console(file=io.StringIO(), width=250)
    console.print(report)
    printed = console.file.getvalue().splitlines()
    assert "rule sago" in printed[0]
    for line in report.table().splitlines()[1:4]:
        (row,) = [row for row in printed if row.startswith(f"│ {line.split()[0]} ")]
        assert row.replace("│", " ").split() == line.split()
    assert any("rounding noise in 1 of 2 groups" in line for line in printed)
    assert "conflict fraction" in " ".join(printed[1:4])


@pytest.mark.parametrize("rule", ["sago", "blur"])
def test_over_blocks_and_chunks(fast_backend, rule):
    forget, retain = inputs.around_a_chunk(BF16, BF16)
    forget, retain = forget[2:3], retain[2:3]
    _, report = fast_backend(forget, retain, rule)
    properties.assert_report(report, forget, retain, rule)
    forget, retain = inputs.unaligned(FP32, FP32)
    _, report = fast_backend(forget, retain, rule)
    properties.assert_report(report, forget, retain, rule)


def test_by_hand(backend):
    # sago: u = (-4, 0, 1): in conflict at 0.
    _, report = backend([tensor(3.0, 0.0, 1.0)], [tensor(-4.0, 3.0, 0.0)], "sago")
    assert report.groups == (0,)
    found = report.summary()
    assert set(found) == set(FIELDS)
    expected = {
        "ff": 10,
        "fr": -12,
        "rr": 25,
        "uu": 17,
        "uf": -11,
        "ur": 16,
        "conflict_fraction": 1 / 3,
        "nonfinite_forget": 0,
        "nonfinite_retain": 0,
        "norm_forget": 10**0.5,
        "norm_retain": 5,
        "norm_update": 17**0.5,
        "cos_forget_retain": -12 / 250**0.5,
        "cos_update_forget": -11 / 170**0.5,
        "cos_update_retain": 16 / (17 * 25) ** 0.5,
    }
    # The sums are exact; of them come roots, products and quotients.
    assert found == pytest.approx(expected, rel=oracle.rounding_error(8, FP64))


def test_one_row_a_group_and_their_total(backend):
    forget, retain = (
        [tensor(1.0, 2.0), tensor(2.0), tensor(-1.0)],
        [tensor(1.0, -2.0), tensor(2.0), tensor(3.0)],
    )
    _, report = backend(forget, retain, "pcgrad", groups=["x", "y", "x"])
    columns = report.to_dict()
    assert list(columns) == list(FIELDS)
    assert columns["ff"] == [6.0, 4.0]
    assert columns["fr"] == [-6.0, 4.0]
    assert columns["conflict_fraction"] == [2 / 3, 0.0]
    assert all(report.ff.shape == getattr(report, name).shape == (2,) for name in FIELDS)
    assert all(getattr(report, name).device.type == backend.device for name in FIELDS)
    total = report.summary()
    assert total["ff"] == 10.0
    assert total["conflict_fraction"] == 2 / 4
    assert total["norm_forget"] == math.sqrt(10)
    assert total["cos_forget_retain"] == pytest.approx(
        -2 / math.sqrt(10 * 18), rel=oracle.rounding_error(8, FP64)
    )


def test_the_table_is_text(backend):
    _, report = backend(
        [tensor(3.0, 4.0)] * 2, [tensor(-3.0, 4.0)] * 2, "sago", groups=["layer.0", "layer.1"]
    )
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["group", "layer.0", "layer.1", "total"]
    assert len({len(line) for line in lines}) == 1
    header = lines[0].split()
    row, total = (dict(zip(header, line.split(), strict=True)) for line in lines[2:])
    assert float(row["norm_forget"]) == 5
    assert float(row["cos_forget_retain"]) == 7 / 25
    assert float(total["conflict_fraction"]) == 0.5


@pytest.mark.parametrize("rule", RULES)
def test_non_finite_elements_are_counted(backend, rule):
    f = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf, 2.0, torch.inf])
    r = torch.tensor([1.0, -1.0, 1.0, torch.nan, torch.inf, -torch.inf])
    forget, retain = [f, torch.ones(3), None], [r, torch.ones(3), r]
    _, report = backend(forget, retain, rule)
    found = report.to_dict()
    rows = [sum(found[name]) if rule in GLOBAL else found[name] for name in properties.COUNTS]
    assert rows == ([4, 6] if rule in GLOBAL else [[4, 0, 0], [3, 0, 3]])
    assert report.summary()["conflict_fraction"] == 2 / 15
    assert not math.isfinite(report.summary()["ff"])


def test_large_finite_elements_are_not_counted(backend):
    """Their squares overflow; they do not."""
    f = torch.full((40,), 3e38)
    _, report = backend([f], [-f], "sago")
    assert [report.nonfinite_forget.item(), report.nonfinite_retain.item()] == [0, 0]
    assert report.conflict_fraction.item() == 1


def test_a_hidden_inf_is_counted(backend):
    """In conflict it leaves no trace in the update."""
    f = torch.tensor([torch.inf, 1.0])
    (update,), report = backend([f], [torch.tensor([-1.0, 1.0])], "sago")
    assert update.isfinite().all()
    assert report.nonfinite_forget.item() == 1
    assert math.isfinite(report.uu.item())


@pytest.mark.parametrize("rule", RULES)
def test_absent_fields_without_stats(backend, rule):
    _, report = backend([tensor(1.0, -1.0)], [tensor(1.0, 2.0)], rule, stats=False)
    present = set(FIELDS) - set(report.absent)
    assert present == (set(FIELDS) - {"conflict_fraction", *properties.COUNTS} if rule in GRAM else set())
    assert set(report.to_dict()) == set(report.summary()) == present
    assert all(getattr(report, name) is None for name in report.absent)
    assert str(report.absent) in repr(report) or not report.absent
    assert report.table().splitlines()[0].startswith("group")
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    for printed in (report.table(), console.file.getvalue()):
        assert ("No statistics (stats=False)." in printed) is (rule not in GRAM)


def test_rows_are_added_up_by_keys():
    forget, retain = [[tensor(float(i), -1.0) for i in range(4)] for _ in range(2)]
    report = sago.synthesize(forget, retain)[1]
    merged = report.regroup(["a", "b", "a", "c"])
    assert merged.groups == ("a", "b", "c")
    assert merged.ff.tolist() == [0 + 1 + 4 + 1, 1 + 1, 9 + 1]
    assert merged.numel.tolist() == [4, 2, 2]
    with pytest.raises(
        TypeError,
        match=r"each row of the report, in the order of `report\.groups`\. Found "
        r"function\. Write `\[key\(name\) for name in report\.groups\]`",
    ):
        report.regroup(lambda group: group)
    with pytest.raises(ValueError, match=r"4 keys, one for each row of the report.*Found 3"):
        report.regroup(["a", "b", "c"])
    with pytest.raises(TypeError, match=r"`groups\[1\]` should be hashable"):
        report.regroup(["a", [], "a", "b"])


def test_every_field_is_described():
    """`help(report)` shows the docstrings of the properties, and docs/gradients.md has them in a table."""
    page = (Path(__file__).parents[2] / "docs/gradients.md").read_text(encoding="utf-8")
    table = page.split("### The report\n")[1].split("\n### ")[0]
    for name in (*FIELDS, "total_norm", "absent"):
        assert getattr(sago.SynthesisReport, name).__doc__
        assert f"`{name}`" in table


def test_backends_agree_on_what_is_absent(backend):
    rule = sago.Rule(
        "gated", lambda ff, fr, rr, gamma, alpha: (0.0, alpha, gamma, fr / rr), "tensor", gated=True
    )
    _, report = backend([tensor(1.0, -1.0)], [tensor(1.0, 2.0)], rule, stats=False)
    uses_update = ("uu", "uf", "ur", "cos_update_forget", "cos_update_retain", "norm_update")
    assert set(report.absent) == {"conflict_fraction", *properties.COUNTS, *uses_update}


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_read_before_the_report(fast_backend, rule):
    options = {
        "rule": rule,
        "backend": fast_backend.name,
        "gamma": torch.tensor(0.5, device=fast_backend.device),
    }
    forget, retain = ([t.to(fast_backend.device)] for t in inputs.pair(100))
    for stats in (True, False):
        with NoReading():
            report = sago.synthesize_(forget, retain, stats=stats, reduce_gram=lambda table: None, **options)
            values = [getattr(report, name) for name in FIELDS]
        assert [v is None for v in values] == [name in report.absent for name in FIELDS]
    with NoReading(), pytest.raises(AssertionError, match="reads a value"):
        report.numel.sum().item()


def test_a_late_reading_is_of_the_call(backend):
    """The gradients and the weight have moved on."""
    forget, retain = ([t.to(backend.device)] for t in inputs.pair(50))
    f, r = forget[0].clone(), retain[0].clone()
    gamma = torch.tensor(0.5, dtype=FP64, device=backend.device)
    report = sago.synthesize_(forget, retain, "pcgrad", gamma=gamma, backend=backend.name)
    for t in (*forget, *retain, gamma):
        t.fill_(torch.nan)
    properties.assert_report(report, [f], [r], "pcgrad", gamma=0.5)


def test_numel(backend):
    for stats, rule in itertools.product((True, False), ("sago", "pcgrad")):
        _, report = backend([tensor(1.0, 2.0), tensor(1.0)], [tensor(1.0, 2.0), None], rule, stats=stats)
        assert report.numel.tolist() == [2, 1]
        assert report.numel.dtype == torch.int64


def saved(report):
    file = io.BytesIO()
    torch.save(report, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report)), saved]


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle", "torch.save"])
def test_a_copy_has_the_same_numbers(copied, stats):
    forget, retain = inputs.IN_RANGE["scale_1"](FP32, FP32)
    report = sago.synthesize(forget, retain, "pcgrad", stats=stats)[1]
    found = copied(report)
    assert type(found) is type(report)
    assert (found.rule, found.groups, found.absent) == (report.rule, report.groups, report.absent)
    properties.assert_equal_bits([found.numel], [report.numel])
    for name in (*FIELDS, "total_norm"):
        properties.assert_equal_bits([getattr(found, name)], [getattr(report, name)])
    assert found.table() == report.table()


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle", "torch.save"])
def test_a_copy_waits_for_sums_and_shares_no_memory(copied):
    """The sums of shards may be on their way, and a plan writes its next sums in the same table."""
    table, waited = tensor(1.0, 2.0), []

    def columns():
        waited.append(table.fill_(5.0))
        return {"ff": table, "rr": table}

    found = copied(sago.SynthesisReport("sago", ("a", "b"), [3, 4], columns))
    assert len(waited) == 1
    table.fill_(7.0)
    assert found.to_dict()["norm_forget"] == [5.0**0.5] * 2
    assert found.numel.tolist() == [3, 4]
    assert len(waited) == 1


@pytest.mark.parametrize("scope", ["element", "tensor"])
@pytest.mark.parametrize("stats", [True, False])
def test_a_variable_that_a_rule_reads_may_change_before_the_report_is_read(scope, stats):
    factor = [1.0]
    rule = sago.Rule("scheduled", lambda ff, fr, rr, gamma, alpha: (factor[0] * gamma, alpha), scope)
    forget, retain = tensor(1.0, 2.0), tensor(3.0, -4.0)
    report = sago.synthesize(forget, retain, rule, stats=stats)[1]
    factor[0] = 100.0
    if stats or scope == "tensor":
        assert report.uu.tolist() == [(forget + retain).square().sum().item()]
