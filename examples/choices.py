"""Multiple-choice questions, as EleutherAI's lm-evaluation-harness asks and scores them (WMDP, MMLU).

A question is asked without examples. The answer is the letter whose log-likelihood after the prompt is the
largest, the first of equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.files import records

LETTERS = "ABCD"


class Question(NamedTuple):
    """`answer` is the index of the right one of four `choices`; `subject` is empty where a file has none."""

    text: str
    choices: list[str]
    answer: int
    subject: str = ""


def questions(path: Path, published: str, subject: str = "subject") -> list[Question]:
    """From records with `question`, four `choices`, `answer` (0 to 3) and maybe one that `subject` names."""
    found = []
    for record in records(path, published):
        choices, answer = record.get_strings("choices", len(LETTERS)), record.get("answer", int)
        if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
            raise ValueError(
                f"{record.where}: a question should have 4 choices and an answer from 0 to 3. "
                f"Found {len(choices)} choices and answer {answer}."
            )
        about = record.get(subject, str) if subject in record.value else ""
        found.append(Question(record.get("question", str), choices, answer, about))
    return found


def prompt(question: Question, subject: str) -> str:
    """`subject` is that of questions without one of their own."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
    about = question.subject.replace("_", " ") or subject
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n" if about else ""
    return header + "\n".join([question.text.strip(), *lines, "Answer:"])


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str], batch_size: int = 8
) -> Tensor:
    """`log p(continuation | prompt)`, `[prompts, continuations]`, fp32.

    Prompt and continuation are encoded together, and those tokens count that are not of the prompt alone. Too
    long prompts lose their beginning.
    """
    pairs = []
    for text in prompts:
        start = len(tokenizer.encode(text))
        for continuation in continuations:
            whole = tokenizer.encode(text + continuation)
            pairs.append((whole[:start], whole[start:]))
    # What the model reads is often the same for all continuations, which are one token each.
    longest = model.config.max_position_embeddings
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, (context, told) in enumerate(pairs):
        readers.setdefault(tuple((context + told)[-(longest + 1) : -1]), []).append(i)
    rows = sorted(readers, key=len)
    found = torch.zeros(len(pairs))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch], device=model.device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in batch], device=model.device
        )
        logits = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        for scores, row in zip(logits, batch, strict=True):
            for i in readers[row]:
                told = pairs[i][1]
                at = torch.arange(len(row) - len(told), len(row))
                found[i] = scores[at, torch.tensor(told)].sum()
    return found.view(len(prompts), len(continuations))


def accuracy(
    model: Any, tokenizer: Any, asked: Sequence[Question], subject: str, batch_size: int = 8
) -> float:
    """The share of questions answered right."""
    prompts = [prompt(question, subject) for question in asked]
    scores = log_likelihoods(model, tokenizer, prompts, [f" {letter}" for letter in LETTERS], batch_size)
    answers = torch.tensor([question.answer for question in asked])
    return (scores.argmax(1) == answers).double().mean().item()
