"""Reads the layer and the kind of a parameter from its name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """The layer of a group, None if it is in no layer, and the kind of its parameter in all layers."""

    layer: int | None
    kind: str


def places(groups: Sequence[Hashable]) -> list[Place]:
    """The place of each group.

    Names are split at dots. The first part that consists of digits only is the layer, and the text after it
    is the kind: `layers.3.mlp.up_proj.weight` is `mlp.up_proj.weight` in layer 3. Later numbers, such as
    those of experts, become `*`. If a model has several lists of layers, the kind begins with the name of the
    list. A group whose key is a number is a layer. The kind of a whole layer is empty.
    """
    split = [_split(group) for group in groups]
    several = len({before for before, layer, _ in split if layer is not None}) > 1
    return [
        Place(layer, ".".join(filter(None, (before, kind))) if several and layer is not None else kind)
        for before, layer, kind in split
    ]


def _split(group: Hashable) -> tuple[str, int | None, str]:
    """The parts of a name before, at and after its first part of digits."""
    if isinstance(group, int):
        return "", group, ""
    parts = str(group).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return "", None, str(group)
    kind = ("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return ".".join(parts[:first]), int(parts[first]), ".".join(kind)
