"""WMDP's files, read and misread; questions scored as by hand; losses; the command end to end, offline."""

import json
import math
from functools import partial

import pytest
import torch

import sago.reference
from examples import wmdp
from examples.choices import LETTERS, Question, accuracy, log_likelihoods, prompt, questions
from examples.command import OBJECTIVES
from examples.corpus import batch_of, batches_of, byte_tokenizer, random_model
from examples.files import records, texts
from examples.losses import RMU, OfAnswers, token_nll
from examples.objectives import FORGET, simnpo
from examples.unlearn import unlearn
from tests.support.likelihoods import likelihood_by_hand
from tests.support.oracle import rounding_error
from tests.support.properties import assert_near

# Raised inside of torch when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

# Through 4 layers, each of 7 products of 32 or 64 terms one after the other: some 1000 roundings to fp32.
THROUGH = rounding_error(1000, torch.float32)
GOOD = {"question": " Which? ", "choices": ["w", "x", "y", "z"], "answer": 2}


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return random_model().eval()


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# Files.


def test_texts_of_json_lines_and_of_plain_text(tmp_path):
    long = "word " * 20
    lines = write(
        tmp_path / "a.jsonl", {"text": long, "title": "t"}, "", {"text": "short"}, {"text": long + "2"}
    )
    assert texts(lines, "somewhere", 50) == [long, long + "2"]
    plain = write(tmp_path / "wiki.test.raw", " = Title = ", "", long)
    assert texts(plain, "somewhere", 50) == [long]


def test_records_of_a_list_and_of_lines_are_the_same(tmp_path):
    values = [GOOD, {**GOOD, "answer": 0}]
    lines = records(write(tmp_path / "a.json", *values), "somewhere")
    listed = records(write(tmp_path / "b.json", json.dumps(values, indent=2)), "somewhere")
    assert [record.value for record in lines] == [record.value for record in listed] == values
    assert lines[1].where.endswith("a.json, line 2")
    assert listed[1].where.endswith("b.json, record 1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', r"line 2: this should be JSON. Found '{\"text\": \"cut off'"),
        ("plain text", r"line 2: this should be JSON. Found 'plain text'"),
        ('"a string"', r"line 2: a record should be a JSON object. Found str"),
        ({"abstract": "a"}, r"line 2: a record should have the field `text`. Found `abstract`"),
        ({"text": None}, r"line 2: field `text` should be str. Found NoneType"),
        ({"text": ["a"]}, r"line 2: field `text` should be str. Found list"),
    ],
)
def test_malformed_lines_of_a_corpus(tmp_path, line, message):
    path = write(tmp_path / "bio-forget-corpus.jsonl", {"text": "good"}, line)
    with pytest.raises(ValueError, match=message) as error:
        texts(path, "somewhere")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["w", "x", "y"]}, "field `choices` should be at least 4 strings"),
        ({"choices": ["w", "x", "y", "z", "v"]}, "4 choices and an answer from 0 to 3. Found 5 choices"),
        ({"choices": ["w", "x", "y", 4]}, "field `choices` should be at least 4 strings"),
        ({"choices": "wxyz"}, "field `choices` should be list. Found str"),
        ({"answer": 4}, "an answer from 0 to 3. Found 4 choices and answer 4"),
        ({"answer": -1}, "answer -1"),
        ({"answer": "C"}, "field `answer` should be int. Found str"),
        ({"answer": True}, "field `answer` should be int. Found bool"),
        ({"question": 3}, "field `question` should be str. Found int"),
    ],
)
def test_malformed_questions(tmp_path, change, message):
    path = write(tmp_path / "bio_questions.json", GOOD, {**GOOD, **change})
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        questions(path, "somewhere")


def test_a_file_without_records_or_texts(tmp_path):
    with pytest.raises(ValueError, match="should hold at least one record"):
        records(write(tmp_path / "a.json", ""), "somewhere")
    with pytest.raises(ValueError, match="texts of at least 50 characters"):
        texts(write(tmp_path / "a.jsonl", {"text": "short"}), "somewhere", 50)


def test_missing_files_are_named_with_where_they_are_published(tmp_path):
    wmdp.write_sample(tmp_path)
    for domain in wmdp.DOMAINS:
        wmdp.read(tmp_path, domain)
    for name, domain, published in (
        ("bio-forget-corpus.jsonl", "bio", "cais/wmdp-bio-forget-corpus .*on request"),
        ("cyber-forget-corpus.jsonl", "cyber", "cais/wmdp-corpora"),
        ("cyber_questions.json", "cyber", "cais/wmdp of"),
        ("wiki.test.raw", "bio", "Salesforce/wikitext"),
    ):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}. It is published as {published}"):
            wmdp.read(tmp_path, domain)
        (tmp_path / name).write_text(kept)
    (tmp_path / "mmlu_questions.json").unlink()
    assert wmdp.read(tmp_path, "bio").mmlu == []


def test_the_retain_texts_are_those_asked_for(tmp_path):
    wmdp.write_sample(tmp_path)
    wikitext, corpus = (wmdp.read(tmp_path, "bio", retain).retain for retain in ("wikitext", "corpus"))
    assert [text.strip() for text in wikitext] == corpus
    assert not set(corpus) & set(wmdp.read(tmp_path, "bio").forget)


# Questions.


def test_the_prompt():
    question = Question(" Which? ", ["w", "x", "y", "z"], 2)
    expected = (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert prompt(question, "biology") == expected
    about_algebra = prompt(question._replace(subject="abstract_algebra"), "biology")
    assert about_algebra == expected.replace("biology", "abstract algebra")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_of_several_tokens(model, tokenizer, batch_size):
    prompts, continuations = ["Where?", "A longer prompt, so that rows are padded:"], [" A", " B", " else"]
    found = log_likelihoods(model, tokenizer, prompts, continuations, batch_size)
    expected = [[likelihood_by_hand(model, tokenizer, p, c) for c in continuations] for p in prompts]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=THROUGH, atol=THROUGH)


def test_a_prompt_that_is_too_long_loses_its_beginning(model, tokenizer):
    model.config.max_position_embeddings = 20
    text = "".join(map(str, range(40)))
    found = log_likelihoods(model, tokenizer, [text], [" A"])
    ids = tokenizer.encode(text + " A")[-21:]
    scores = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    assert found.item() == pytest.approx((scores[-2, ids[-2]] + scores[-1, ids[-1]]).item(), rel=THROUGH)


class Rigged(torch.nn.Module):
    """Likes one letter as an answer, best of all if the question asks for it by name."""

    def __init__(self, tokenizer, likes):
        super().__init__()
        self.likes = tokenizer.encode(likes)[-1]
        self.space = tokenizer.encode(" ")[-1]
        self.config = random_model().config
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 258)
        logits[..., self.likes] = 1.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("likes", "expected"), [("A", 0.5), ("C", 0.25), ("Z", 0.5)])
def test_accuracy_of_a_model_with_one_answer(tokenizer, likes, expected):
    """The first letter where all are equal."""
    asked = [Question("q", list("wxyz"), answer) for answer in (0, 0, 2, 3)]
    assert accuracy(Rigged(tokenizer, likes), tokenizer, asked, "biology") == expected


def test_accuracy_is_of_the_likeliest_letter(model, tokenizer):
    asked = [Question(f"Question {i}?", list("wxyz"), i % 4) for i in range(6)]
    right = 0
    for question in asked:
        scores = [likelihood_by_hand(model, tokenizer, prompt(question, "x"), f" {c}") for c in LETTERS]
        right += scores.index(max(scores)) == question.answer
    assert accuracy(model, tokenizer, asked, "x", batch_size=4) == right / 6


# Texts, losses and the loop.


def test_the_tokenizer_gives_texts_back(tokenizer):
    text = "Größe 10 µm\n\tand more"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_batches(tokenizer):
    batch = batch_of(["abcdef", "ab"], tokenizer, 5, "cpu")
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        batch["input_ids"][0].tolist(),
        [*batch["input_ids"][1, :3].tolist(), -100, -100],
    ]
    batches = batches_of(["a", "b", "c"], tokenizer, 4, 2, 9, "cpu", seed=1)
    seen = [tuple(row[1:2]) for batch in batches for row in batch["input_ids"].tolist()]
    assert len(batches) == 4
    assert set(seen[:3]) == set(seen[3:6]) == {tuple(tokenizer.encode(c)[1:]) for c in "abc"}


@pytest.fixture
def sides(tokenizer):
    return batch_of(["to forget", "this too"], tokenizer, 16, "cpu"), batch_of(
        ["to keep"], tokenizer, 16, "cpu"
    )


def both(losses, model, frozen, sides):
    return losses.forget_loss(model, frozen, sides[0]), losses.retain_loss(model, frozen, sides[1])


def test_grad_diff_is_the_loss_of_transformers(model, sides):
    forget, retain = both(OfAnswers("GradDiff"), model, None, sides)
    assert forget.item() == pytest.approx(-model(**sides[0]).loss.item(), rel=THROUGH)
    assert retain.item() == pytest.approx(model(**sides[1]).loss.item(), rel=THROUGH)


def test_npo_starts_at_its_constant_and_as_gradient_ascent(model, sides):
    forget = OfAnswers("NPO").forget_loss(model, model, sides[0])
    assert forget.item() == pytest.approx(2 / 0.1 * math.log(2), rel=rounding_error(16, torch.float32))
    (gradient,) = torch.autograd.grad(forget, [model.lm_head.weight])
    ascent = -token_nll(model, sides[0]) * (sides[0]["labels"][:, 1:] != -100).sum() / 2
    (expected,) = torch.autograd.grad(ascent, [model.lm_head.weight])
    assert_near([gradient], [expected], THROUGH)


def test_rmu(model, sides):
    losses = RMU(layer=2, steering=3.0)
    forget, retain = both(losses, model, model, sides)
    assert retain.item() == 0.0
    states = model.model(**{k: v for k, v in sides[0].items() if k != "labels"}, output_hidden_states=True)
    found = states.hidden_states[3][sides[0]["attention_mask"].bool()]
    control = torch.rand(32, generator=torch.Generator().manual_seed(0))
    control *= 3.0 / control.norm()
    assert forget.item() == pytest.approx(((found - control) ** 2).mean().item(), rel=THROUGH)
    layers = model.model.layers
    assert [id(p) for p in losses.params(model)] == [id(layers[i].mlp.down_proj.weight) for i in range(3)]
    with pytest.raises(ValueError, match="`layer` should lie below 4"):
        RMU(layer=9).params(model)


@pytest.mark.parametrize("losses", [*map(OfAnswers, FORGET), RMU(layer=2)], ids=[*FORGET, "RMU"])
def test_the_loop_forgets(model, sides, losses, monkeypatch):
    # A random model has forgotten everything by the measure of SimNPO's usual beta.
    monkeypatch.setitem(FORGET, "SimNPO", partial(simnpo, beta=0.1))
    before = token_nll(model, sides[0]).item()
    start = {name: p.clone() for name, p in model.named_parameters()}
    frozen = random_model()
    first = losses.forget_loss(model, frozen, sides[0])
    assert len(list(unlearn(model, losses, [sides] * 8, "sum", 1e-3, gamma=4.0))) == 8
    last = losses.forget_loss(model, frozen, sides[0])
    assert last < first
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    if isinstance(losses, RMU):
        assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    else:
        assert len(moved) == len(start)
        assert token_nll(model, sides[0]).item() > before


def test_the_loop_is_a_step_of_the_reference(model, sides):
    """AdamW's first step is a step of lr in the direction of the sign, where weight decay is small."""
    params = list(model.parameters())
    losses = OfAnswers("GradDiff")
    gradients = [torch.autograd.grad(loss, params) for loss in both(losses, model, None, sides)]
    for rule in ("sago", "pcgrad"):
        copy = random_model()
        (seen,) = unlearn(copy, losses, [sides], rule, 1e-3, gamma=0.5, alpha=2.0)
        updates, expected = sago.reference.synthesize(*gradients, rule, 0.5, 2.0)
        for p, q, u in zip(copy.parameters(), params, updates, strict=True):
            large = u.abs() > 1e-4
            assert large.any()
            # AdamW's epsilon is 1e-4 of `large`, and the rounding of weights of 1 is 6e-5 of a step.
            torch.testing.assert_close((q * (1 - 1e-5) - p)[large], 1e-3 * u.sign()[large], rtol=0.01, atol=0)
        for name, value in expected.summary().items():
            assert seen[name] == pytest.approx(value, rel=THROUGH), name


# The command.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_command_runs_offline(capsys, objective):
    arguments = ["--random", "--steps=2", "--batch-size=2", "--longest=48", "--questions=2", "--rule", "sago"]
    arguments.append("--lr=0.01")
    assert wmdp.main([*arguments, f"--objective={objective}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("WMDP-bio: 8 forget texts, 7 retain texts, 1 held out, 8 questions")
    header, before, sago = (line.split() for line in printed[-3:])
    assert header == ["rule", "wmdp", "mmlu", "retain_nll", "cos_forget_retain", "cos_update_retain"]
    assert (before[0], sago[0]) == ("before", "sago")
    assert before[3] != sago[3]
    assert float(sago[5]) >= 0


def test_the_command_on_a_folder_of_a_model_and_of_files(tmp_path, capsys, tokenizer):
    data, folder, saved = (tmp_path / name for name in ("data", "model", "saved"))
    data.mkdir()
    wmdp.write_sample(data, seed=3)
    random_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = [
        str(data),
        f"--model={folder}",
        "--domain=cyber",
        "--retain=corpus",
        "--steps=1",
        "--longest=32",
    ]
    assert (
        wmdp.main([*arguments, "--questions=1", "--rule", "pcgrad", f"--save={saved}", "--device=cpu"]) == 0
    )
    assert capsys.readouterr().out.startswith("WMDP-cyber: 8 forget texts")
    assert (saved / "pcgrad" / "config.json").is_file()
    assert (
        wmdp.main([str(data), f"--model={saved / 'pcgrad'}", "--steps=0", "--questions=1", "--rule", "sum"])
        == 0
    )


def test_the_command_says_what_is_missing(tmp_path, capsys):
    for arguments in ([], [str(tmp_path)], ["--random", f"--model={tmp_path}"]):
        with pytest.raises(SystemExit):
            wmdp.main(arguments)
    assert "one of the arguments --model --smollm2 --random is required" in capsys.readouterr().err
    wmdp.write_sample(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        wmdp.main([str(tmp_path), f"--model={tmp_path / 'nowhere'}"])
