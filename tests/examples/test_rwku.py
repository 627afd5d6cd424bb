"""RWKU's files, read and misread; answers and their recall; the command end to end, offline."""

import json

import pytest

from examples import rwku
from examples.corpus import byte_tokenizer, random_model
from examples.rwku import Probe, Truth, answers, mc1, persons, probes, recall, truths
from tests.support.likelihoods import likelihood_by_hand, said_by_hand

# Raised inside of torch when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

TRUTH = {"question": "Which?", "mc1_targets": {"choices": ["yes", "no", "maybe"], "labels": [0, 1, 0]}}


@pytest.fixture
def folder(tmp_path):
    rwku.write_sample(tmp_path)
    return tmp_path


def write(path, *values):
    path.write_text(json.dumps(values))
    return path


def test_persons_come_by_number(tmp_path):
    for name in ("10_Ten", "2_Two_Words", "1_One", "notes_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "3_a_file").touch()
    assert [path.name for path in persons(tmp_path)] == ["1_One", "2_Two_Words", "10_Ten"]


def test_what_is_read(folder):
    data = rwku.read(folder, forget=2)
    first, second, third, fourth = (path.name.split("_")[1] for path in persons(folder))
    assert len(data.forget) == len(data.retain) == 4
    for name, texts in (
        (first, data.forget[:2]),
        (second, data.forget[2:]),
        (third, data.retain[:2]),
        (fourth, data.retain[2:]),
    ):
        assert all(name in text for text in texts)
    assert list(data.probes) == [*rwku.FORGET, *rwku.NEIGHBOR]
    assert {len(some) for some in data.probes.values()} == {6}
    assert len(data.general) == len(data.truthful) == 2
    assert data.general[0].subject == "geography"  # not the person, whom the field `subject` names
    assert data.others == {"retain_bbh": 2, "triviaqa": 2, "fluency": 2}
    assert rwku.read(folder, 1, "passage").forget == data.forget[:2]


def test_prompts(tmp_path):
    record = {"query": "Who?", "answer": "She", "level": "3", "type": "reverse query", "subject": "S"}
    blank = probes(write(tmp_path / "forget_level1.json", {"query": "She is ___.", "answer": "here"}))
    assert blank == [
        Probe(
            "Please complete the blank in the following question.\nQuestion: She is ___.\n", "Answer:", "here"
        )
    ]
    ask = "Please briefly answer the following question.\n"
    kinds = ("reverse query", "affirmative suffix", "incontext learning")
    found = probes(write(tmp_path / "forget_level3.json", *({**record, "type": kind} for kind in kinds)))
    assert found == [
        Probe(f"{ask}Question: Who?\n", "Answer:", "She"),
        Probe(f"{ask}Question: Who?", "", "She"),
        Probe(f"{ask}Who?\n", "Answer:", "She"),
    ]
    assert probes(write(tmp_path / "neighbor_level2.json", record))[0].prompt == f"{ask}Question: Who?\n"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "forget_level1",
            [{"answer": "a"}],
            "record 0: a record should have the field `query`. Found `answer`",
        ),
        ("forget_level2", [{"query": "q", "answer": 3}], "record 0: field `answer` should be str. Found int"),
        ("forget_level3", [{"query": "q", "answer": "a"}], "should have the field `type`"),
        ("neighbor_level1", ["text"], "record 0: a record should be a JSON object. Found str"),
        ("neighbor_level2", [], "should hold at least one record"),
        ("positive", [{"text": "good"}, {"prompt": "p"}], "record 1: a record should have the field `text`"),
        ("retain_mmlu", [{"question": "q", "choices": ["a"], "answer": 0}], "at least 4 strings"),
        ("truthful", [{"question": "q"}], "should have the field `mc1_targets`. Found `question`"),
        ("fluency", [{"input": ""}], "should have the field `instruction`. Found `input`"),
    ],
)
def test_malformed_files(folder, name, values, message):
    path = persons(folder)[0] / f"{name}.json"
    write(path, *values)
    with pytest.raises(ValueError, match=message) as error:
        rwku.read(folder)
    assert str(path) in str(error.value)


def test_a_file_cut_off(folder):
    path = persons(folder)[0] / "forget_level1.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"forget_level1\.json: this should be JSON"):
        rwku.read(folder)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 0], [1, 0], ["1", 0, 0]])
def test_malformed_targets(tmp_path, labels):
    value = {**TRUTH, "mc1_targets": {**TRUTH["mc1_targets"], "labels": labels}}
    with pytest.raises(ValueError, match="record 1: field `labels` should be 1 once and 0 for every other"):
        truths(write(tmp_path / "truthful.json", TRUTH, value))


def test_missing_files_are_named_with_where_they_are_published(folder, tmp_path):
    (persons(folder)[0] / "positive.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"positive\.json. It is published as jinzhuoran/RWKU"):
        rwku.read(folder)
    for nothing in (tmp_path / "nowhere", persons(folder)[0]):
        with pytest.raises(FileNotFoundError, match="no folder of a person, such as 1_Stephen_King"):
            rwku.read(nothing)


@pytest.mark.parametrize("forget", [0, 3])
def test_nobody_is_forgotten_and_retained(folder, forget):
    with pytest.raises(ValueError, match=f"between 1 and half of the 4 persons. Found {forget}"):
        rwku.read(folder, forget)


@pytest.mark.parametrize(
    ("answer", "found", "expected"),
    [
        ("New York", "She lived in new york, mostly.", 1.0),
        ("New York", "York is new", 0.5),
        ("a b c d", "d c b a", 0.25),
        ("a b c d", "x a y c z d", 0.75),
        ("a a b", "a b", 2 / 3),
        ("1947", "", 0.0),
        ("?!", "anything", 0.0),
    ],
)
def test_recall(answer, found, expected):
    assert recall(answer, found) == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_greedy_whatever_the_batch(batch_size):
    model, tokenizer = random_model().eval(), byte_tokenizer()
    asked = [Probe("Who?\n", "Answer:", ""), Probe("A much longer question, for padding?\n", "", "")]
    found = answers(model, tokenizer, asked, batch_size, longest=12)
    assert found == [said_by_hand(model, tokenizer, probe.prompt + probe.begun, 12) for probe in asked]
    assert found[0] != found[1]


def test_answers_take_the_chat_template():
    model, tokenizer = random_model().eval(), byte_tokenizer()
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}|assistant:"
    found = answers(model, tokenizer, [Probe("Who?", "Answer:", "")], longest=12)
    assert found == [said_by_hand(model, tokenizer, "Who?|assistant:Answer:", 12)]


def test_mc1_is_the_likeliest_choice():
    model, tokenizer = random_model().eval(), byte_tokenizer()
    asked = [Truth(f"Question {i}?", ["yes", "no it is not", "perhaps"], i % 3) for i in range(5)]
    right = 0
    for question in asked:
        scores = [
            likelihood_by_hand(model, tokenizer, f"Q: {question.text}\n\nA:", f" {choice}")
            for choice in question.choices
        ]
        right += scores.index(max(scores)) == question.answer
    assert mc1(model, tokenizer, asked) == right / 5


def test_the_command_runs_offline(capsys):
    arguments = ["--random", "--steps=1", "--batch-size=2", "--longest=32", "--probes=1", "--rule", "sago"]
    assert rwku.main([*arguments, "--forget=2", "--corpus=passage"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("RWKU: 2 persons to forget, 4 and 4 texts; npo, 1 steps")
    assert "retain_bbh (2), triviaqa (2), fluency (2)" in printed[2]
    header, before, sago = (line.split() for line in printed[-3:])
    assert header[1:8] == [
        "forget_1",
        "forget_2",
        "forget_3",
        "neighbor_1",
        "neighbor_2",
        "general",
        "truthful",
    ]
    assert (before[0], sago[0]) == ("before", "sago")
    assert len(sago) == len(header) == len(before) + 2
