"""The table's numbers, from a record that is made up."""

import math

import pytest

from examples.recovery import CHOICE, LEVELS, abilities, ability, at_level, entries, mean_recovery


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


def a_record(*runs, trials=(), rules=("sum", "sago"), rates=(1e-3, 2e-3)):
    grid = {"objectives": ["GradDiff"], "rules": list(rules), "rates": list(rates)}
    return {"grid": grid, "trials": list(trials), "runs": list(runs)}


def test_between_two_measurements():
    run = a_run("sum", 1e-3, [1.0, 0.6, 0.1, 0.0], [0.8, 0.8, 0.4, 0.1], [1.0, 0.9, 0.5, 0.9])
    seen = at_level(run, 0.2)
    # Four fifths of the way from 0.6 to 0.1; abilities relative to the start; 4 s a step, the median.
    assert (seen.step, seen.seconds) == pytest.approx((18, 72))
    assert seen.recovery == pytest.approx({"general": 0.48 / 0.8, "retain": 0.58})
    assert mean_recovery(seen) == pytest.approx((0.6 + 0.58) / 2)


def test_at_a_measurement():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.1], [0.8, 0.4, 0.2], [1.0, 0.5, 0.1])
    seen = at_level(run, 0.2)
    assert seen.step == pytest.approx(10)
    assert seen.recovery == pytest.approx({"general": 0.5, "retain": 0.5})


def test_the_first_time_counts():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.9, 0.2], [1.0, 0.5, 0.9, 0.9], [1.0] * 4)
    assert at_level(run, 0.2).recovery["general"] == 0.5


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


def test_means_and_deviations():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.9], seed=1),
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.7], [1.0, 0.9], seed=2),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.8], seed=1),
        a_run("sago", 1e-3, [1.0, 0.3], [1.0, 0.9], [1.0, 0.8], seed=2),
        rates=(1e-3,),
    )
    plain, sago = entries(record, 0.2)
    assert (plain.rule, plain.seeds, sago.rule, sago.seeds) == ("sum", 2, "sago", 1)
    assert plain.recovery["general"] == pytest.approx((0.6, 0.02**0.5))
    assert sago.recovery["general"] == pytest.approx((0.9, 0.0))


def test_the_rate_is_chosen_by_the_trials_and_not_by_the_results():
    """All seeds reach the level with two rates. The rate that kept more on the trial seed is chosen."""
    results = [
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.9]),
        a_run("sum", 2e-3, [1.0, 0.2], [1.0, 0.3], [1.0, 0.3]),
    ]
    trials = [
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.5], seed=0),
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 1.0], [1.0, 1.0], seed=0, gamma=3.0),  # not the chosen weight
        a_run("sum", 2e-3, [1.0, 0.2], [1.0, 0.6], [1.0, 0.6], seed=0),
    ]
    (entry,) = entries(a_record(*results, trials=trials, rules=("sum",)), 0.2)
    assert (entry.rate, entry.recovery["general"][0]) == (2e-3, pytest.approx(0.3))


def test_a_rate_with_which_more_seeds_get_there_comes_first():
    results = [
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.9], seed=1),
        a_run("sum", 1e-3, [1.0, 0.9], [1.0, 0.9], [1.0, 0.9], seed=2),
        a_run("sum", 2e-3, [1.0, 0.2], [1.0, 0.3], [1.0, 0.3], seed=1),
        a_run("sum", 2e-3, [1.0, 0.1], [1.0, 0.3], [1.0, 0.3], seed=2),
    ]
    (entry,) = entries(a_record(*results, rules=("sum",)), 0.2)
    assert (entry.rate, entry.seeds) == (2e-3, 2)


def test_a_rule_that_gets_nowhere_is_in_the_table():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.5]),
        a_run("sago", 1e-3, [1.0, 0.9], [1.0, 1.0], [1.0, 1.0]),
        rates=(1e-3,),
    )
    assert [(e.rule, e.seeds, e.recovery) for e in entries(record, 0.2)][1] == ("sago", 0, {})


def test_levels_go_down():
    assert sorted(LEVELS, reverse=True) == list(LEVELS)
    assert CHOICE in LEVELS
