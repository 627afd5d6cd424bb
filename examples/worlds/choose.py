"""The worlds by name, each with its grid."""

from __future__ import annotations

from examples.grid import Grid
from examples.worlds import Kind
from examples.worlds.invented import Invented

WORLDS = ("capitals", "people")


def kind_of(name: str) -> tuple[Kind, Grid]:
    """The world called `name`, and the grid of an experiment on it."""
    if name == "capitals":
        # Its packages are imported only where it is used: the world of people does without them.
        from examples.worlds.capitals import Capitals

        return Capitals(), Grid()
    return Invented(), Grid(rates=(4e-4, 1.2e-3), measured=tuple(range(5, 45, 5)), batch_size=12)
