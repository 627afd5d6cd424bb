"""The numbers that rules keep from step to step, and the steps of random gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sago.backends.streams import is_capturing
from sago.backends.upload import upload
from sago.rules import Rule


class RuleMemory:
    """Device tensors for each rule, by its name. A synthesis changes them in place.

    Args:
        device: The device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[str, Tensor] = {}  # fp64 [groups, n]
        self._draws: dict[str, Tensor] = {}  # int64 [2]: the seed and the step
        self._seeds: dict[str, int] = {}
        self._initial: dict[str, tuple[float, ...]] = {}

    def state(self, rule: Rule, keys: Sequence[object]) -> Tensor | None:
        """The numbers of a rule, fp64 `[groups, n]`, or None. `keys` are the groups."""
        if not rule.state:
            return None
        groups = len(keys)
        if self._initial.get(rule.name, rule.state) != rule.state:
            raise ValueError(
                f"Rules named {rule.name!r} should have the same initial `state`, because they share their "
                f"numbers. Found {self._initial[rule.name]} and {rule.state}. Give one of them another name."
            )
        if rule.name not in self._states:
            self._check_not_capturing(rule)
            table = torch.tensor([rule.state], dtype=torch.float64).repeat(groups, 1)
            self._states[rule.name] = upload(table, torch.float64, self._device)
        self._initial[rule.name] = rule.state
        found = self._states[rule.name]
        if found.shape != (groups, len(rule.state)):
            raise ValueError(
                f"The numbers of rule {rule.name!r} should have shape {(groups, len(rule.state))}. Found "
                f"{tuple(found.shape)}, of a state that was loaded or of another rule with this name."
            )
        return found

    def draw(self, rule: Rule) -> Tensor | None:
        """The seed and the step of a random gate, int64 `[2]`. None for other rules."""
        if rule.seed is None:
            return None
        if self._seeds.get(rule.name, rule.seed) != rule.seed:
            raise ValueError(
                f"Rules named {rule.name!r} should have the same seed, because they share their steps. Found "
                f"{self._seeds[rule.name]} and {rule.seed}. Give one of them another name."
            )
        if rule.name not in self._draws:
            self._check_not_capturing(rule)
            self._draws[rule.name] = upload([rule.seed, 0], torch.int64, self._device)
        self._seeds[rule.name] = rule.seed
        return self._draws[rule.name]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"rules": dict(self._states), "draws": dict(self._draws)}

    def load_state_dict(self, rules: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> None:
        """Copies checked values. A tensor that a CUDA graph may use stays the same one."""
        for ours, theirs, dtype in ((self._states, rules, torch.float64), (self._draws, draws, torch.int64)):
            for name in set(ours) - set(theirs):
                del ours[name]
            for name, values in theirs.items():
                if name in ours and ours[name].shape == values.shape:
                    ours[name].copy_(values)
                else:
                    ours[name] = values.to(self._device, dtype, copy=True)
        self._seeds = {name: int(values[0]) for name, values in draws.items()}
        self._initial = {}

    def _check_not_capturing(self, rule: Rule) -> None:
        if is_capturing([self._device]):
            raise ValueError(
                f"Rule {rule.name!r} should be used once before the capture of a CUDA graph, because the "
                "graph would set its memory back at each replay. Found its first use in a capture."
            )


def check_memory(state: Mapping[str, Any]) -> None:
    """Raises unless "rules" and "draws" are as `RuleMemory.state_dict` returns them."""
    shapes = {"rules": "fp64 `[groups, n]`", "draws": "int64 `[2]`"}
    for key, wanted in shapes.items():
        if not isinstance(state[key], Mapping):
            raise TypeError(
                f"Parameter `state[{key!r}]` should be a dict. Found {type(state[key]).__name__}."
            )
        for name, values in state[key].items():
            right = isinstance(values, Tensor) and (
                values.dtype == torch.float64 and values.ndim == 2
                if key == "rules"
                else values.dtype == torch.int64 and values.shape == (2,)
            )
            if not right:
                found = type(values).__name__
                found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else found
                raise ValueError(
                    f"Parameter `state[{key!r}][{name!r}]` should be a tensor, {wanted}. Found {found}."
                )
