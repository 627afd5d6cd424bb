"""Docstrings as reStructuredText.

The docstrings are plain text, in which single backticks and indented blocks are code.
"""

import re

from docutils import nodes
from sphinx import addnodes

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):$")
_NAME = re.compile(r"^[A-Za-z_][\w.]*(\(\))?$")


def with_literal_blocks(lines: list[str]) -> list[str]:
    """The docstring with indented blocks outside of sections marked as literal blocks."""
    found: list[str] = []
    section = False
    for i, line in enumerate(lines):
        blank_before = i > 0 and not lines[i - 1].strip()
        if line.strip() and not line.startswith(" "):
            section = bool(_SECTION.match(line))
        inside = bool(found) and _is_block(found)
        if line.startswith("    ") and not section and blank_before and not inside:
            found += ["::", ""]
        found.append(line)
    return found


def _is_block(lines: list[str]) -> bool:
    """Whether the last line that is not blank is indented, so that a blank line does not end the block."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith("    ")


def _process(app, what, name, obj, options, lines):
    lines[:] = with_literal_blocks(lines)


def _code(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role of single backticks: code, which is a link if it is the name of something on the site."""
    literal = nodes.literal(rawtext, text, classes=["code"])
    if not _NAME.match(text):
        return [literal], []
    env = inliner.document.settings.env
    link = addnodes.pending_xref(
        rawtext,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=text.removesuffix("()"),
        refspecific=False,
        refwarn=False,
    )
    link["refdoc"] = env.docname
    link.update_basic_atts({})
    link["py:module"], link["py:class"] = env.ref_context.get("py:module"), env.ref_context.get("py:class")
    return [link], []


def _unresolved(app, env, node, contnode):
    """A name in backticks that is not on the site is code and not a broken link."""
    return contnode if node.get("refwarn") is False and node.get("reftype") == "obj" else None


def setup(app):
    app.add_role("text-code", _code)
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    app.connect("missing-reference", _unresolved)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
