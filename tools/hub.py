"""Writes the Triton kernels in the layout of the Hugging Face hub (docs/hub.md).

    python tools/hub.py FOLDER

The folder is a project for `kernel-builder`: build.toml, and the source in torch-ext/. It also has the
variants in build/ that `kernel-builder` makes of such a source, so that `kernels` can load them.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "sago-kernels"
BACKENDS = ("cuda", "rocm")
VERSION = 0  # By convention, 0 is the version of kernels whose interface may still change.
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search('^Repository = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
# The kernels, and the modules of the library that they import.
FILES = {
    **{path.name: path for path in sorted((ROOT / "kernels/triton").glob("*.py"))},
    **{f"rules/{path.name}": path for path in sorted((ROOT / "sago/rules").glob("*.py"))},
    **{
        f"backends/{name}.py": ROOT / f"sago/backends/{name}.py" for name in ("__init__", "streams", "upload")
    },
}
BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "MIT"
upstream = "{REPOSITORY}.git"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "sago-kernels/{NAME}"

[torch-noarch]
"""


def relative(name, text):
    """The text of a module with relative imports only: the hub imports kernels under names of its own."""
    dots = "." * (name.count("/") + 1)
    text = re.sub(r"^from sago\.", f"from {dots}", text, flags=re.M)
    text = re.sub(r"^from sago import", f"from {dots} import", text, flags=re.M)
    if name == "__init__.py":  # `combine` takes a rule
        text = text.replace("__all__ = [", 'from . import rules\n\n__all__ = ["rules", ')
    return text


def digest(folder):
    """The SHA-256 of each file, as metadata.json has it."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*.py"))
    }


def main(folder):
    build = folder / "build.toml"
    if folder.exists() and any(folder.iterdir()):
        if not (build.exists() and f'name = "{NAME}"' in build.read_text(encoding="utf-8")):
            raise SystemExit(
                f"The folder {folder} should be empty, missing or an earlier build. Found other files."
            )
        shutil.rmtree(folder)
    source = folder / "torch-ext" / NAME.replace("-", "_")
    for name, path in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(relative(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "build.toml").write_text(BUILD)
    shutil.copy(ROOT / "LICENSE", folder)
    files = digest(source)
    # The id is the name of the module, which has to be another one for each build.
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
    for backend in BACKENDS:
        variant = shutil.copytree(source, folder / "build" / f"torch-{backend}")
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": VERSION,
            "license": "MIT",
            "upstream": f"{REPOSITORY}.git",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(f"{folder}: {len(files)} modules, variants {', '.join(BACKENDS)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
