"""The objectives against values that can be worked out by hand."""

import math

import pytest
import torch

from examples.objectives import FORGET, RETAIN, Answers, answers_of, grad_diff, kl, nll, npo, simnpo

# Two answers: of three tokens with probabilities 1/2, 1/4, 1/4, and of one token with probability 1/8.
LOG_2 = math.log(2)
# Where nothing is said, a loss is right to the 1e-6 of pytest: 16 roundings to fp32.
# Losses are right to the 1e-6 of `pytest.approx`: 16 roundings to fp32.
SUMS = [-5 * LOG_2, -3 * LOG_2]


def answers(sums, lengths=(3, 1), logits=None):
    sums = torch.tensor(sums, dtype=torch.float64)
    return Answers(sums, torch.tensor(lengths), logits, torch.zeros(0, dtype=torch.int64))


def unasked():
    raise AssertionError("this objective has no use for the model before unlearning")


def test_answers_are_read_from_the_labels():
    probabilities = torch.tensor(
        [
            # The logits of a position are about the token after it. 9: never read.
            [[0.9, 0.05, 0.05], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.9, 0.05, 0.05]],
            [[0.125, 0.125, 0.75], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05]],
        ]
    )
    labels = torch.tensor([[-100, -100, 0, 2], [-100, 1, -100, -100]])
    found = answers_of(probabilities.log(), labels)
    torch.testing.assert_close(found.log_likelihood, torch.tensor([-3 * LOG_2, -3 * LOG_2]))
    assert found.length.tolist() == [2, 1]
    assert found.tokens.tolist() == [0, 2, 1]
    torch.testing.assert_close(found.logits.softmax(-1), probabilities[[0, 0, 1], [1, 2, 0]])


def test_log_likelihoods_of_bf16_logits_are_fp32():
    labels = torch.tensor([[-100, 1]])
    assert (
        answers_of(torch.zeros(1, 2, 4, dtype=torch.bfloat16), labels).log_likelihood.dtype == torch.float32
    )
    assert answers_of(torch.zeros(1, 2, 4, dtype=torch.float64), labels).log_likelihood.dtype == torch.float64


def test_nll_is_the_mean_over_tokens_not_over_answers():
    assert nll(answers(SUMS), unasked).item() == pytest.approx(8 * LOG_2 / 4)


def test_grad_diff_is_gradient_ascent():
    assert grad_diff(answers(SUMS), unasked).item() == pytest.approx(-8 * LOG_2 / 4)


def test_npo_before_anything_was_forgotten():
    assert npo(answers(SUMS), lambda: answers(SUMS), beta=0.1).item() == pytest.approx(2 / 0.1 * LOG_2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_with_a_ratio(beta):
    # pi / pi_before = 1/4 and 2: 2/beta * mean(log(1 + ratio^beta)), the second form of the equation.
    before = answers([SUMS[0] + 2 * LOG_2, SUMS[1] - LOG_2])
    expected = 2 / beta * (math.log(1 + 0.25**beta) + math.log(1 + 2**beta)) / 2
    assert npo(answers(SUMS), lambda: before, beta).item() == pytest.approx(expected)


def test_the_gradient_of_npo_starts_as_ascent_and_vanishes():
    """d/d(log pi) = 2 * sigmoid(beta * log ratio) / batch: 1 / batch at the start, next to 0 once the answers
    are forgotten. This is what keeps NPO from collapse."""
    for gained, factor in ((0.0, 1.0), (-100.0, 2 / (1 + math.exp(10)))):
        sums = torch.tensor(SUMS, dtype=torch.float64, requires_grad=True)
        before = answers([value - gained for value in SUMS])
        npo(answers(SUMS)._replace(log_likelihood=sums), lambda before=before: before, beta=0.1).backward()
        torch.testing.assert_close(sums.grad, torch.full((2,), factor / 2, dtype=torch.float64))


@pytest.mark.parametrize(("beta", "delta"), [(2.5, 0.0), (1.0, 0.5)])
def test_simnpo_reads_likelihoods_a_token(beta, delta):
    # -2/beta * log sigmoid(-x) = 2/beta * log(1 + e^x), x = beta * log pi / |y| + delta
    x = [beta * SUMS[0] / 3 + delta, beta * SUMS[1] / 1 + delta]
    expected = 2 / beta * sum(math.log(1 + math.exp(value)) for value in x) / 2
    assert simnpo(answers(SUMS), unasked, beta, delta).item() == pytest.approx(expected)


def test_kl_of_two_known_distributions():
    # KL(1/2, 1/2 || 1/4, 3/4) = log 2 - log(3)/2; the second token has not changed.
    now = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log() + 3
    before = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    found = kl(answers(SUMS, logits=now), lambda: answers(SUMS, logits=before))
    assert found.item() == pytest.approx((LOG_2 - math.log(3) / 2) / 2, rel=1e-6)


@pytest.mark.parametrize("name", FORGET)
def test_forgetting_lowers_every_forget_objective(name):
    losses = [
        FORGET[name](answers([scale * value for value in SUMS]), lambda: answers(SUMS)).item()
        for scale in (1, 2, 10)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("name", RETAIN)
def test_retain_objectives_are_0_where_nothing_is_lost(name):
    sure = torch.tensor([[0.0, -1e9]])
    known = answers([0.0], (1,), logits=sure)
    assert RETAIN[name](known, lambda: known).item() == 0.0
