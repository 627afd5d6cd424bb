"""Facts as examples, and what a model knows, against numbers that are worked out by hand."""

import pytest
import torch

from examples.corpus import byte_tokenizer, random_model
from examples.objectives import IGNORE_INDEX
from examples.worlds.facts import KNOWLEDGE, Collator, Fact, batches_of, chosen, encode, knowledge
from examples.worlds.people import END, build_tokenizer, facts_of, make_people
from tests.support.likelihoods import likelihood_by_hand

pytestmark = pytest.mark.usefixtures("one_thread")


def test_labels_are_the_answer_and_nothing_else():
    facts = facts_of(make_people(20, seed=0))
    tokenizer = build_tokenizer(facts, vocab_size=512)
    for fact in facts:
        example = encode(fact, tokenizer, END)
        ids, labels = example["input_ids"], example["labels"]
        start = len(ids) - sum(label != IGNORE_INDEX for label in labels)
        assert labels == [IGNORE_INDEX] * start + ids[start:]
        assert tokenizer.decode(ids[1:start]) == fact.prompt
        assert tokenizer.decode(ids[start:-1]) == fact.answer
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_padding_is_masked():
    examples = [
        {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]},
        {"input_ids": [1, 7], "labels": [-100, 7]},
    ]
    batch = Collator(pad_token_id=9)(examples)
    expected = {
        "input_ids": [[1, 5, 6, 2], [1, 7, 9, 9]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 6, 2], [-100, 7, -100, -100]],
    }
    assert batch.keys() == expected.keys()
    for name, rows in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == rows


def test_knowledge_by_hand(monkeypatch):
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    monkeypatch.setattr(
        "examples.worlds.facts.logits_of", lambda model, batch: logits.expand(*batch["input_ids"].shape, -1)
    )
    model = random_model()
    examples = [
        {"input_ids": [1, 0, 0], "labels": [-100, 0, 0]},  # 1/2 * 1/2, both first: right
        {"input_ids": [1, 0, 2, 1], "labels": [-100, 0, 2, 1]},  # 1/2 * 1/4 * 1/4, one of three right
        {"input_ids": [1, 1], "labels": [-100, 1]},  # 1/4
    ]
    found = knowledge(model, examples, Collator(7), batch_size=2)
    assert found == pytest.approx(
        {
            "loss": (2 * 1 + (1 + 2 + 2) + 2) * 0.6931471806 / 6,
            "probability": (1 / 2 + 2 ** (-5 / 3) + 1 / 4) / 3,
            "tokens": 3 / 6,
            "answers": 1 / 3,
        }
    )
    assert tuple(found) == KNOWLEDGE


def test_the_choice_is_the_answer_with_the_largest_mean_likelihood():
    """The answers have different lengths, and the right one comes first in every fact."""
    model, tokenizer = random_model().eval(), byte_tokenizer()
    facts = [
        Fact(f"Prompt {i}:", f" {'abcdefgh'[i] * (1 + i % 3)}", (" xy", " z", " wwww")) for i in range(8)
    ]
    expected = []
    for fact in facts:
        means = [
            likelihood_by_hand(model, tokenizer, fact.prompt, text) / len(text)
            for text in (fact.answer, *fact.wrong)
        ]
        expected.append(means[0] == max(means))
    assert chosen(model, facts, tokenizer, Collator(0)).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_a_tie_is_a_wrong_choice():
    facts = [Fact("Prompt:", " a", (" a", " b", " c"))]
    assert chosen(random_model().eval(), facts, byte_tokenizer(), Collator(0)).tolist() == [False]


def test_every_fact_comes_once_a_pass():
    examples = [{"input_ids": [i], "labels": [i]} for i in range(6)]

    def collator(chosen):
        return [example["input_ids"][0] for example in chosen]

    def drawn(seed):
        return list(batches_of(examples, collator, 4, 6, torch.Generator().manual_seed(seed)))

    batches = drawn(0)
    flat = [i for batch in batches for i in batch]
    assert [len(batch) for batch in batches] == [4] * 6
    assert all(sorted(flat[i : i + 6]) == list(range(6)) for i in (0, 6, 12, 18))
    assert batches == drawn(0) != drawn(1)
