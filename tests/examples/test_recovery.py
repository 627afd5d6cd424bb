"""The table's numbers, from a record that is made up."""

import pytest

from examples.recovery import LEVELS, at_level, entries


def a_run(rule, rate, forget, general, retain, objective="GradDiff", seed=0):
    known = {
        "forget": {"probability": forget},
        "general": {"answers": general},
        "retain": {"answers": retain},
    }
    return {"objective": objective, "rule": rule, "rate": rate, "seed": seed, "known": known}


def a_record(*runs, rules=("sum", "sago"), rates=(1e-3, 2e-3)):
    setup = {"objectives": ["GradDiff"], "rules": list(rules), "rates": list(rates), "every": 10}
    return {"setup": setup, "runs": list(runs)}


def test_between_two_measurements():
    run = a_run("sum", 1e-3, [1.0, 0.6, 0.1, 0.0], [0.8, 0.8, 0.4, 0.1], [1.0, 0.9, 0.5, 0.9])
    seen = at_level(run, 0.2, every=10)
    # Four fifths of the way from 0.6 to 0.1; abilities relative to the start.
    assert seen == pytest.approx({"step": 18, "general": 0.48 / 0.8, "retain": 0.58})


def test_at_a_measurement():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.1], [0.8, 0.4, 0.2], [1.0, 0.5, 0.1])
    assert at_level(run, 0.2, every=5) == pytest.approx({"step": 5, "general": 0.5, "retain": 0.5})


def test_the_first_time_counts():
    run = a_run("sum", 1e-3, [1.0, 0.2, 0.9, 0.2], [1.0, 0.5, 0.9, 0.9], [1.0] * 4)
    assert at_level(run, 0.2, every=1)["general"] == 0.5


def test_a_level_that_is_never_reached():
    assert at_level(a_run("sum", 1e-3, [1.0, 0.21], [1.0, 1.0], [1.0, 1.0]), 0.2, every=1) is None


def test_what_was_never_known_is_not_forgotten():
    assert at_level(a_run("sum", 1e-3, [0.1, 0.0], [1.0, 1.0], [1.0, 1.0]), 0.2, every=1) is None


def test_means_deviations_and_what_is_regained():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.9], seed=0),
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.7], [1.0, 0.9], seed=1),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.8], seed=0),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.8], seed=1),
    )
    plain, sago = entries(record, 0.2)
    assert (plain.rule, plain.seeds, plain.regained) == ("sum", 2, {})
    assert plain.recovery["general"] == pytest.approx((0.6, 0.02**0.5))
    assert sago.recovery["general"] == pytest.approx((0.9, 0.0))
    # sum loses 40 % of general and 10 % of retain, sago 10 % and 20 %.
    assert sago.regained == pytest.approx({"general": 0.75, "retain": -1.0})


def test_a_loss_of_next_to_nothing_has_no_shares():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.985], [1.0, 0.5]),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 0.995], [1.0, 0.75]),
    )
    assert entries(record, 0.2)[1].regained == {"retain": 0.5}


def test_the_rate_is_chosen_by_forgetting_alone():
    """The smallest that gets there with most seeds, though another keeps more."""
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.3], [1.0, 0.3]),
        a_run("sum", 2e-3, [1.0, 0.2], [1.0, 0.9], [1.0, 0.9]),
        a_run("sago", 1e-3, [1.0, 0.2], [1.0, 1.0], [1.0, 1.0], seed=0),
        a_run("sago", 1e-3, [1.0, 0.3], [1.0, 1.0], [1.0, 1.0], seed=1),
        a_run("sago", 2e-3, [1.0, 0.2], [1.0, 0.8], [1.0, 0.6], seed=0),
        a_run("sago", 2e-3, [1.0, 0.1], [1.0, 0.6], [1.0, 0.6], seed=1),
    )
    plain, sago = entries(record, 0.2)
    assert (plain.rate, plain.recovery["general"][0]) == (1e-3, pytest.approx(0.3))
    assert (sago.rate, sago.seeds) == (2e-3, 2)


def test_a_rule_that_gets_nowhere_is_in_the_table():
    record = a_record(
        a_run("sum", 1e-3, [1.0, 0.2], [1.0, 0.5], [1.0, 0.5]),
        a_run("sago", 1e-3, [1.0, 0.9], [1.0, 1.0], [1.0, 1.0]),
    )
    assert [(e.rule, e.seeds, e.recovery, e.regained) for e in entries(record, 0.2)][1] == ("sago", 0, {}, {})


def test_without_the_sum_nothing_is_regained():
    record = a_record(a_run("sago", 1e-3, [1.0, 0.1], [1.0, 0.5], [1.0, 0.5]), rules=("sago",))
    (entry,) = entries(record, 0.2)
    assert entry.regained == {}


def test_levels_go_down():
    assert sorted(LEVELS, reverse=True) == list(LEVELS)
