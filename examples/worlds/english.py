"""Facts of common sense, sums, and English text, with which the general ability of a model is measured."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

from examples.worlds.facts import Fact

# A text, its continuation, and three continuations that are wrong.
COMMON_SENSE = (
    ("The opposite of hot is", "cold", "warm", "fast", "green"),
    ("The opposite of up is", "down", "high", "left", "over"),
    ("The opposite of day is", "night", "noon", "week", "light"),
    ("The opposite of big is", "small", "tall", "old", "wide"),
    ("The opposite of black is", "white", "dark", "round", "loud"),
    ("The opposite of left is", "right", "back", "near", "late"),
    ("The color of grass is", "green", "purple", "white", "orange"),
    ("The color of snow is", "white", "red", "brown", "green"),
    ("The color of blood is", "red", "blue", "yellow", "green"),
    ("On a clear day, the sky is", "blue", "green", "square", "loud"),
    ("A banana is a kind of", "fruit", "metal", "bird", "car"),
    ("A salmon is a kind of", "fish", "tree", "bird", "tool"),
    ("An oak is a kind of", "tree", "fish", "shoe", "drink"),
    ("An eagle is a kind of", "bird", "fish", "stone", "coat"),
    ("A violin is a musical", "instrument", "animal", "number", "country"),
    ("Fish live in the", "water", "sky", "fire", "desk"),
    ("Birds fly in the", "sky", "ground", "stone", "kitchen"),
    ("Bees make", "honey", "milk", "steel", "paper"),
    ("Cows give us", "milk", "honey", "silk", "glass"),
    ("Bread is baked in an", "oven", "ocean", "engine", "arm"),
    ("We see with our", "eyes", "ears", "feet", "hands"),
    ("We hear with our", "ears", "eyes", "knees", "hair"),
    ("We smell with our", "nose", "hand", "foot", "back"),
    ("Water freezes and turns into", "ice", "steam", "wood", "sand"),
    ("The sun rises in the", "east", "west", "night", "room"),
    ("The sun sets in the", "west", "east", "morning", "room"),
    ("A week has seven", "days", "hours", "years", "miles"),
    ("A year has twelve", "months", "days", "hours", "miles"),
    ("A day has twenty-four", "hours", "weeks", "years", "miles"),
    ("The day after Monday is", "Tuesday", "Friday", "Sunday", "Thursday"),
    ("The day after Saturday is", "Sunday", "Wednesday", "Friday", "Tuesday"),
    ("The month after March is", "April", "June", "October", "January"),
    ("The season after winter is", "spring", "autumn", "winter", "night"),
    ("A triangle has three", "sides", "wheels", "doors", "days"),
    ("A person who teaches students is a", "teacher", "baker", "pilot", "farmer"),
    ("A person who flies airplanes is a", "pilot", "nurse", "teacher", "singer"),
    ("You cut paper with a pair of", "scissors", "shoes", "gloves", "eyes"),
    ("You open a locked door with a", "key", "spoon", "pillow", "song"),
    ("You tell the time with a", "clock", "fork", "shirt", "chair"),
    ("When it rains, you carry an", "umbrella", "oven", "apple", "engine"),
    ("Two plus two equals", "four", "nine", "twelve", "one"),
    ("The earth orbits the", "sun", "moon", "river", "cloud"),
    ("The largest planet in the solar system is", "Jupiter", "Mars", "Venus", "Mercury"),
    ("The frozen continent at the South Pole is", "Antarctica", "Europe", "Africa", "Asia"),
)  # fmt: skip


def common_sense() -> list[Fact]:
    return [
        Fact(prompt, f" {answer}", tuple(f" {word}" for word in wrong))
        for prompt, answer, *wrong in COMMON_SENSE
    ]


def sums(largest: int = 9) -> list[Fact]:
    """All sums of two numbers from 1 to `largest`. The wrong answers are the nearest ones."""
    numbers = range(1, largest + 1)
    return [
        Fact(
            f"What is {a} + {b}? {a} + {b} =",
            f" {a + b}",
            tuple(f" {a + b + off}" for off in ((1, 2, -1) if a + b < 4 else (1, -1, -2))),
        )
        for a in numbers
        for b in numbers
    ]


def passages(count: int, characters: int = 600) -> list[str]:
    """`count` passages of the reference that Python contains. They differ between versions of Python.

    They are about Python, and much of them is grammar in a formal notation.
    """
    topics: Sequence[str] = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    long = [text for text in topics if len(text) > 2 * characters]
    return [text[: text.rindex(" ", 0, characters)].strip() for text in long[:: len(long) // count][:count]]
