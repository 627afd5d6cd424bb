"""Every rule against the reference, at a size that takes seconds."""

import json

import pytest
import torch

import sago
import sago.reference
from benchmarks.released import RULES
from examples import check
from examples.learn import make_model
from examples.objectives import grad_diff, nll
from tests.support.oracle import rounding_error
from tests.support.properties import assert_near

TINY = ["--device=cpu", "--people=10", "--vocab=300", "--hidden=32", "--layers=1", "--steps=4", "--repeats=2"]
COSINES = ["cos_forget_retain", "cos_update_retain", "cos_update_forget"]


def lines_of_table(printed):
    """The table's lines below its header, split into words."""
    lines = printed.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("rule "))
    return [line.split() for line in lines[header + 1 :] if line]


@pytest.fixture
def wrong_sago(monkeypatch):
    """One tensor of `sago` has the wrong sign, on one backend; the report is right."""
    right = sago.synthesize_

    def synthesize_(forget, retain, rule="sago", backend=None, **options):
        report = right(forget, retain, rule=rule, backend=backend, **options)
        if rule == "sago" and backend == "compiled":
            retain[-1].neg_()
        return report

    monkeypatch.setattr(sago, "synthesize_", synthesize_)


def test_every_rule_on_every_backend(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert check.main([*TINY, f"--json={path}"]) == 0

    printed = capsys.readouterr().out
    table = lines_of_table(printed)
    cases = [(rule, backend) for rule in RULES for backend in ("compiled", "reference")]
    assert [(line[0], line[1]) for line in table] == cases
    assert len({len(line) for line in table}) == 1

    result = json.loads(path.read_text())
    assert result["passed"] is True
    assert [(row["rule"], row["backend"]) for row in result["rows"]] == cases
    for row in result["rows"]:
        assert row["passed"] is True
        assert min(row["ms"], row["stats_ms"]) > 0
        assert row["ratio"] == pytest.approx(row["released_ms"] / row["ms"])
        assert all(-1 <= row[name] <= 1 for name in COSINES)
        assert 0 < row["conflict_fraction"] < 1
    elementwise = [row for row in result["rows"] if row["rule"] in RULES[:3]]
    assert {row["against_reference"] for row in elementwise} == {"bitwise"}

    measured, training = result["measured"], result["training"]
    assert measured["dtype"] == "float32"
    assert measured["torch"] == torch.__version__
    assert measured["tensors"] == 11  # embedding and head in one, 9 in the layer, norm
    for value in (measured["device"], f"{measured['elements']:,}"):
        assert value in printed
    assert training["steps"] == 4
    assert training["known"].keys() == {"forget", "retain", "general"}


@pytest.mark.usefixtures("wrong_sago")
def test_a_wrong_update_is_told_and_exits_non_zero(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert check.main([*TINY, f"--json={path}"]) == 1

    printed = capsys.readouterr()
    assert "sago (compiled)" in printed.err.splitlines()[-1]
    failed = [line[:2] for line in lines_of_table(printed.out) if "FAIL" in line]
    assert failed == [["sago", "compiled"]]
    assert json.loads(path.read_text())["passed"] is False


def pairs():
    forget = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[0.5], [-4.0]])]
    retain = [torch.tensor([2.0, 1.0, -1.0]), torch.tensor([[0.25], [-1.0]])]
    return forget, retain


@pytest.mark.parametrize("rule", RULES)
def test_the_check_passes_what_the_reference_gives(rule):
    updates, report = sago.reference.synthesize(*pairs(), rule=rule)
    assert check.check(rule, updates, report, updates, report) == (True, "bitwise")


@pytest.mark.parametrize("rule", RULES[:3])
def test_the_check_of_an_elementwise_rule_sees_the_last_bit(rule):
    updates, report = sago.reference.synthesize(*pairs(), rule=rule)
    moved = [u.clone() for u in updates]
    moved[1][0] = torch.nextafter(moved[1][0], torch.tensor(torch.inf))
    passed, verdict = check.check(rule, moved, report, updates, report)
    assert not passed
    assert verdict.startswith("FAIL")


@pytest.mark.parametrize("rule", RULES[3:])
@pytest.mark.parametrize(("move", "passes"), [(1e-6, True), (1e-4, False), (torch.nan, False)])
def test_the_check_of_a_gram_rule_has_a_bound(rule, move, passes):
    updates, report = sago.reference.synthesize(*pairs(), rule=rule)
    largest = max(u.abs().max() for u in updates)
    moved = [u + move * largest for u in updates]
    passed, _ = check.check(rule, moved, report, updates, report)
    assert passed is passes


def test_the_check_covers_the_report():
    updates, report = sago.reference.synthesize(*pairs(), rule="sago")
    _, other = sago.reference.synthesize(*pairs(), rule="sum")
    assert check.check("sago", updates, other, updates, report) == (False, "FAIL report")


def test_gradients_are_those_of_the_objective():
    torch.manual_seed(0)
    model = make_model(vocab_size=40, hidden=32, layers=1)
    ids = torch.randint(40, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain, negated = (check.gradients(model, batch, objective) for objective in (nll, grad_diff))
    assert len(plain) == len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(g, -n) for g, n in zip(plain, negated, strict=True))
    # transformers' own loss is the same NLL, of 10 tokens through a layer of products of 32 to 100 terms.
    model(**batch).loss.backward()
    assert_near([p.grad for p in model.parameters()], plain, rounding_error(1000, torch.float32))


def test_timed_calls_take_turns_on_restored_inputs():
    log = []
    calls = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    ms = check.median_ms(calls, lambda: log.append("restore"), torch.device("cpu"), repeats=4)
    assert log == ["restore", "a", "restore", "b"] * (check.WARMUP + 4)
    assert all(ms[case] >= 0 for case in ("a", "b"))


def test_slow_calls_are_made_less_often(monkeypatch):
    monkeypatch.setattr(check, "LONGEST", 0.0)
    log = []
    check.median_ms({"a": lambda: log.append("a")}, lambda: None, torch.device("cpu"), repeats=100)
    assert len(log) == check.WARMUP + check.FEWEST


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    path = tmp_path / "check.json"
    assert check.main(["--device=cuda", *TINY[1:], f"--json={path}"]) == 0
    result = json.loads(path.read_text())
    assert result["measured"]["dtype"] == "bfloat16"
    assert {row["backend"] for row in result["rows"]} == {"triton", "reference"}
