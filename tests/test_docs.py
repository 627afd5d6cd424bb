"""Every Python block of README.md and docs/: those of a file in order, in one namespace, in a new folder.

A block that needs a GPU, several ranks or another repository has `<!-- not run: why -->` in front of it. It
has to be Python all the same, and is listed as skipped, with the reason.
"""

import linecache
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [
    # Raised inside of torch when torch.compile is first used, and in peft.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"docs/distributed.md": "tests/test_distributed_doc.py"}  # where a page has a test of its own
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"^(?:(?P<marker> *<!-- not run:(?P<reason>.*?)-->) *\n\s*)?"
    r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block, the line of its file where the code starts, and why it is not run; None if it is."""

    file: str
    line: int
    code: str
    reason: str | None

    def compiled(self):
        return compile("\n" * (self.line - 1) + self.code, self.file, "exec")


def blocks_of(text, file):
    return [
        Block(
            file,
            1 + text.count("\n", 0, match.start("code")),
            textwrap.dedent(match["code"]),
            None if match["marker"] is None else match["reason"].strip(),
        )
        for match in BLOCK.finditer(text)
    ]


BLOCKS = {path: blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))) for path in FILES}
WITH_CODE = [
    path
    for path in FILES
    if str(path.relative_to(ROOT)) not in ELSEWHERE and any(block.reason is None for block in BLOCKS[path])
]
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.reason is not None]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    # Gates are compiled from their source, which is looked up by the name of the file.
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(True), name))
    for block in BLOCKS[path]:
        if block.reason is None:
            exec(block.compiled(), namespace)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block.file}:{block.line}")
def test_a_block_is_not_run_for_a_reason(block):
    assert block.reason, "a marker should say why: <!-- not run: why -->"
    block.compiled()
    pytest.skip(f"block not run: {block.reason}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_block_and_no_marker_is_missed(path):
    text = path.read_text(encoding="utf-8")
    assert len(BLOCKS[path]) == len(re.findall(r"^ *```(?:python|py)\b", text, re.MULTILINE))
    assert sum(block.reason is not None for block in BLOCKS[path]) == text.count("<!-- not run")


@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_with_a_test_of_its_own(page):
    test = (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
    assert page in test
    assert "exec(" in test


def test_the_readme_has_blocks_that_run():
    assert len([block for block in BLOCKS[ROOT / "README.md"] if block.reason is None]) >= 2


def test_how_blocks_are_found():
    text = textwrap.dedent("""\
        ```python
        x = 1
        ```
        - in a list
          <!-- not run: needs a GPU -->

          ```python
          if x:
              y = 2
          ```
        <!-- not run:-->
        ```python
        z = 3
        ```
        ```diff
        -x
        ```
    """)
    assert blocks_of(text, "f") == [
        Block("f", 2, "x = 1\n", None),
        Block("f", 8, "if x:\n    y = 2\n", "needs a GPU"),
        Block("f", 13, "z = 3\n", ""),
    ]
