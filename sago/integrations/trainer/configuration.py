"""Reads the options of a synthesis from a configuration file: strings, numbers and mappings."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch

from sago import rules
from sago.rules import Rule


def rule_of(value: Any) -> str | Rule:
    """The rule of a configuration.

    It is one of these:

    - the name of a rule: `sago`
    - a rule of one's own, as module and name: `my_package.rules:mine`
    - a mapping with the name of a function that makes a rule, and with its arguments:
      `{name: cagrad, radius: 0.4}` or `{name: "my_package.rules:made", threshold: 0.1}`

    Raises:
        ValueError, TypeError: If the value is none of them, and for arguments that the function refuses.
    """
    if isinstance(value, Mapping):
        arguments = dict(value)
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(
                "Parameter `rule` should have a key 'name' if it is a mapping. Found the keys "
                f"{sorted(map(str, value))}."
            )
        make = _imported(name) if ":" in name else getattr(rules, name, None)
        if not callable(make) or name in ("resolve", "evaluate", "Rule"):
            raise ValueError(
                f"Parameter `rule` should have the name of a function that makes a rule. Found {name!r}. "
                "Write the name of a rule without parameters as a string."
            )
        made = make(**arguments)
        if not isinstance(made, Rule):
            raise TypeError(f"{name!r} should make a sago.Rule. Found {type(made).__name__}.")
        return made
    if isinstance(value, str) and ":" in value:
        found = _imported(value)
        if not isinstance(found, Rule):
            raise TypeError(
                f"Parameter `rule` should be a sago.Rule. Found {type(found).__name__} at {value!r}. For a "
                f"function that makes a rule, write {{name: {value!r}}} and its arguments."
            )
        return found
    if isinstance(value, str) and value not in rules.RULES:
        raise ValueError(
            f"Parameter `rule` should be one of {', '.join(rules.RULES)}. Found {value!r}. A rule of your "
            "own has the form 'module:name'."
        )
    return rules.resolve(value)


def _imported(path: str) -> Any:
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: not of this form
        raise ValueError(
            f"Parameter `rule` should be 'module:name' of something that can be imported. Found {path!r}, "
            f"which raises {error!r}."
        ) from error


def dtype_of(value: Any) -> torch.dtype | None:
    """A dtype from its name, "float32" or "torch.float32"."""
    if value is None or isinstance(value, torch.dtype):
        return value
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            "Parameter `accumulate_dtype` should be the name of a floating dtype, such as 'float32'. Found "
            f"{value!r}."
        )
    return found


@dataclass(frozen=True)
class ByPattern:
    """Groups by what a regular expression finds in the name of a parameter.

    Names in which it finds the same text, or the same groups of the expression, are a group. A name in which
    it finds nothing is a group of its own.
    """

    pattern: str

    def __call__(self, name: str) -> Hashable:
        match = re.search(self.pattern, name)
        return name if match is None else match.groups() or match[0]

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError if the expression finds nothing in any of these names."""
        if not any(re.search(self.pattern, name) for name in names):
            raise ValueError(
                "Parameter `groups` should be a regular expression that matches the names of parameters. "
                f"Found {self.pattern!r}, which matches none."
            )


def module_of(name: str) -> str:
    """The name of the module of a parameter."""
    return name.rpartition(".")[0]


def groups_of(value: Any) -> Callable[[str], Hashable] | None:
    """A function from the name of a parameter to its group.

    `value` is "layer" (`model.layers.3` is one group), "module" (the parameters of one module are a group),
    or a regular expression; see `ByPattern`. An expression that is a single word is refused, because it is
    likely to be a misspelled "layer" or "module". `(?:word)` is not.
    """
    if value is None or callable(value):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, str):
        raise TypeError(
            "Parameter `groups` should be None, a function of a parameter's name, 'layer', 'module' or a "
            f"regular expression. Found {type(value).__name__}."
        )
    if value == "module":
        return module_of
    if value == "layer":
        return ByPattern(r"^(?:.*?\.)?\d+(?=\.)")
    if not value or value.isidentifier():
        raise ValueError(
            f"Parameter `groups` should be 'layer', 'module' or a regular expression. Found {value!r}. Write "
            "a word as an expression, for example '(?:mlp)'."
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            "Parameter `groups` should be 'layer', 'module' or a regular expression. Found "
            f"{value!r}, which is not an expression: {error}."
        ) from error
    return ByPattern(value)
