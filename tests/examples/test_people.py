import pytest

from examples.worlds.people import (
    build_tokenizer,
    facts_of,
    make_people,
    questions_about,
    split_people,
)


@pytest.fixture(scope="module")
def facts():
    return facts_of(make_people(20, seed=0))


@pytest.fixture(scope="module")
def tokenizer(facts):
    return build_tokenizer(facts, vocab_size=512)


def test_people_depend_on_the_seed_only():
    assert make_people(50, seed=3) == make_people(50, seed=3)
    assert make_people(50, seed=3) != make_people(50, seed=4)
    # A longer list starts with the shorter one, so that a size option does not change who is who.
    assert make_people(50, seed=3)[:20] == make_people(20, seed=3)


def test_names_are_different():
    people = make_people(500)
    assert len({person.name for person in people}) == 500


def test_answers_hold_the_facts():
    (person,) = make_people(1, seed=7)
    answers = " ".join(answer for _, answer in questions_about(person))
    for value in vars(person).values():
        assert str(value) in answers


def test_questions_are_different_and_name_the_person():
    people = make_people(100)
    facts = facts_of(people)
    assert len({fact.prompt for fact in facts}) == len(facts)
    for person in people:
        assert all(person.name in question for question, _ in questions_about(person))


def test_a_question_does_not_give_its_answer_away():
    for person in make_people(100):
        for question, answer in questions_about(person):
            told = answer.replace(person.name, "").rstrip(".").split(" ")[-1]
            assert told not in question.split(" ")


@pytest.mark.parametrize(("count", "forget_count"), [(2, 1), (10, 1), (60, 6), (100, 10)])
def test_forget10_is_a_tenth_of_the_people(count, forget_count):
    people = make_people(count)
    forget, retain = split_people(people)
    assert len(forget) == forget_count
    assert retain + forget == people


def test_splits_share_no_person_and_no_fact():
    forget, retain = split_people(make_people(100))
    assert not set(forget) & set(retain)
    assert not set(facts_of(forget)) & set(facts_of(retain))


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (10, 0.0), (10, 1.0)])
def test_a_split_without_two_sides_is_refused(count, share):
    with pytest.raises(ValueError, match="Found"):
        split_people(make_people(count), share)


def test_tokenizer_is_deterministic(facts, tokenizer):
    assert build_tokenizer(facts, vocab_size=512).get_vocab() == tokenizer.get_vocab()


def test_vocabulary_size_is_bounded(facts, tokenizer):
    assert len(tokenizer) <= 512
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3


def test_tokens_round_trip(facts, tokenizer):
    for fact in facts:
        text = fact.prompt + fact.answer
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_text_that_was_not_in_the_corpus_round_trips(tokenizer):
    text = "Žluťoučký kůň, 42 ~ tabs\tand\nlines"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
