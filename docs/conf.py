"""The site of the documentation: `make docs` builds it without a network into build/docs."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_sphinx"))

from sago import __version__  # noqa: E402 - Sphinx runs this file from another folder

project = "sago"
author = "The sago authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "formulas",
    "links",
]
root_doc = "index"
exclude_patterns = ["_sphinx"]
source_suffix = {".md": "markdown"}

# Markdown
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub renders these fences, too
myst_heading_anchors = 4  # the anchors of GitHub

highlight_language = "none"  # of blocks without a language, which are tables and commands

# References
nitpicky = True
# Types of other libraries, whose pages are not at hand without a network, and type aliases of this one.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|torchjd|collections|contextlib|typing|pathlib|abc)\..*"),
    ("py:class", "Tensor|ProcessGroup|DeviceMesh|Term|Path|Figure"),
]

# Docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
add_module_names = False
default_role = "text-code"  # see _sphinx/docstrings.py
napoleon_numpy_docstring = False
napoleon_use_param = False  # a name of several parameters is not a type and a name
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # not "Variables"

# HTML
html_theme = "furo"
html_title = f"sago {release}"
html_static_path = ["_sphinx/static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it loads pages by script, which browsers refuse for local files
html_theme_options = {
    "light_css_variables": {"font-stack--monospace": "ui-monospace, Menlo, Consolas, monospace"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = ">>> "
