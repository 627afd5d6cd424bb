"""The options of the synthesis in a trainer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from sago.core.checks import NONFINITE, check_accumulate_dtype, check_bool, check_floor
from sago.integrations.trainer.configuration import dtype_of, groups_of, rule_of
from sago.rules import Rule, resolve

# Where arguments of `GradientBuckets.synthesize_` are set that are not options.
_WEIGHTS = " `gamma` and `alpha` are attributes of the trainer."
_ELSEWHERE = {
    "gamma": _WEIGHTS,
    "alpha": _WEIGHTS,
    "max_norm": " The trainer clips by `max_grad_norm` of its arguments.",
}


@dataclass(frozen=True)
class Synthesis:
    """The options of the synthesis in a trainer.

    Attributes:
        rule: As in `sago.synthesize_`.
        groups: A function from the name of a parameter to the key of its group: for rules that take inner
            products over each group, for `retain_floor`, and for the rows of the report. By default every
            parameter is a group.
        nonfinite: As in `GradientBuckets.synthesize_`.
        accumulate_dtype: As in `sago.GradientBuckets`.
        stats: Whether all fields of the report are computed and logged, or only those that the rule needs.
        one_copy: As in `sago.GradientBuckets`. The updates have the same bits with half of the memory. This
            needs a rule of scope "element" or "tensor" without a memory, `nonfinite="propagate"`, no
            `accumulate_dtype`, one micro-batch in a window, and one process or FSDP2.
        retain_floor: As in `sago.synthesize_`.
    """

    rule: str | Rule = "sago"
    groups: Callable[[str], Hashable] | None = None
    nonfinite: Literal["propagate", "zero_update"] = "propagate"
    accumulate_dtype: torch.dtype | None = None
    stats: bool = True
    one_copy: bool = False
    retain_floor: float = 0.0

    def __post_init__(self) -> None:
        rule = resolve(self.rule)
        check_floor(rule, self.retain_floor)
        if self.nonfinite not in NONFINITE:
            raise ValueError(
                f"Parameter `nonfinite` should be 'propagate' or 'zero_update'. Found {self.nonfinite!r}."
            )
        check_bool("stats", self.stats)
        check_bool("one_copy", self.one_copy)
        check_accumulate_dtype(self.accumulate_dtype)
        if self.one_copy:
            _check_one_copy(rule, self)
        if self.groups is not None and not callable(self.groups):
            raise TypeError(
                "Parameter `groups` should be None or a function of a parameter's name. Found "
                f"{type(self.groups).__name__}. Names such as 'layer' and regular expressions are for "
                "mappings: Synthesis.of({'groups': 'layer'})."
            )

    @classmethod
    def of(cls, options: Any) -> Synthesis:
        """The options from a mapping, for example a part of a YAML file.

        A rule is a name, `module:name`, or a mapping with the `name` of a function that makes a rule and its
        arguments. `groups` is "layer", "module" or a regular expression. A dtype is a name such as "float32".

        Raises:
            ValueError, TypeError: For an unknown option or an invalid value.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise TypeError(
                f"Parameter `synthesis` should be a Synthesis or a mapping. Found {type(options).__name__}."
            )
        names = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in names]
        if unknown:
            raise ValueError(
                f"Parameter `synthesis` should have options among {', '.join(names)}. Found {unknown[0]!r}."
                f"{_ELSEWHERE.get(unknown[0], '')}"
            )
        read: dict[str, Callable[[Any], Any]] = {
            "rule": rule_of,
            "groups": groups_of,
            "accumulate_dtype": dtype_of,
        }
        found: dict[str, Any] = {n: read[n](x) if n in read else x for n, x in options.items()}
        return cls(**found)


def _check_one_copy(rule: Rule, how: Synthesis) -> None:
    """Raises unless an update can be written while the retain gradients arrive."""
    found, because = "", ""
    if rule.scope == "global":
        found = f"rule={rule.name!r}"
        because = "needs inner products over all gradients, which are complete only after the backward"
    elif rule.state:
        found = f"rule={rule.name!r}"
        because = "keeps numbers of all groups from step to step"
    elif how.nonfinite != "propagate":
        found = f"nonfinite={how.nonfinite!r}"
        because = "needs all elements of both gradients before the first is written"
    elif how.accumulate_dtype is not None:
        found, because = f"accumulate_dtype={how.accumulate_dtype}", "needs accumulators of that dtype"
    if found:
        raise ValueError(
            f"Parameter `one_copy` should be False with {found}, which {because}. Found True. Leave "
            "`one_copy` out, or change the other parameter."
        )
