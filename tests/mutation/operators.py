"""The changes that are made to the library: those of cosmic-ray that a test can be expected to notice."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

_NAMES = (
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("NumberReplacer", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("ExceptionReplacer", "RemoveDecorator", "ReplaceUnaryOperator_Delete_Not"),
    *(
        f"ReplaceComparisonOperator_{pair}"
        for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")
    ),
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div"),
    *("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul"),
    *("ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceBinaryOperator_BitOr_BitAnd"),
)


_KEPT = ("string", "strings", "import_name", "import_from", "global_stmt", "nonlocal_stmt")


class DeleteStatement(Operator):
    """Replaces a statement by `pass`, except for docstrings, imports and declarations."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt":
            return
        first = node.children[0]
        code = first.get_code(include_prefix=False)
        declares = first.type == "expr_stmt" and "=" not in code
        if first.type not in _KEPT and not declares and code not in ("pass", "..."):
            yield first.start_pos, first.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[0] = parso.parse(node.children[0].get_first_leaf().prefix + "pass")
        return node

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return ()


class Change(NamedTuple):
    """One change: the n-th place of an operator in a file, its line, and a hash of the file."""

    path: str
    line: int
    operator: str
    occurrence: int
    source: str


def _operator(name: str) -> Any:
    return DeleteStatement() if name == DeleteStatement.__name__ else get_operator(f"core/{name}")()


def changes(path: str, source: str) -> Iterator[Change]:
    """All changes of a file, except in annotations, and of `strict=` where both lengths are always equal."""
    nodes, skipped = list(ast_nodes(get_ast(source))), list(_skipped(source))
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    for name in (*_NAMES, DeleteStatement.__name__):
        operator = _operator(name)
        positions = (position for node in nodes for position in operator.mutation_positions(node))
        for k, (start, _) in enumerate(positions):
            if not any(first <= start < last for first, last in skipped):
                yield Change(path, start[0], name, k, digest)


def apply(change: Change, source: str) -> str:
    found: str | None = mutate_code(source, _operator(change.operator), change.occurrence)
    assert found is not None
    ast.parse(found)
    return found


def _skipped(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(ast.parse(source)):
        found = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
        for x in found:
            if x is not None:
                yield (x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)
