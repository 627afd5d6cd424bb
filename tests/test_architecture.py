"""The packages import each other in one direction only, which is read from their code."""

import ast
import re
from pathlib import Path

import pytest

import sago

ROOT = Path(sago.__file__).parents[1]
# What each package may import. A package that is named in a table of strings is imported when it is used.
MAY_IMPORT = {
    "private": set(),
    "rules": set(),
    "backends": {"rules"},
    "kernels": {"backends", "rules"},
    "core": {"backends", "rules"},
    "ranks": {"private", "backends"},
    "synthesis": {"ranks", "core", "backends", "rules"},
    "capture": {"ranks", "core", "backends", "rules"},
    "integrations": {"private", "capture", "synthesis", "ranks", "core", "backends", "rules"},
    "reference": {"core", "backends", "rules"},
    "distributed": {"ranks"},
}
NAMED = {
    ("backends", "kernels"),  # sago.backends.choose.MODULES
    ("capture", "integrations"),  # sago.capture.opening.ENGINES
}


def sources():
    """The package and the text of every file of the library."""
    for folder, prefix in ((ROOT / "sago", ()), (ROOT / "kernels" / "triton", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield parts[0], path.read_text(encoding="utf-8")


def imported(package, text):
    """The other packages of sago that a file of this package imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module
            names = [f"sago.{a.name}" for a in node.names] if module == "sago" else [module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sago.")}
    return found - {package}


def named(package, text):
    """The other packages that a string constant names as a module."""
    constants = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
    modules = (v for v in constants if isinstance(v, str) and re.fullmatch(r"sago(\.\w+)+", v))
    return {v.split(".")[1] for v in modules} - {package}


def against(package, text):
    """The imports of a file that go against the direction."""
    return imported(package, text) - MAY_IMPORT[package]


LIBRARY = [(package, text) for package, text in sources() if package not in ("__init__", "__main__")]


def test_every_package_has_its_place():
    assert {package for package, _ in LIBRARY} == set(MAY_IMPORT)


def test_imports_go_in_one_direction():
    assert [(package, wrong) for package, text in LIBRARY if (wrong := against(package, text))] == []


def test_no_arrow_leads_back():
    """The table itself has no cycle."""
    order = []
    while len(order) < len(MAY_IMPORT):
        free = [p for p, others in MAY_IMPORT.items() if p not in order and others <= set(order)]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


def test_modules_that_are_named_by_strings_are_known():
    found = {(package, other) for package, text in LIBRARY for other in named(package, text)}
    assert found == NAMED


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("rules", "from sago.core.pairs import Call"),
        ("core", "import sago.capture.buckets"),
        ("core", "def f():\n    from sago import ranks"),
        ("capture", "from sago.integrations import deepspeed"),
        ("kernels", "from sago.core.pipeline import Pipeline"),
    ],
)
def test_an_arrow_against_the_direction_is_seen(package, text):
    assert against(package, text)
