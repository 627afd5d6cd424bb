"""A rule's coefficient function, compiled into the combine kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from sago import rules


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


@lru_cache(maxsize=256)
def on_device(coefficients: Callable[..., Any]) -> Any:
    """The device function of `coefficients`, or None if it cannot be compiled into a kernel.

    It can if it is a plain function from a source file, without defaults or annotations (Triton would
    evaluate them), whose global names are numbers, `where` of `sago.rules`, or functions of the same kind.
    """
    if coefficients is rules.where:
        return _where
    if not isinstance(coefficients, FunctionType):
        return None
    if coefficients.__closure__ or coefficients.__defaults__ or coefficients.__annotations__:
        return None
    try:
        source = inspect.getsource(coefficients)
    except OSError:
        return None
    if not source.lstrip().startswith("def "):
        return None
    names: dict[str, Any] = {"__name__": coefficients.__module__, "tl": tl}
    for name in coefficients.__code__.co_names:
        value = coefficients.__globals__.get(name)
        if isinstance(value, FunctionType):
            value = on_device(value)
        elif isinstance(value, (int, float)):
            value = tl.constexpr(value)
        else:
            value = None
        if value is None:
            return None
        names[name] = value
    return triton.jit(FunctionType(coefficients.__code__, names, coefficients.__name__))
