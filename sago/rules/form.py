"""Checks whether a function can be compiled into the kernels, which call it with single numbers."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from sago.rules.language import sqrt, where

Helpers = tuple[tuple[FunctionType, str, FunctionType], ...]

# The syntax that has the same meaning on tensors and on Triton scalars.
_PLAIN = (
    *(ast.arguments, ast.arg, ast.Expr, ast.Assign, ast.Return, ast.Tuple, ast.Call),
    *(ast.Name, ast.Load, ast.Store, ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div),
    *(ast.UnaryOp, ast.USub, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq),
)


def check_gate(gate: Any) -> None:
    """Raises ValueError for a gate that cannot be compiled into the kernels with the same results."""
    found = fault(gate, exact=True)
    if found is not None:
        raise ValueError(
            "Parameter `gate` should be a function from a file, without annotations, default values and "
            "variables of an outer function or of the module, that uses only + - *, comparisons and the "
            "functions of sago.rules except ratio and sqrt. It sees one pair of elements at a time, and "
            f"kernels do not round division and roots correctly in fp32. Found {found}."
        )


def fault(function: Any, exact: bool = False) -> str | None:
    """The reason why a function cannot be compiled into a kernel. None if it can be compiled.

    A function that reads a global number is not compiled, because the kernel would keep its first value.

    Args:
        function: The function of a rule, or what it calls.
        exact: Whether division and roots are excluded, too.
    """
    name = f"`{getattr(function, '__qualname__', function)}`"
    if not isinstance(function, FunctionType):
        return f"{name}, which is not a plain function"
    if function.__closure__:
        return f"{name}, which reads variables of an outer function"
    if function.__defaults__ or function.__kwdefaults__ or function.__annotations__:
        return f"{name}, which has default values or annotations"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (OSError, SyntaxError):
        return f"{name}, whose source cannot be read"
    definition = tree.body[0]
    if not (
        len(tree.body) == 1
        and isinstance(definition, ast.FunctionDef)
        and definition.name == function.__name__
        and not definition.decorator_list
    ):
        return f"{name}, which is not a plain `def` of its own"
    for node in (node for child in ast.iter_child_nodes(definition) for node in ast.walk(child)):
        if not isinstance(node, _PLAIN) or (exact and isinstance(node, ast.Div)):
            return f"{name}, which uses {_told(node)}"
    for called in function.__code__.co_names:
        other = function.__globals__.get(called)
        if other is where or (other is sqrt and not exact):
            continue
        if other is sqrt or not isinstance(other, FunctionType):
            return f"{name}, which uses `{called}`"
        inner = fault(other, exact)
        if inner is not None:
            return inner
    return None


def helpers(function: Any) -> Helpers:
    """The functions that a function calls by global names, directly or not: (caller, name, function).

    Those that functions of this package call are left out. Functions that are read as attributes of modules
    or objects are not found.
    """
    found: dict[FunctionType, list[tuple[FunctionType, str, FunctionType]]] = {}
    waiting = [function]
    while waiting:
        caller = waiting.pop()
        if isinstance(caller, FunctionType) and caller not in found:
            named = ((name, caller.__globals__.get(name)) for name in _globals_of(caller.__code__))
            found[caller] = [(caller, name, f) for name, f in named if isinstance(f, FunctionType)]
            waiting += [f for _, _, f in found[caller]]
    return tuple(x for calls in found.values() for x in calls if not is_ours(x[0]))


_known = lru_cache(maxsize=256)(helpers)


def current_helpers(function: Any) -> Helpers:
    """`helpers`, which are looked for again only if one of them was replaced."""
    used = _known(function)
    return used if replaced(used) is None else helpers(function)


def _globals_of(code: CodeType) -> list[str]:
    """The global names that a function reads, also in the functions inside it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return sorted(names.union(*map(_globals_of, inner)))


def is_ours(function: Any) -> bool:
    """Whether this package defines the function, so that its result depends on nothing but its arguments."""
    return isinstance(function, FunctionType) and f"{function.__module__ or ''}.".startswith(
        f"{__package__}."
    )


def replaced(found: Helpers) -> str | None:
    """The name of a function that has another value since `helpers` found it. None if there is none."""
    for caller, name, function in found:
        if caller.__globals__.get(name) is not function:
            return name
    return None


def _told(node: ast.AST) -> str:
    """The code of an expression, or the kind of another part of a function."""
    if isinstance(node, ast.Div):
        return "division"
    return f"`{ast.unparse(node)}`" if isinstance(node, ast.expr) else type(node).__name__
