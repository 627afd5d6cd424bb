import re

from examples.worlds.islands import general_facts
from examples.worlds.people import facts_of, make_people


def test_facts_depend_on_the_seed_only():
    assert general_facts(seed=3) == general_facts(seed=3)
    assert general_facts(seed=3) != general_facts(seed=4)


def test_three_facts_an_island_and_all_sums():
    facts = general_facts(islands=7, digits=4)
    assert len(facts) == 3 * 7 + 4 * 4
    assert len({fact.prompt for fact in facts}) == len(facts)


def test_sums_are_right():
    sums = [re.fullmatch(r" (\d) plus (\d) is (\d+)\.", fact.answer) for fact in general_facts(0)]
    assert len(sums) == 81
    assert all(int(m[1]) + int(m[2]) == int(m[3]) for m in sums)


def test_nothing_general_is_about_people():
    names = {word for person in make_people(60) for word in person.name.split()}
    for fact in general_facts():
        assert not names & set(re.findall(r"\w+", fact.prompt + fact.answer))
    assert not {f.prompt for f in general_facts()} & {f.prompt for f in facts_of(make_people(60))}
