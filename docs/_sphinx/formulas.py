"""Formulas as MathML, which browsers draw without a script and without a network.

docutils, on which Sphinx is built, converts TeX to MathML. A command that it does not know is a warning. The
font has the tables that a browser needs for large braces and roots.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_log = logging.getLogger(__name__)
_FENCE = re.compile(r"<mo( class=\"\w+\")?>([⟨⟩‖])</mo>")


def fonts() -> str:
    """The folder with STIX Two Math, which the package `ziamath` contains."""
    return str(Path(find_spec("ziamath").origin).parent / "fonts")


def mathml(code: str, as_block: bool) -> str:
    """The formula as MathML. As in TeX, brackets grow only after `\\left` and `\\right`."""
    found = tex2mathml(code.strip(), as_block=as_block)
    return found if r"\left" in code else _FENCE.sub(r'<mo\1 stretchy="false">\2</mo>', found)


def _write(writer, node, as_block):
    try:
        found = mathml(node.astext(), as_block)
    except MathError as error:
        _log.warning("a formula cannot be converted: %s", error, location=node)
        found = writer.encode(node.astext())
    writer.body.append(f'<div class="math">{found}</div>\n' if as_block else found)
    raise nodes.SkipNode


def setup(app):
    app.config.html_static_path.append(fonts())
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _write(writer, node, False), None),
        block_renderers=(lambda writer, node: _write(writer, node, True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
