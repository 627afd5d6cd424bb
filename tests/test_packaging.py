"""The distribution: its name, and import names that belong to other projects."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sago.__main__

ROOT = Path(__file__).parent.parent
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # `import triton` is an ImportError then


def python(program, path, *options):
    """Runs a program in a new process, with `path` first on `sys.path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, *options, *(["-c", program] if program else [])]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


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
