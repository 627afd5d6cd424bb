"""The table's numbers, from a record that is made up."""

import math

import pytest

from examples.recovery import CHOICE, LEVELS, abilities, ability, at_level, entries, mean_over


def a_run(rule, rate, forget, general, retain, seed=1, gamma=1.0):
    known = {
        "forget": {"probability": forget},
        "retain": {"answers": retain},
        "general": {"answers": general},
    }
    return {
        "objective": "GradDiff",
        "rule": rule,
        "rate": rate,
        "gamma": gamma,
        "seed": seed,
        "known": known,
        "measured": [10 * i for i in range(len(forget))],
        "seconds": [9.0, 2.0, 4.0],
    }


def a_record(*runs, trials=None, rules=("sum", "sago"), rates=(1e-3, 2e-3)):
    grid = {"objectives": ["GradDiff"], "rules": list(rules), "rates": list(rates)}
    return {"grid": grid, "trials": list(runs if trials is None else trials), "runs": list(runs)}


def test_the_values_are_those_of_a_measurement():
    """Between two measurements nothing is known: the model may have lost everything in one step."""
    run = a_run("sum", 1e-3, [1.0, 0.6, 0.1, 0.0], [0.8, 0.8, 0.4, 0.1], [1.0, 0.9, 0.5, 0.9])
    seen = at_level(run, 0.2)
    assert (seen.step, seen.seconds) == (20, 80)  # 4 s a step, the median
    assert seen.recovery == pytest.approx({"general": 0.5, "retain": 0.5})
    assert seen.mean == pytest.approx(0.5)


def test_at_a_measurement():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.1], [0.8, 0.4, 0.2], [1.0, 0.5, 0.1])
    seen = at_level(run, 0.2)
    assert seen.step == 10
    assert seen.recovery == pytest.approx({"general": 0.5, "retain": 0.5})


def test_what_is_learned_again_has_not_been_forgotten():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.9, 0.2, 0.1], [1.0, 0.5, 0.9, 0.8, 0.9], [1.0] * 5)
    assert at_level(run, 0.2).step == 30
    assert at_level(run, 0.2).recovery["general"] == 0.8
    assert at_level(a_run("sum", 1e-3, [1.0, 0.2, 0.9], [1.0] * 3, [1.0] * 3), 0.2) is None


def test_a_level_that_is_never_reached():
    assert at_level(a_run("sum", 1e-3, [1.0, 0.21], [1.0, 1.0], [1.0, 1.0]), 0.2) is None


def test_what_was_never_known_is_not_forgotten():
    assert at_level(a_run("sum", 1e-3, [0.1, 0.0], [1.0, 1.0], [1.0, 1.0]), 0.2) is None


def test_the_ability_on_text_is_the_inverse_perplexity():
    run = a_run("sum", 1e-3, [1.0, 0.2], [0.8, 0.4], [1.0, 1.0])
    run["known"]["text"] = {"loss": [3.0, 3.5]}
    assert abilities(run) == ["retain", "general", "text"]
    assert ability(run, "text") == pytest.approx([1.0, math.exp(3.0) / math.exp(3.5)])
    assert ability(run, "general") == pytest.approx([1.0, 0.5])
    assert at_level(run, 0.2).mean == pytest.approx(0.75)  # of general and retain


def test_a_mean_is_over_all_seeds_or_not_given():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.9], seed=1),
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.7], [1.0, 0.9], seed=2),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.8], seed=1),
        a_run("sago", 1e-3, [1.0, 0.3], [1.0, 0.9], [1.0, 0.8], seed=2),
        rates=(1e-3,),
    )
    plain, sago = entries(record, 0.2)
    assert (plain.rule, sago.rule) == ("sum", "sago")
    assert [seen.recovery["general"] for seen in plain.seeds] == [0.5, 0.7]
    assert mean_over(plain.seeds) == pytest.approx(0.75)
    assert sago.seeds[0].mean == pytest.approx(0.85)
    assert sago.seeds[1] is None
    assert mean_over(sago.seeds) is None


def test_the_trials_alone_choose_the_rate():
    """One seed of the results does not reach the level with the rate that kept more on the trial seed."""
    results = [
        a_run("sum", 1e-3, [1.0, 0.1], [1.0, 0.9], [1.0, 0.9], seed=1),
        a_run("sum", 1e-3, [1.0, 0.1], [1.0, 0.9], [1.0, 0.9], seed=2),
        a_run("sum", 2e-3, [1.0, 0.1], [1.0, 0.3], [1.0, 0.3], seed=1),
        a_run("sum", 2e-3, [1.0, 0.9], [1.0, 0.3], [1.0, 0.3], seed=2),
    ]
    trials = [
        a_run("sum", 1e-3, [1.0, 0.1], [1.0, 0.5], [1.0, 0.5], seed=0),
        a_run("sum", 1e-3, [1.0, 0.1], [1.0, 1.0], [1.0, 1.0], seed=0, gamma=3.0),  # not in the results
        a_run("sum", 2e-3, [1.0, 0.1], [1.0, 0.6], [1.0, 0.6], seed=0),
    ]
    (entry,) = entries(a_record(*results, trials=trials, rules=("sum",)), 0.1)
    assert (entry.rate, entry.gamma) == (2e-3, 1.0)
    assert [bool(seen) for seen in entry.seeds] == [True, False]


def test_the_choice_is_the_same_at_every_level():
    """With the first rate more is kept at 0.2, and with the second at the level of the choice."""
    runs = [
        a_run("sum", 1e-3, [1.0, 0.2, 0.0], [1.0, 0.9, 0.1], [1.0, 0.9, 0.1]),
        a_run("sum", 2e-3, [1.0, 0.2, 0.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.5]),
    ]
    record = a_record(*runs, rules=("sum",))
    assert {entry.rate for level in LEVELS for entry in entries(record, level)} == {2e-3}


def test_a_trial_that_does_not_reach_the_level_is_not_chosen():
    trials = [
        a_run("sum", 1e-3, [1.0, 0.1], [1.0, 0.2], [1.0, 0.2]),
        a_run("sum", 2e-3, [1.0, 0.2], [1.0, 1.0], [1.0, 1.0]),
    ]
    (entry,) = entries(a_record(*trials, rules=("sum",)), 0.2)
    assert entry.rate == 1e-3


def test_a_rule_that_gets_nowhere_is_in_the_table():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.5]),
        a_run("sago", 1e-3, [1.0, 0.9], [1.0, 1.0], [1.0, 1.0]),
        rates=(1e-3,),
    )
    assert [(entry.rule, entry.seeds) for entry in entries(record, 0.2)][1] == ("sago", [None])


def test_levels_go_down():
    assert sorted(LEVELS, reverse=True) == list(LEVELS)
    assert CHOICE in LEVELS
