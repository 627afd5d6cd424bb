"""A world of facts, and a model that knows them by heart."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from examples.general import general_facts
from examples.grid import Setup
from examples.learn import Batch, Examples, knowledge, make_model, train
from examples.people import Collator, FactDataset, build_tokenizer, facts_of, make_people, split_people
from examples.unlearn import batches_of

Known = dict[str, dict[str, float]]

SETS = ("forget", "retain", "general")
# Every seventh fact to retain is asked: seven and the eight facts of a person have no common divisor.
ASKED = 7


class World(NamedTuple):
    """What there is to know, and a model that knows nothing yet."""

    facts: dict[str, Examples]
    collator: Collator
    model: LlamaForCausalLM

    def known(self, model: LlamaForCausalLM) -> Known:
        """`knowledge` of forget, general and a sample of retain."""
        asked = {**self.facts, "retain": self.facts["retain"][::ASKED]}
        return {name: knowledge(model, asked[name], self.collator) for name in SETS}


def make_world(setup: Setup, seed: int) -> World:
    forget, retain = (facts_of(part) for part in split_people(make_people(setup.people, seed)))
    general = general_facts(setup.islands, setup.digits, seed)
    tokenizer = build_tokenizer([*forget, *retain, *general], setup.vocab)
    facts = {
        name: FactDataset(part, tokenizer).examples
        for name, part in zip(SETS, (forget, retain, general), strict=True)
    }
    torch.manual_seed(seed)
    model = make_model(len(tokenizer), setup.hidden, setup.layers)
    return World(facts, Collator(tokenizer.pad_token_id), model)


def teach(setup: Setup, world: World, seed: int, quiet: bool = False) -> int:
    """Trains the world's model on its facts, the general ones twice in each pass. Returns the steps."""
    everything = [*world.facts["forget"], *world.facts["retain"], *2 * world.facts["general"]]
    return train(
        world.model, everything, world.collator, setup.train_steps, lr=setup.train_lr, seed=seed, quiet=quiet
    )


def learn(setup: Setup, seed: int, path: Path) -> dict[str, Any]:
    """Makes a world, teaches it to its model, and saves that to `path`."""
    world = make_world(setup, seed)
    steps = teach(setup, world, seed, quiet=True)
    torch.save(world.model.state_dict(), path)
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in world.model.parameters()),
        "facts": {name: len(facts) for name, facts in world.facts.items()},
        "steps": steps,
        "known": world.known(world.model),
    }


@lru_cache(maxsize=1)
def learned(setup: Setup, seed: int, path: Path) -> tuple[World, Known]:
    """The world whose model was saved to `path`, and what that knows."""
    world = make_world(setup, seed)
    world.model.load_state_dict(torch.load(path))
    return world, world.known(world.model)


def pairs(setup: Setup, world: World, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Forget and retain batches: the same for every cell of a seed."""
    generators = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    forget, retain = (
        batches_of(world.facts[name], world.collator, setup.batch_size, setup.steps, generator)
        for name, generator in zip(("forget", "retain"), generators, strict=True)
    )
    return zip(forget, retain, strict=True)
