"""Plots of a made-up record: written, not empty, told apart without colour, and of the right numbers."""

import itertools

import numpy as np
import pytest
from matplotlib import colors, image

from examples.draw import FLOOR, STYLES, cosines, draw, front, pareto

RULES = ("sum", "pcgrad", "pcgrad_global", "sago")


def a_record():
    grid = {
        "objectives": ["GradDiff", "NPO"],
        "rules": RULES,
        "rates": [1e-3, 2e-3],
        "seeds": [1, 2],
    }
    runs = []
    for (i, objective), (j, rule), rate, seed in itertools.product(
        enumerate(grid["objectives"]), enumerate(RULES), grid["rates"], grid["seeds"]
    ):
        shift = 0.02 * (i + j + seed)
        right = {"answers": [1.0, 0.8 - shift, 0.6 - shift]}
        known = {
            "forget": {"probability": [1.0, 0.3 + shift, 1e-6]},
            "retain": right,
            "general": right,
            "text": {"loss": [3.0, 3.1, 3.2]},
        }
        # The second seed needs two steps less.
        values = [-0.5 + shift] * (4 if seed == 1 else 2)
        steps = {f"cos_{name}": values for name in ("forget_retain", "update_retain", "update_forget")}
        runs.append({"objective": objective, "rule": rule, "rate": rate, "known": known, "steps": steps})
    return {"grid": grid, "runs": runs}


def test_plots_are_written_and_hold_every_colour(tmp_path):
    paths = draw(a_record(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["pareto.png", "cosines.png"]
    for path in paths:
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 800
        for color, _, _ in STYLES.values():
            near = np.abs(pixels - colors.to_rgb(color)).max(-1) < 0.06
            assert near.sum() > 50


def test_rules_look_different_without_colour():
    for column in zip(*STYLES.values(), strict=True):
        assert len(set(column)) == len(STYLES)
    greys = sorted(np.dot(colors.to_rgb(color), (0.299, 0.587, 0.114)) for color, _, _ in STYLES.values())
    assert set(STYLES) == set(RULES)
    assert greys[0] < 0.1


def test_a_front_is_what_nothing_beats():
    points = [(0.9, 1.0), (0.5, 0.9), (0.4, 0.95), (0.1, 0.2), (0.2, 0.1), (0.1, 0.3)]
    assert front(points) == [(0.1, 0.3), (0.4, 0.95), (0.9, 1.0), (1.0, 1.0)]


def test_a_front_of_one_point():
    assert front([(0.5, 0.7)]) == [(0.5, 0.7), (1.0, 0.7)]


@pytest.mark.parametrize("figure", [pareto, cosines])
def test_axes_say_what_they_show(figure):
    figure = figure(a_record())
    bottom = [axes for axes in figure.axes if axes.get_xlabel()]
    left = [axes for axes in figure.axes if axes.get_ylabel()]
    assert len(bottom) == 2
    assert len(left) == len(figure.axes) / 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(RULES)


def test_lines_are_means_over_the_seeds_that_have_the_step():
    drawn = {line.get_label(): line.get_ydata() for line in cosines(a_record()).axes[0].get_lines()}
    assert drawn["sum"] == pytest.approx([-0.47, -0.47, -0.48, -0.48])
    assert drawn["sago"] == pytest.approx([-0.41, -0.41, -0.42, -0.42])


def test_what_is_all_but_forgotten_is_drawn_at_the_edge():
    panel = pareto(a_record()).axes[0]
    drawn = {line.get_label(): line for line in panel.get_lines()}
    assert min(drawn["sum"].get_xdata()) == FLOOR
    assert drawn["sum"].get_ydata()[0] == pytest.approx(58)  # the better of two seeds
