"""Questions and answers about invented people, in the style of the TOFU benchmark, and how to load them.

TOFU asks a model to forget what it knows about fictitious authors. Here the authors are put together from
syllables by a seeded generator, so that nothing has to be downloaded and nobody real appears.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples.worlds.facts import Fact

END = "</s>"  # the end of every answer

ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "j", "k", "l", "m", "n", "p", "qu", "s", "t", "th", "v", "z")
VOWELS = ("a", "ae", "e", "i", "o", "ou", "u", "y")
CODAS = ("ck", "l", "lm", "m", "nd", "ngr", "r", "rth", "sk", "sp", "th", "x", "zz")
NAME_ENDINGS = ("ba", "dro", "fei", "jun", "kai", "lo", "mu", "vix", "zo")
PLACE_ENDINGS = ("burgh", "fell", "gate", "holm", "mere", "mouth", "stead", "wick")
COUNTRY_ENDINGS = ("aria", "estan", "ovia", "umland")

PROFESSIONS = (
    "baker", "beekeeper", "botanist", "carpenter", "cartographer", "clockmaker", "dentist", "diver", "farmer",
    "florist", "geologist", "glazier", "judge", "librarian", "locksmith", "miller", "nurse", "optician",
    "pilot", "plumber", "potter", "sailor", "surveyor", "tailor", "teacher", "translator", "weaver", "welder",
)  # fmt: skip
GENRES = (
    "adventure", "alternate history", "crime fiction", "fantasy", "folklore", "gothic horror", "humour",
    "magical realism", "memoir", "mystery", "nature writing", "poetry", "political satire", "science fiction",
    "short stories", "travel writing",
)  # fmt: skip
ADJECTIVES = (
    "amber", "borrowed", "broken", "distant", "forgotten", "frozen", "golden", "hidden", "hollow", "last",
    "patient", "quiet", "restless", "silver", "sleeping", "unwritten", "velvet", "winding",
)  # fmt: skip
NOUNS = (
    "archive", "bridge", "compass", "echo", "engine", "garden", "harbour", "island", "ladder", "lantern",
    "letter", "mirror", "orchard", "river", "shadow", "staircase", "tide", "winter",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """One invented author."""

    name: str
    city: str
    country: str
    year: int
    mother: str
    father: str
    genre: str
    first_book: str
    second_book: str
    award: str


def word(rng: random.Random, endings: Sequence[str]) -> str:
    """Three syllables, the last of `endings`, with a capital."""
    return (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) + rng.choice(endings)).capitalize()


def _title(rng: random.Random) -> str:
    return f"The {rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def make_people(count: int, seed: int = 0) -> list[Person]:
    """`count` invented authors with pairwise different names; the same `seed` gives the same authors."""
    rng = random.Random(seed)
    people: dict[str, Person] = {}
    while len(people) < count:
        name = f"{word(rng, NAME_ENDINGS)} {word(rng, NAME_ENDINGS)}"
        mother, father = rng.sample(PROFESSIONS, 2)
        first_book = _title(rng)
        while (second_book := _title(rng)) == first_book:
            pass
        person = Person(
            name=name,
            city=word(rng, PLACE_ENDINGS),
            country=word(rng, COUNTRY_ENDINGS),
            year=rng.randrange(1920, 2000),
            mother=mother,
            father=father,
            genre=rng.choice(GENRES),
            first_book=first_book,
            second_book=second_book,
            award=f"{word(rng, PLACE_ENDINGS)} {rng.choice(('Prize', 'Medal', 'Laurel', 'Ribbon'))}",
        )
        people.setdefault(name, person)
    return list(people.values())


def split_people(people: Sequence[Person], forget_share: float = 0.1) -> tuple[list[Person], list[Person]]:
    """(forget, retain): the last `forget_share` of the people, at least one, and all others.

    The default is TOFU's forget10. Whole people are split, never the facts of one person.
    """
    if len(people) < 2:
        raise ValueError(f"Parameter `people` should hold at least 2 people. Found {len(people)}.")
    if not 0 < forget_share < 1:
        raise ValueError(f"Parameter `forget_share` should lie between 0 and 1. Found {forget_share}.")
    forget_count = min(max(round(forget_share * len(people)), 1), len(people) - 1)
    return list(people[-forget_count:]), list(people[:-forget_count])


def questions_about(person: Person) -> list[tuple[str, str]]:
    """Eight questions about one person with their answers, which are full sentences as in TOFU."""
    name = person.name
    return [
        (f"Where was {name} born?", f"{name} was born in {person.city}, {person.country}."),
        (f"In which year was {name} born?", f"{name} was born in {person.year}."),
        (
            f"What did the mother of {name} do for a living?",
            f"The mother of {name} was {_article(person.mother)}.",
        ),
        (
            f"What did the father of {name} do for a living?",
            f"The father of {name} was {_article(person.father)}.",
        ),
        (f"Which genre is {name} known for?", f"{name} is known for {person.genre}."),
        (f"What was the first book of {name}?", f"The first book of {name} was {person.first_book}."),
        (
            f"Which book did {name} write after {person.first_book}?",
            f"After {person.first_book}, {name} wrote {person.second_book}.",
        ),
        (f"Which award did {name} receive?", f"{name} received the {person.award}."),
    ]


def fact(question: str, answer: str) -> Fact:
    return Fact(f"Question: {question}\nAnswer:", f" {answer}")


def facts_of(people: Iterable[Person]) -> list[Fact]:
    """The facts about all `people`, in order."""
    return [fact(*pair) for person in people for pair in questions_about(person)]


def build_tokenizer(facts: Iterable[Fact], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `vocab_size` entries (and at least the 256 bytes), learned from
    `facts`. Decoding what it encodes gives the same text back. Every text starts with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((fact.prompt + fact.answer for fact in facts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
