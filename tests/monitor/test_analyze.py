"""`python -m sago analyze`."""

import csv
import re
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import sago
from examples.corpus import byte_tokenizer, random_model
from sago.__main__ import main
from sago.monitor import analyze

NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5 + i, generator=generator) for i, name in enumerate(NAMES)}


def rows_of(folder):
    with (folder / "conflicts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check(folder, report):
    rows = rows_of(folder)
    assert [row["group"] for row in rows] == [str(group) for group in report.groups]
    for name, expected in report.to_dict().items():
        assert [float(row[name]) for row in rows] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert (folder / "conflicts.png").stat().st_size > 10_000


def saved(kind, path, values):
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(values, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    torch.save(list(values.values()) if kind == "list" else values, path)
    return path


@pytest.mark.parametrize("kind", ["dict", "list", "safetensors"])
def test_two_files_of_gradients(kind, tmp_path, capsys):
    forget, retain = gradients(0), dict(reversed(gradients(1).items()))
    if kind == "list":
        retain = gradients(1)
    files = [saved(kind, tmp_path / name, g) for name, g in (("f.pt", forget), ("r.pt", retain))]
    arguments = ["analyze", *map(str, files), "--rule=pcgrad", "--gamma=2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    if kind == "safetensors":  # which sorts names
        forget = dict(sorted(forget.items()))
    pairs = list(forget.values()), [retain[name] for name in forget]
    groups = [f"[{i}]" for i in range(len(NAMES))] if kind == "list" else list(forget)
    _, report = sago.synthesize(*pairs, rule="pcgrad", gamma=2.0, groups=groups)
    check(tmp_path / "out", report)
    printed = capsys.readouterr().out
    if kind == "dict":
        layers = report.regroup(["no layer", "layer 0", "layer 0", "layer 1", "layer 1"])
        assert printed.startswith(f"{layers.table()}\nWritten: ")


@pytest.mark.parametrize("there", [True, False])
def test_a_terminal_gets_the_table_of_rich_if_it_is_installed(there, monkeypatch, capsys):
    forget, retain = gradients(0).values(), gradients(1).values()
    _, report = sago.synthesize(list(forget), list(retain), groups=NAMES)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    if not there:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    analyze._print(report)
    printed = capsys.readouterr().out
    assert ("┃" in printed) is there
    assert (printed == f"{report.table()}\n") is not there


@pytest.mark.parametrize("rule", ["sago", "pcgrad_global"])
def test_a_model_and_two_texts(rule, tmp_path, capsys):
    model, tokenizer = random_model().eval(), byte_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    texts = {"forget": ["Oslo is in Norway.", "Paris is in France."], "retain": ["Two plus two is four."]}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines) + "\n")
    files = [str(tmp_path / f"{name}.txt") for name in texts]
    options = [f"--model={tmp_path / 'model'}", "--tokens=12", f"--rule={rule}", f"--out={tmp_path}"]
    assert main(["analyze", *files, *options]) == 0

    def gradient(lines, sign):
        model.zero_grad()
        for line in lines:
            ids = torch.tensor([tokenizer.encode(line)[:12]])
            (sign / len(lines) * model(input_ids=ids, labels=ids).loss).backward()
        return [p.grad.clone() for p in model.parameters()]

    names = [name for name, _ in model.named_parameters()]
    f, r = gradient(texts["forget"], -1.0), gradient(texts["retain"], 1.0)
    _, report = sago.synthesize(f, r, rule, groups=names)
    check(tmp_path, report)  # the same operations in the same order have the same bits
    assert "layer 3" in capsys.readouterr().out


WRONG = {
    "other names": ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "same names.*'a'"),
    "not tensors": ({"a": 1}, {"a": 2}, "should have a list or a dict of tensors"),
    "tensors of numbers": (torch.ones(2), torch.ones(2), "list or a dict of tensors. Found Tensor"),
    "a number in a list": ([torch.ones(2), 3], [torch.ones(2)], "Found list that holds int"),
    "other lengths": ([torch.ones(2)] * 3, [torch.ones(2)], "equally many gradients. Found 3 in .* and 1 in"),
    "a list and a dict": (
        [torch.ones(2)],
        {"a": torch.ones(2)},
        "Both files should have a list, or both a dict. Found a list in .*f and a dict in .*r. Save",
    ),
    "other shapes": ([torch.ones(2)], [torch.ones(3)], "shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_wrong(wrong, tmp_path, capsys):
    *values, message = WRONG[wrong]
    for name, value in zip(("f", "r"), values, strict=True):
        torch.save(value, tmp_path / name)
    assert main(["analyze", str(tmp_path / "f"), str(tmp_path / "r"), f"--out={tmp_path}"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "conflicts.csv").exists()


def test_files_that_are_not_there_and_commands_that_do_not_exist(tmp_path, capsys):
    assert main(["analyze", str(tmp_path / "f"), str(tmp_path / "r")]) == 1
    assert "Found no such file" in capsys.readouterr().err
    (tmp_path / "f").write_text("\n")
    random_model().save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")  # without a first token
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["analyze", *[str(tmp_path / "f")] * 2, f"--model={tmp_path / 'model'}"]) == 1
    assert "should have a text on each line" in capsys.readouterr().err
    (tmp_path / "f").write_text("A\n")
    assert main(["analyze", *[str(tmp_path / "f")] * 2, f"--model={tmp_path / 'model'}"]) == 1
    assert "should have at least two tokens" in capsys.readouterr().err
    assert main(["analyze", *[str(tmp_path / "f")] * 2, f"--model={tmp_path / 'none'}"]) == 1
    assert "`--model` should be a folder with a model" in capsys.readouterr().err
    assert main(["analyze", *[str(tmp_path / "f")] * 2]) == 1
    assert "For texts, name a model with --model" in capsys.readouterr().err
    torch.save(torch.nn.Linear(2, 2), tmp_path / "f")
    assert main(["analyze", *[str(tmp_path / "f")] * 2]) == 1
    assert "should have gradients, written by torch.save" in capsys.readouterr().err
    assert main(["analyse"]) == 2
    assert "Usage: python -m sago [analyze ...]" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [-1, 1])
def test_too_few_tokens(tokens, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["analyze", "f", "r", "--model=model", f"--tokens={tokens}"])
    assert raised.value.code == 2
    assert re.search(f"--tokens: should be at least 2, because .* Found {tokens}", capsys.readouterr().err)


def test_tokens_that_the_model_does_not_accept(tmp_path, capsys):
    """A model with learned positions raises the same error if a text has too many tokens."""
    for part in (random_model(vocabulary=10), byte_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "f").write_text("Oslo\n")
    assert main(["analyze", *[str(tmp_path / "f")] * 2, f"--model={tmp_path / 'model'}"]) == 1
    message = r"should accept 5 tokens, each from 0 to \d+, for a text of .*f\. Found.*smaller `--tokens`"
    assert re.search(message, capsys.readouterr().err)
