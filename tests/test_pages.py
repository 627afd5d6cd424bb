"""The pages of the documentation: links, navigation, public names and quoted messages. Needs no Sphinx."""

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import urlsplit

import pytest

import sago
import sago.rules

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)\)")
# What is public besides `sago.__all__`.
MODULES = {
    "sago.testing": ["check_rule"],
    "sago.rules": sago.rules.__all__,
    "sago.distributed": ["SumOver"],
    "sago.monitor": ["ConflictMonitor"],
}
INTEGRATIONS = {
    "sago.integrations.transformers": ["GradientSynthesisMixin", "Synthesis"],
    "sago.integrations.callbacks": ["MonitorCallback", "ReportWriter"],
    "sago.integrations.torchjd": ["SynthesisAggregator", "SynthesisWeighting"],
}


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def prose(path):
    """The text without blocks of code, and with files that it includes."""
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE):
        text += prose((path.parent / file).resolve())
    return FENCE.sub("", text)


@cache
def anchors(path):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(other == anchor or other.startswith(f"{anchor}-") for other in found)
        found.append(anchor if anchor not in found else f"{anchor}-{count}")
    return found


def links(path):
    """The targets of all links, without those in code."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text, flags=re.DOTALL)
    found = [match["target"] for match in LINK.finditer(text)]
    assert len(found) == text.count("]("), "a link should have a target without spaces and brackets"
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links(path):
    for target in links(path):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme in ("http", "https"), target
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", url.netloc), target
            continue
        file = (path.parent / url.path).resolve() if url.path else path
        assert file.exists(), f"{target}: no such file"
        assert ROOT in file.parents, f"{target}: outside of the repository"
        if url.fragment:
            assert url.fragment in anchors(file), f"{target}: no such heading, only {anchors(file)}"


def test_every_page_is_in_the_navigation():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert len(listed) == len(set(listed))
    assert {f"docs/{name}.md" for name in [*listed, "index"]} == set(map(name_of, PAGES))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lines_are_short(path):
    tables = re.compile(r"^\s*\|")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 120 or tables.match(line), f"line {number} has {len(line)} characters"


@cache
def documented():
    """The full names that the API pages describe."""
    found = set()
    for path in (DOCS / "api").glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (currentmodule|automodule|autofunction|autoclass|class|data):: (\S+)",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            if directive in ("currentmodule", "automodule"):
                module = name
            name = name.removesuffix("()")
            found.add(name if name == module else f"{module}.{name}")
    return found


@pytest.mark.parametrize("module", ["sago", *MODULES, *INTEGRATIONS])
def test_every_public_name_is_in_the_api(module):
    names = sago.__all__ if module == "sago" else {**MODULES, **INTEGRATIONS}[module]
    for name in names:
        elsewhere = f"sago.{name}" if module == "sago.rules" else None  # Rule and list_rules
        assert documented() & {f"{module}.{name}", elsewhere}, name


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_documented_name_exists(name):
    for module in INTEGRATIONS:
        if name.startswith(module):
            pytest.importorskip(module, reason=f"{module} needs a package that is not installed")
    resolve_name(name)


def test_every_option_of_the_buckets_is_described():
    doc = sago.GradientBuckets.__doc__
    for name in inspect.signature(sago.GradientBuckets).parameters:
        assert f"\n        {name}: " in doc


@cache
def messages():
    """All texts in the code of the library, with `…` for the values in them."""
    found = []
    for path in (ROOT / "sago").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_on_the_page_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(quoted) > 20
    plain = [" ".join(message.split()) for message in quoted]
    assert [text for text in plain if not any(text in found for found in messages())] == []
