"""Facts as a prompt and its answer, and how well a model knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.objectives import IGNORE_INDEX, answers_of

Batch = Mapping[str, Tensor]
Examples = Sequence[dict[str, list[int]]]

KNOWLEDGE = ("loss", "probability", "tokens", "answers")


class Fact(NamedTuple):
    """A text, its continuation, and continuations that are wrong. Continuations start with a space."""

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()


def encode(fact: Fact, tokenizer: Any, end: str = "") -> dict[str, list[int]]:
    """`input_ids` and `labels` of a fact.

    Labels are -100 on the prompt, so that a loss contains only the tokens of the answer and of `end`.
    """
    prompt = tokenizer.encode(fact.prompt)
    answer = tokenizer.encode(fact.answer + end, add_special_tokens=False)
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of the batch: `pad_token_id` in `input_ids`, 0 in
    `attention_mask`, -100 in `labels`. Each is an int64 tensor of shape [batch, length]."""

    pad_token_id: int

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)

        def padded(rows: Iterable[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        return {
            "input_ids": padded((example["input_ids"] for example in examples), self.pad_token_id),
            "attention_mask": padded(([1] * len(example["input_ids"]) for example in examples), 0),
            "labels": padded((example["labels"] for example in examples), IGNORE_INDEX),
        }


def batches_of(
    examples: Examples, collator: Collator, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Batch]:
    """`steps` batches: one pass over the shuffled examples after the other."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        yield collator([examples[i] for i in order[:batch_size]])
        del order[:batch_size]


def logits_of(model: Any, batch: Batch) -> Tensor:
    """`[batch, length, vocab]`."""
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return model(input_ids=ids, attention_mask=mask).logits


@torch.no_grad()
def scores(model: Any, examples: Examples, collator: Collator, batch_size: int = 64) -> dict[str, Tensor]:
    """Three numbers of each answer, fp64 `[examples]`: its `log_likelihood`, its number of tokens `length`,
    and how many of its tokens the model ranks first, `right`."""
    found = {
        name: torch.zeros(len(examples), dtype=torch.float64)
        for name in ("log_likelihood", "length", "right")
    }
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))  # the least padding
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = collator([examples[i] for i in index])
        answers = answers_of(logits_of(model, batch), batch["labels"].to(model.device))
        right = (answers.logits.argmax(-1) == answers.tokens).split(answers.length.tolist())
        found["log_likelihood"][index] = answers.log_likelihood.double().cpu()
        found["length"][index] = answers.length.double().cpu()
        found["right"][index] = torch.stack([part.sum() for part in right]).double().cpu()
    return found


def knowledge(model: Any, examples: Examples, collator: Collator, batch_size: int = 64) -> dict[str, float]:
    """Returns four numbers that measure how well the model knows the answers.

    `loss` is the NLL of an answer token. `probability` is the mean over the answers of `pi(y|x) ** (1/|y|)`,
    as in TOFU. `tokens` is the share of answer tokens that the model ranks first. `answers` is the share of
    answers whose tokens are all ranked first, so that greedy decoding gives the answer word for word.
    """
    seen = scores(model, examples, collator, batch_size)
    values = (
        -seen["log_likelihood"].sum() / seen["length"].sum(),
        (seen["log_likelihood"] / seen["length"]).exp().mean(),
        seen["right"].sum() / seen["length"].sum(),
        (seen["right"] == seen["length"]).double().mean(),
    )
    return {name: value.item() for name, value in zip(KNOWLEDGE, values, strict=True)}


def chosen(model: Any, facts: Sequence[Fact], tokenizer: Any, collator: Collator) -> Tensor:
    """Whether the model chooses the right answer of each fact, `[facts]`.

    It chooses the answer with the largest `pi(y|x) ** (1/|y|)`, the geometric mean over the tokens, because
    the answers differ in length. A tie counts as a wrong choice.
    """
    examples = [
        encode(fact._replace(answer=answer), tokenizer)
        for fact in facts
        for answer in (fact.answer, *fact.wrong)
    ]
    seen = scores(model, examples, collator)
    means = (seen["log_likelihood"] / seen["length"]).split([1 + len(fact.wrong) for fact in facts])
    return torch.tensor([bool((mean[0] > mean[1:]).all()) for mean in means])
