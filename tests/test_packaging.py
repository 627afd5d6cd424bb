"""The distribution: its metadata, its name, and import names that belong to other projects."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import sago.__main__

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search('^Repository = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
SITE = re.sub(r"https://github\.com/([\w-]+)/([\w-]+)", r"https://\1.github.io/\2/", REPOSITORY)
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # `import triton` is an ImportError then


def python(program, path, *options):
    """Runs a program in a new process, with `path` first on `sys.path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, *options, *(["-c", program] if program else [])]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The metadata as the build writes it into a wheel."""
    folder = tmp_path_factory.mktemp("metadata")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "sago").mkdir()
    (folder / "kernels/triton").mkdir(parents=True)
    shutil.copy(ROOT / "sago/__init__.py", folder / "sago")
    hook = "from setuptools.build_meta import prepare_metadata_for_build_wheel as hook; hook('out')"
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", hook], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (folder / "out").glob("*.dist-info/METADATA")
    return BytesParser().parsebytes(file.read_bytes())


def test_the_metadata_of_the_package_index(built):
    assert (built["Name"], built["Version"]) == ("sago-kernels", sago.__version__)
    assert built["Author"] == "The sago authors"
    assert built["License-Expression"] == "MIT"
    assert built["Description-Content-Type"] == "text/markdown"
    assert set(built["Keywords"].split(",")) >= {"machine unlearning", "PCGrad", "SAGO"}
    assert {"Typing :: Typed", "Development Status :: 3 - Alpha"} <= set(built.get_all("Classifier"))
    # pip 23.0, which Python 3.11 brings, installs nothing for an extra with an underscore.
    assert [one for one in built.get_all("Requires-Dist") if re.search(r"\[[\w-]*_", one)] == []
    urls = dict(url.split(", ") for url in built.get_all("Project-URL"))
    assert urls.keys() == {"Repository", "Documentation", "Changelog", "Issues", "Paper"}
    assert urls.pop("Paper") == "https://arxiv.org/abs/2604.14808"
    assert urls.pop("Documentation") == SITE
    assert all(url.startswith(REPOSITORY) for url in urls.values())


def test_links_in_the_description_are_absolute_and_lead_to_files(built):
    description = built.get_payload(decode=True).decode()
    links = re.findall(r'\]\(([^)]*)\)|(?:href|src|srcset)="([^"]*)"', without_code(description))
    links = [markdown or html for markdown, html in links]
    assert len(links) >= 10
    assert [link for link in links if not link.startswith("https://")] == []
    prefixes = tuple(f"{REPOSITORY}/{view}/v{sago.__version__}/" for view in ("blob", "raw"))
    of_files = [link.removeprefix(prefix) for link in links for prefix in prefixes if link.startswith(prefix)]
    assert "docs/rules.md" in of_files
    assert [path for path in of_files if not (ROOT / path.partition("#")[0]).exists()] == []


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/x.md#y)", "[a](URL/blob/vN/docs/x.md#y)"),
        ("[`a[0](b)`](docs/x.md)", "[`a[0](b)`](URL/blob/vN/docs/x.md)"),
        ("![p](docs/images/p.png)", "![p](URL/raw/vN/docs/images/p.png)"),
        ("[![p](p.svg)](docs/x.md)", "[![p](URL/raw/vN/p.svg)](URL/blob/vN/docs/x.md)"),
        (
            '<source srcset="p.png"><img src="q.png">',
            '<source srcset="URL/raw/vN/p.png"><img src="URL/raw/vN/q.png">',
        ),
        ("[up](#install)", "[up](URL/blob/vN/README.md#install)"),
        ("[a](https://arxiv.org)", "[a](https://arxiv.org)"),
        ("```python\nkernel[grid](x)\n```", "```python\nkernel[grid](x)\n```"),
        ("`kernel[grid](x)`", "`kernel[grid](x)`"),
    ],
)
def test_how_links_are_made_absolute(text, expected, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    found = setup["LINK"].sub(setup["absolute"], text)
    assert found.replace(REPOSITORY, "URL").replace(sago.__version__, "N") == expected


def test_all_files_name_the_same_repository_and_its_site():
    """Both addresses are planned (CONTRIBUTING.md, "Release"). This test names the places to change."""
    folders = ("", ".github", ".github/ISSUE_TEMPLATE", ".github/workflows", "docs", "sago", "tools")
    files = [file for folder in folders for file in (ROOT / folder).glob("*.*") if file.is_file()]
    found = {
        (file.relative_to(ROOT).as_posix(), address)
        for file in files
        if file.suffix in {".md", ".yml", ".cff", ".toml", ".py"}
        for address in re.findall(
            r"https://github\.com/[\w-]+/sago[\w-]*|https://[\w-]+\.github\.io/[\w-]*/?",
            file.read_text(encoding="utf-8"),
        )
    }
    assert {"pyproject.toml", "CITATION.cff", "SECURITY.md", "README.md"} <= {file for file, _ in found}
    assert {"pyproject.toml", "README.md"} <= {file for file, address in found if address == SITE}
    assert [(file, address) for file, address in found if address not in (REPOSITORY, SITE)] == []


def test_the_citation_file():
    """The fields that the Citation File Format 1.2.0 requires, and those that another file has, too."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["authors"] == [{"name": "The sago authors"}]
    assert str(citation["version"]) == sago.__version__
    assert citation["license"] == "MIT"
    assert citation["repository-code"] == REPOSITORY
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper"
    assert paper["url"] == "https://aclanthology.org/2026.acl-long.890/"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"version = {{{sago.__version__}}}" in readme
    assert citation["title"] in readme.replace("{LLM}", "LLM")
    assert paper["title"] in readme.replace("{LLM}", "LLM")
    assert len(paper["authors"]) == 7
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in " ".join(readme.split())


def test_the_changelog_has_the_version_or_unreleased_changes():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"\[(Unreleased|\d+\.\d+\.\d+)\]( - \d{4}-\d\d-\d\d)?", one) for one in headings)
    assert headings[0] == "[Unreleased]" or headings[0].startswith(f"[{sago.__version__}] - ")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
    for heading in headings:
        assert f"\n[{heading.partition('[')[2].partition(']')[0]}]: {REPOSITORY}/" in text


def test_a_release_leaves_no_sentence_about_its_absence():
    """CONTRIBUTING.md lists these sentences ("Release"). There is a release if a section has a date."""
    row = re.compile(r"^ *\| `([\w./]+\.md)` \| (.*) \|$", re.MULTILINE)
    listed = row.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    texts = {
        file.relative_to(ROOT).as_posix(): " ".join(row.sub("", file.read_text(encoding="utf-8")).split())
        for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    }
    released = re.search(r"## \[[\d.]+\] - \d", texts["CHANGELOG.md"])
    assert [(file, text) for file, text in listed if text in texts[file]] == ([] if released else listed)
    for file, sentence in listed:
        texts[file] = texts[file].replace(sentence, "")
    marks = r"package index yet|public yet|(?:distribution|version) is published|planned"
    assert [(file, mark) for file, text in texts.items() for mark in re.findall(marks, text)] == []


def test_the_page_says_which_python_the_extra_docs_needs():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    oldest = re.search(r'^sphinx==.*; python_version >= "(.*)"$', constraints, re.MULTILINE)[1]
    install = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `docs` \|.*$", install, re.MULTILINE)
    assert f"Python {oldest} or newer" in row


def test_the_public_names_exist():
    page = (ROOT / "docs/api-stability.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    names = re.findall(r"`(sago[\w.]+)`", "\n".join(table))
    assert len(names) >= 10
    for name in names:
        path = re.sub(r"\.(\w+)$", r":\1", name)
        if name.startswith("sago.integrations.torchjd"):
            pytest.importorskip("torchjd", reason="needs TorchJD")
        assert resolve_name(path) is not None


def test_the_folder_of_the_kernels_is_not_a_package_of_that_name():
    """A `kernels` with an __init__.py or a version would be taken for the Hugging Face distribution."""
    found = python(
        WITHOUT_TRITON + "import kernels\n"
        "assert getattr(kernels, '__file__', None) is None and not hasattr(kernels, '__version__')",
        ROOT,
    )
    assert found.returncode == 0, found.stderr


def test_transformers_imports_from_the_root_of_the_repository_without_triton():
    pytest.importorskip("transformers", reason="needs transformers")
    found = python(
        WITHOUT_TRITON
        + "from transformers import LlamaForCausalLM\nimport sago\nprint(LlamaForCausalLM.__name__)",
        ROOT,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "LlamaForCausalLM\n"


def test_the_distribution_is_named_sago_kernels_everywhere():
    assert metadata.version("sago-kernels") == sago.__version__
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    for file in texts:
        for line in file.read_text(encoding="utf-8").splitlines():
            for wrong in ("install sago ", "install 'sago", "sago[", 'name = "sago"'):
                assert wrong not in f"{line} ".replace("sago-kernels", ""), f"{file.name}: {line}"


def test_python_m_sago_names_the_distribution():
    found = python(None, ROOT, "-m", "sago")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("sago-kernels")


def test_python_m_sago_lists_installed_integrations(tmp_path):
    distribution(tmp_path, "peft", "9.8")
    distribution(tmp_path, "matplotlib", "7.6")
    found = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sago.__main__ import main; main()", ROOT
    )
    listed = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert (listed["peft"], listed["matplotlib"]) == ("9.8", "7.6")


def distribution(folder, name, version):
    """Metadata as pip leaves it of an installed distribution."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_python_m_sago_notices_the_other_distribution(tmp_path):
    distribution(tmp_path, "sago", "9.9")
    found = python(None, tmp_path, "-m", "sago")
    assert found.returncode == 1
    assert found.stdout.startswith("sago-kernels")
    assert "The distribution `sago` 9.9 is installed as well" in found.stderr
    assert "pip install sago-kernels" in found.stderr


def test_python_m_sago_notices_that_another_sago_is_imported(tmp_path):
    """Both distributions write to one folder: ours left __main__.py, the other one its __init__.py."""
    distribution(tmp_path, "sago", "9.9")
    (tmp_path / "sago").mkdir()
    (tmp_path / "sago/__init__.py").write_text("")
    (tmp_path / "sago/__main__.py").write_text(Path(sago.__main__.__file__).read_text(encoding="utf-8"))
    found = python(
        f"import runpy; sys_path_0 = {str(tmp_path)!r}; import sys; sys.path[0] = sys_path_0; "
        "runpy.run_module('sago', run_name='__main__')",
        tmp_path,
    )
    assert found.returncode == 1
    assert found.stdout == ""
    assert "is not part of sago-kernels" in found.stderr
