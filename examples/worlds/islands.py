"""What a model knows besides people: invented islands, and sums of two digits.

It is learned before unlearning, and is neither forgotten nor in the retain loss. What is left of it
afterwards stands for general ability, as MMLU does for a large model.
"""

from __future__ import annotations

import random

from examples.worlds.facts import Fact
from examples.worlds.people import fact, word

ISLAND_ENDINGS = ("oa", "issi", "uva", "enga")
CAPITAL_ENDINGS = ("haven", "quay", "strand", "port")
LANGUAGE_ENDINGS = ("ish", "ese", "ic")
CROPS = (
    "apricots", "barley", "cocoa", "dates", "figs", "ginger", "hops", "lemons", "lentils", "mangoes", "oats",
    "olives", "peppers", "plums", "quinces", "saffron", "tea", "vanilla", "walnuts", "yams",
)  # fmt: skip


def general_facts(islands: int = 20, digits: int = 9, seed: int = 0) -> list[Fact]:
    """Three facts about each of `islands` invented islands, and all sums of two digits up to `digits`."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < islands:
        names.setdefault(word(rng, ISLAND_ENDINGS))
    facts = []
    for name in names:
        capital, language = word(rng, CAPITAL_ENDINGS), word(rng, LANGUAGE_ENDINGS)
        facts += [
            fact(f"What is the capital of {name}?", f"The capital of {name} is {capital}."),
            fact(f"What do they speak on {name}?", f"On {name} they speak {language}."),
            fact(f"What do they grow on {name}?", f"On {name} they grow {rng.choice(CROPS)}."),
        ]
    numbers = range(1, digits + 1)
    return facts + [
        fact(f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in numbers for b in numbers
    ]
