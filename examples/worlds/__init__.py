"""Models with facts that they know: invented ones, and a pretrained language model with real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from examples.worlds.world import World


class Kind(Protocol):
    """A way to make worlds. A seed decides the split of the facts, and all that is random."""

    def prepare(self, folder: Path, seed: int) -> None:
        """Puts everything that takes long into `folder`, unless it has that already."""

    def open(self, folder: Path, seed: int) -> World:
        """The world of a seed, after `prepare`."""
