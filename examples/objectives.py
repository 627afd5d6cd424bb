"""The losses of unlearning, as minimised.

A forget objective takes the answers that are to be forgotten, a retain objective those that are to be
kept, each as the model gives them now. `before` is called by an objective that compares: it returns the same
answers as the model gave them before unlearning, without a gradient. Each returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

IGNORE_INDEX = -100  # labels that no loss counts


class Answers(NamedTuple):
    """A batch of answers y to questions x.

    `log_likelihood`: `log pi(y|x)` of each answer, `[batch]`. `length`: its tokens `|y|`, `[batch]`.
    `logits`, `tokens`: of all answers' tokens, `[tokens, vocab]` and `[tokens]`, one answer after the other.
    """

    log_likelihood: Tensor
    length: Tensor
    logits: Tensor
    tokens: Tensor


def answers_of(logits: Tensor, labels: Tensor) -> Answers:
    """From the logits `[batch, length, vocab]` of a causal model, and labels `[batch, length]` that are -100
    outside of the answers. Log-likelihoods are computed in fp32 at least."""
    labels = labels[:, 1:]
    told = labels != IGNORE_INDEX
    logits, tokens = logits[:, :-1][told], labels[told]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_pi = logits.new_zeros(labels.shape)
    log_pi[told] = -cross_entropy(logits, tokens, reduction="none")
    return Answers(log_pi.sum(1), told.sum(1), logits, tokens)


Before = Callable[[], Answers]
Objective = Callable[[Answers, Before], Tensor]


def nll(answers: Answers, before: Before) -> Tensor:
    """`-sum(log pi(y|x)) / sum(|y|)`: what the model was trained with.

    The retain half of GradDiff, called GD where it is added to another forget loss.
    """
    return -answers.log_likelihood.sum() / answers.length.sum()


def grad_diff(answers: Answers, before: Before) -> Tensor:
    """`-nll(answers)`: gradient ascent. Unbounded below.

    The forget half of GradDiff, `L(S_R, w) - L(S_F, w)` in arXiv 2401.06121 (TOFU), "Gradient Difference",
    after arXiv 2203.12817.
    """
    return -nll(answers, before)


def npo(answers: Answers, before: Before, beta: float = 0.1) -> Tensor:
    """`-2/beta * mean(log sigmoid(-beta * log(pi(y|x) / pi_before(y|x))))`.

    Negative preference optimization, arXiv 2404.05868, equation 3. Bounded below by 0; as beta goes to 0 its
    gradient becomes that of gradient ascent on whole answers.
    """
    gained = answers.log_likelihood - before().log_likelihood
    return -2 / beta * logsigmoid(-beta * gained).mean()


def simnpo(answers: Answers, before: Before, beta: float = 2.5, delta: float = 0.0) -> Tensor:
    """`-2/beta * mean(log sigmoid(-beta/|y| * log pi(y|x) - delta))`.

    SimNPO, arXiv 2410.07163, equation 4, where `delta` is called gamma: NPO for each token of an answer, and
    without the model before unlearning.
    """
    return -2 / beta * logsigmoid(-beta * answers.log_likelihood / answers.length - delta).mean()


def kl(answers: Answers, before: Before) -> Tensor:
    """`mean(KL(pi_before || pi))` over the tokens of the answers.

    The retain half of "KL Minimization" in arXiv 2401.06121 (TOFU), there over all tokens of a text.
    """
    now, then = answers.logits.log_softmax(-1), before().logits.log_softmax(-1)
    return kl_div(now, then, reduction="batchmean", log_target=True)


FORGET: dict[str, Objective] = {"GradDiff": grad_diff, "NPO": npo, "SimNPO": simnpo}
RETAIN: dict[str, Objective] = {"NLL": nll, "KL": kl}
