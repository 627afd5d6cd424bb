"""Questions and answers about invented people, in the style of the TOFU benchmark, and how to load them.

TOFU asks a model to forget what it knows about fictitious authors. Here the authors are put together from
syllables by a seeded generator, so that nothing has to be downloaded and nobody real appears.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100

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


@dataclass(frozen=True)
class Fact:
    """One question about a person and its answer, a full sentence as in TOFU."""

    question: str
    answer: str


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


def facts_about(person: Person) -> list[Fact]:
    """Eight questions about one person with their answers."""
    name = person.name
    return [
        Fact(f"Where was {name} born?", f"{name} was born in {person.city}, {person.country}."),
        Fact(f"In which year was {name} born?", f"{name} was born in {person.year}."),
        Fact(
            f"What did the mother of {name} do for a living?",
            f"The mother of {name} was {_article(person.mother)}.",
        ),
        Fact(
            f"What did the father of {name} do for a living?",
            f"The father of {name} was {_article(person.father)}.",
        ),
        Fact(f"Which genre is {name} known for?", f"{name} is known for {person.genre}."),
        Fact(f"What was the first book of {name}?", f"The first book of {name} was {person.first_book}."),
        Fact(
            f"Which book did {name} write after {person.first_book}?",
            f"After {person.first_book}, {name} wrote {person.second_book}.",
        ),
        Fact(f"Which award did {name} receive?", f"{name} received the {person.award}."),
    ]


def facts_of(people: Iterable[Person]) -> list[Fact]:
    """The facts about all `people`, in order."""
    return [fact for person in people for fact in facts_about(person)]


def build_tokenizer(facts: Iterable[Fact], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `vocab_size` entries (and at least the 256 bytes), learned from
    `facts`. Decoding what it encodes gives the same text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt(fact) + completion(fact) for fact in facts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def prompt(fact: Fact) -> str:
    """The text that the model is given."""
    return f"Question: {fact.question}\nAnswer:"


def completion(fact: Fact) -> str:
    """The text that the model should answer."""
    return f" {fact.answer}"


class FactDataset(Dataset[dict[str, list[int]]]):
    """`input_ids` and `labels` of each fact. Labels are -100 on the question, so that only the answer and the
    end of the text are learned (or forgotten)."""

    def __init__(self, facts: Iterable[Fact], tokenizer: PreTrainedTokenizerFast) -> None:
        self.examples = [self._encode(fact, tokenizer) for fact in facts]

    @staticmethod
    def _encode(fact: Fact, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
        question = [tokenizer.bos_token_id, *tokenizer.encode(prompt(fact), add_special_tokens=False)]
        answer = [*tokenizer.encode(completion(fact), add_special_tokens=False), tokenizer.eos_token_id]
        return {"input_ids": question + answer, "labels": [IGNORE_INDEX] * len(question) + answer}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of the batch: `pad_token_id` in `input_ids`, 0 in
    `attention_mask`, -100 in `labels`. Each is an int64 tensor of shape [batch, length]."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)

        def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        return {
            "input_ids": padded((example["input_ids"] for example in examples), self.pad_token_id),
            "attention_mask": padded(([1] * len(example["input_ids"]) for example in examples), 0),
            "labels": padded((example["labels"] for example in examples), IGNORE_INDEX),
        }
