"""A small Llama learns facts by heart, and knows them by the measures of `knowledge`."""

import pytest
import torch

from examples.worlds.facts import Collator, encode, knowledge
from examples.worlds.learn import make_model, train
from examples.worlds.people import END, build_tokenizer, facts_of, make_people

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def learned(one_thread):
    facts = facts_of(make_people(4))
    tokenizer = build_tokenizer(facts, 400)
    examples = [encode(fact, tokenizer, END) for fact in facts]
    torch.manual_seed(0)
    model = make_model(len(tokenizer), hidden=64, layers=1)
    untrained = knowledge(model, examples, Collator(tokenizer.pad_token_id))
    steps = train(
        model, examples, Collator(tokenizer.pad_token_id), steps=300, batch_size=16, lr=1e-2, quiet=True
    )
    return model, examples, tokenizer, untrained, steps


def test_facts_are_learned_by_heart(learned):
    model, examples, tokenizer, untrained, steps = learned
    known = knowledge(model, examples, Collator(tokenizer.pad_token_id))
    assert untrained["answers"] == 0
    assert untrained["loss"] > 4
    assert known["answers"] >= 0.8
    assert known["tokens"] >= 0.97
    assert known["probability"] >= 0.9
    assert known["loss"] < 0.1
    assert 10 < steps < 300  # stopped because it knew


def test_answers_right_are_those_of_greedy_decoding(learned):
    model, examples, tokenizer, *_ = learned
    few = examples[:6]
    right = 0
    for example in few:
        length = sum(label == -100 for label in example["labels"])
        prompt = torch.tensor([example["input_ids"][:length]])
        with torch.no_grad():
            for _ in example["labels"][length:]:
                prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
        right += prompt[0].tolist() == example["input_ids"]
    assert knowledge(model, few, Collator(tokenizer.pad_token_id))["answers"] == right / len(few)


def test_training_depends_on_the_seed_only():
    facts = facts_of(make_people(2))
    tokenizer = build_tokenizer(facts, 300)
    examples = [encode(fact, tokenizer, END) for fact in facts]

    def trained(seed):
        torch.manual_seed(0)
        model = make_model(len(tokenizer), hidden=32, layers=1)
        assert train(model, examples, Collator(0), steps=3, batch_size=4, seed=seed, quiet=True) == 3
        return model.model.embed_tokens.weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
