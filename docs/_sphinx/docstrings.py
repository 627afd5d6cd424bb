"""Docstrings as reStructuredText.

The docstrings are plain text, in which single backticks and indented blocks are code.
"""

import ast
import re
from itertools import takewhile
from pkgutil import resolve_name
from textwrap import dedent

from docutils import nodes
from sphinx import addnodes

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):$")
_NAME = re.compile(r"^[A-Za-z_][\w.]*(\(\))?$")


def with_code_blocks(lines: list[str]) -> list[str]:
    """The docstring with indented blocks outside of sections marked as code."""
    found: list[str] = []
    section = False
    for i, line in enumerate(lines):
        blank_before = i > 0 and not lines[i - 1].strip()
        if line.strip() and not line.startswith(" "):
            section = bool(_SECTION.match(line))
        inside = bool(found) and _is_block(found)
        if line.startswith("    ") and not section and blank_before and not inside:
            found += [f".. code-block:: {_language(lines[i:])}", ""]
        found.append(line)
    return found


def _language(lines: list[str]) -> str:
    """Whether the block at the beginning of these lines is Python, or a formula or table."""
    rest = takewhile(lambda line: not line.strip() or line.startswith("    "), lines)
    try:
        ast.parse(dedent("\n".join(rest)))
    except SyntaxError:
        return "text"
    return "python"


def _is_block(lines: list[str]) -> bool:
    """Whether the last line that is not blank is indented, so that a blank line does not end the block."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith("    ")


def _process(app, what, name, obj, options, lines):
    lines[:] = with_code_blocks(lines)


def _code(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role of single backticks: code, which is a link if it is the name of something on the site."""
    literal = nodes.literal(rawtext, text, classes=["code"])
    if not _NAME.match(text):
        return [literal], []
    env = inliner.document.settings.env
    module, owner = env.ref_context.get("py:module"), env.ref_context.get("py:class")
    target = text.removesuffix("()")
    if owner is not None and hasattr(resolve_name(f"{module}.{owner}"), target):
        target = f"{module}.{owner}.{target}"  # a method is meant, and not a function of the same name
    link = addnodes.pending_xref(
        rawtext,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=target,
        refwarn=False,
    )
    link["refdoc"] = env.docname
    link["py:module"], link["py:class"] = module, owner
    return [link], []


def _unresolved(app, env, node, contnode):
    """A name in backticks that is not on the site is code and not a broken link."""
    return contnode if node.get("refwarn") is False and node.get("reftype") == "obj" else None


def setup(app):
    app.add_role("text-code", _code)
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    app.connect("missing-reference", _unresolved)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
