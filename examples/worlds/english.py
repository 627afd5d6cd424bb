"""Facts of common sense, sums, and English text, with which the general ability of a model is measured."""

from __future__ import annotations

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


# Prose of everyday subjects, written for this purpose, so that every machine measures the same text.
PASSAGES = (
    """The rain had stopped before noon, but the road to the village was still wet. Two boys walked along the
    river and looked for stones that were flat enough to throw. Their grandmother waited at the gate, because
    the soup was ready and the bread was getting cold.""",
    """To grow tomatoes, choose a place that gets at least six hours of sun a day. Water the plants early in
    the morning, and keep the leaves dry. When the first flowers appear, tie the stems to a stick, so that the
    weight of the fruit does not break them.""",
    """A steam engine burns fuel to boil water. The steam needs much more space than the water did, and so it
    pushes a piston. A rod and a wheel turn this movement into a rotation, which can drive a pump, a mill or a
    train. Most of the heat is lost through the chimney.""",
    """The committee met on Tuesday to discuss the price of tickets. Several members said that higher prices
    would keep families away from the theater. Others answered that the building needed a new roof, and that
    nobody had offered another way to pay for it. The vote was postponed.""",
    """Bats find their way in the dark by listening. They call many times in a second, and the echo tells them
    how far away an insect is and in which direction it flies. Some moths hear these calls and fold their
    wings, so that they fall out of reach.""",
    """She had never spoken in front of so many people. Her hands were shaking when she opened the folder, and
    for a moment she could not read her own writing. Then she saw her brother in the third row. He smiled, and
    she began with the story of the old piano.""",
    """Good sleep depends on regular hours. Doctors advise their patients to go to bed at the same time every
    evening, to avoid coffee in the afternoon, and to leave the telephone in another room. A short walk before
    dinner helps many people more than medicine does.""",
    """The old harbor is no longer used by large ships. Fishermen still land their catch there in the early
    hours, and by nine o'clock the market is over. In the afternoon the square belongs to tourists, who drink
    tea in the sun and watch the gulls fight over scraps.""",
)


def passages() -> list[str]:
    """Eight passages of English prose, each on one line."""
    return [" ".join(text.split()) for text in PASSAGES]


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
