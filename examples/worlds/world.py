"""A model and the facts that it knows, split by what unlearning does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from examples.objectives import IGNORE_INDEX
from examples.worlds.facts import (
    Batch,
    Collator,
    Examples,
    Fact,
    batches_of,
    chosen,
    encode,
    knowledge,
    scores,
)

Known = dict[str, dict[str, float]]

TRAINED = ("forget", "retain")  # the sets that are in a loss


@dataclass(frozen=True)
class World:
    """A model with its tokenizer, and sets of facts.

    The sets `forget` and `retain` are in the losses. The other sets of `facts`, and `texts`, are in no loss:
    they show which abilities the model loses. `end` is the text that ends every answer in the losses.
    """

    model: Any
    tokenizer: Any
    facts: dict[str, list[Fact]]
    texts: Sequence[str] = ()
    end: str = ""
    examples: dict[str, Examples] = field(init=False)

    def __post_init__(self) -> None:
        encoded = {
            name: [encode(fact, self.tokenizer, self.end) for fact in facts]
            for name, facts in self.facts.items()
        }
        object.__setattr__(self, "examples", encoded)

    @property
    def collator(self) -> Collator:
        return Collator(self.tokenizer.pad_token_id or 0)

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[tuple[Batch, Batch]]:
        """`steps` pairs of a forget and a retain batch, which depend on `seed` alone."""
        sides = (
            batches_of(
                self.examples[name],
                self.collator,
                batch_size,
                steps,
                torch.Generator().manual_seed(2 * seed + i),
            )
            for i, name in enumerate(TRAINED)
        )
        return zip(*sides, strict=True)

    def known(self, model: Any) -> Known:
        """`knowledge` of each set, and the loss of a token of the texts."""
        found = {name: knowledge(model, examples, self.collator) for name, examples in self.examples.items()}
        if self.texts:
            found["text"] = {"loss": self._text_loss(model)}
        return found

    def choices(self, model: Any) -> dict[str, float]:
        """The share of right choices among four answers, of each set whose facts have wrong answers."""
        return {
            name: chosen(model, facts, self.tokenizer, self.collator).float().mean().item()
            for name, facts in self.facts.items()
            if all(fact.wrong for fact in facts)
        }

    def _text_loss(self, model: Any) -> float:
        rows = [self.tokenizer.encode(text) for text in self.texts]
        texts = [{"input_ids": row, "labels": [IGNORE_INDEX, *row[1:]]} for row in rows]
        seen = scores(model, texts, self.collator, batch_size=2)
        return -(seen["log_likelihood"].sum() / seen["length"].sum()).item()

    @torch.no_grad()
    def complete(self, model: Any, prompt: str, tokens: int = 6) -> str:
        """The continuation that greedy decoding gives, up to the end of a line or of an answer."""
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=model.device)
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.collator.pad_token_id,
        )
        text = self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip().split("\n")[0]

    @staticmethod
    def perplexity(text: Mapping[str, float]) -> float:
        """The perplexity of the texts. `text` is the entry of that name in the result of `known`."""
        return math.exp(text["loss"])
