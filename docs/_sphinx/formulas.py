"""Formulas as MathML, which browsers render without a script and without a network.

docutils, on which Sphinx is built, converts TeX to MathML. A command that it does not know is a warning.
"""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_log = logging.getLogger(__name__)


def _visit(writer, node, as_block):
    code = node.astext().strip()
    if as_block and ("\\\\" in code or "&" in code) and "\\begin" not in code:
        code = rf"\begin{{aligned}}{code}\end{{aligned}}"
    try:
        found = tex2mathml(code, as_block=as_block)
    except MathError as error:
        _log.warning("a formula cannot be converted: %s", error, location=node)
        found = writer.encode(code)
    writer.body.append(f'<div class="math">{found}</div>\n' if as_block else found)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _visit(writer, node, False), None),
        block_renderers=(lambda writer, node: _visit(writer, node, True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
