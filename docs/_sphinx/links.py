"""Links that work on GitHub as well: files outside of docs/ that are pages of the site become those pages.

README.md is a part of the front page, CONTRIBUTING.md and CHANGELOG.md are pages of their own. The links
in their text are relative to the root of the repository. Links to other files become downloads. A link whose
text is the name of a file gets the title of the page as its text.
"""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_NAMED = re.compile(r"\[(?:[\w-]+/)*[\w-]+\.md\](?=\()")  # the text of the link is the name of the file
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def relocated(text: str, source: Path, page: Path) -> str:
    """The text of the file `source` with the links that it needs as a part of the file `page`."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match["path"]))
        if target.parent == ROOT and target.name in PAGES:
            target = ROOT / "docs" / PAGES[target.name]
        found = PurePosixPath(os.path.relpath(target, page.parent))
        return f"{found}{match['anchor'] or ''}"

    return _NAMED.sub("[]", _LINK.sub(link, text))


def _read(app, docname, content):
    path = Path(app.env.doc2path(docname))
    content[0] = relocated(content[0], path, path)


def _include(app, path, docname, content):
    source = Path(os.path.normpath(app.srcdir / path))
    content[0] = relocated(content[0], source, Path(app.env.doc2path(docname)))


def setup(app):
    app.connect("source-read", _read)
    app.connect("include-read", _include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
