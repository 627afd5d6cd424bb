"""The world of invented people, whose facts a small Llama learns by heart. Nothing has to be downloaded."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from examples.worlds.islands import general_facts
from examples.worlds.learn import make_model, train
from examples.worlds.people import END, build_tokenizer, facts_of, make_people, split_people
from examples.worlds.world import World


@dataclass(frozen=True)
class Invented:
    """The sizes of a world and of its model. A tenth of the people is to be forgotten.

    General knowledge, which is in no loss, is about invented islands and sums of two digits.
    """

    people: int = 60
    islands: int = 20
    digits: int = 9
    vocab: int = 1024
    hidden: int = 128
    layers: int = 2
    train_steps: int = 450
    train_lr: float = 3e-3

    def untrained(self, seed: int) -> World:
        """The world, with a model that knows nothing yet."""
        forget, retain = (facts_of(part) for part in split_people(make_people(self.people, seed)))
        general = general_facts(self.islands, self.digits, seed)
        tokenizer = build_tokenizer([*forget, *retain, *general], self.vocab)
        torch.manual_seed(seed)
        model = make_model(len(tokenizer), self.hidden, self.layers)
        return World(model, tokenizer, {"forget": forget, "retain": retain, "general": general}, end=END)

    def teach(self, world: World, seed: int, quiet: bool = False) -> int:
        """Trains the world's model on its facts, the general ones twice in each pass. Returns the steps."""
        everything = [fact for name in ("forget", "retain", "general") for fact in world.examples[name]]
        everything += world.examples["general"]
        return train(
            world.model,
            everything,
            world.collator,
            self.train_steps,
            lr=self.train_lr,
            seed=seed,
            quiet=quiet,
        )

    def prepare(self, folder: Path, seed: int) -> None:
        """Teaches the model of a seed and saves it, unless `folder` has it already."""
        path = self._path(folder, seed)
        if not path.exists():
            world = self.untrained(seed)
            self.teach(world, seed, quiet=True)
            partial = path.with_suffix(".partial")
            torch.save(world.model.state_dict(), partial)
            partial.replace(path)

    def open(self, folder: Path, seed: int) -> World:
        """The world of a seed with the model that `prepare` saved."""
        world = self.untrained(seed)
        world.model.load_state_dict(torch.load(self._path(folder, seed)))
        return world

    def _path(self, folder: Path, seed: int) -> Path:
        sizes = "-".join(map(str, astuple(self)))
        return folder / f"people-{sizes}-seed{seed}.pt"
