"""Checks the files in dist/ as a user and a packager use them: `make dist`.

    python tools/check_dist.py TEST ...

The wheel and the sdist are installed into a new environment each, in which `example.py` runs outside of the
clone. The environment of the sdist then runs the given tests in the unpacked sdist.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from readme_renderer import markdown

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tools/example.py"
# mypy reports the comment as unused if it does not find the types of the library.
WRONG = "\nsago.synthesize_(1, retain)  # type: ignore[arg-type]\n"


def run(folder, *command, **variables):
    """Runs a command in a folder outside of the clone."""
    print("$", *command, flush=True)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, env={**inherited, **variables}, check=True)


def require_equal(found, expected, what):
    if found != expected:
        sys.exit(f"{what}: unexpected {sorted(found - expected)}, missing {sorted(expected - found)}")


def check_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sago").rglob("*.py")}
    kernels = {f"sago/kernels/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")}
    require_equal(names, library | kernels | {"sago/py.typed"}, wheel.name)


def check_sdist(sdist):
    with tarfile.open(sdist) as files:
        names = {member.name.partition("/")[2] for member in files if member.isfile()}
    names = {name for name in names - {"PKG-INFO", "setup.cfg"} if ".egg-info/" not in name}
    if not (ROOT / ".git").exists():
        print("This is not a clone: the files of the sdist are not compared with those of git.")
        return
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    require_equal(names, set(tracked.splitlines()), sdist.name)


def check_description(wheel):
    """Every link and every picture of the rendered description is absolute."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode().partition("\n\n")[2]
    links = re.findall(r'(?:href|src|srcset)="([^"]*)"', markdown.render(text))
    # The renderer gives each heading a link to itself.
    relative = [link for link in links if not link.startswith(("https://", "#user-content-"))]
    if relative or len(links) < 10:
        sys.exit(f"{wheel.name}: {len(links)} links in the description, of which relative: {relative}")
    print(f"The description has {len(links)} links, and all are absolute.")


def environment(name, requirement):
    """The Python of a new environment with the distribution."""
    folder = ROOT / ".venv-dist" / name
    run(ROOT, sys.executable, "-m", "venv", "--clear", str(folder))
    python = str(folder / "bin/python")
    install(python, requirement)
    return python


def install(python, *requirements):
    run(ROOT, python, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", *requirements)


def main(tests):
    (sdist,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    check_wheel(wheel)
    check_sdist(sdist)
    check_description(wheel)
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name)
        shutil.copy(EXAMPLE, outside)
        (outside / "wrong.py").write_text(EXAMPLE.read_text() + WRONG)

        python = environment("wheel", str(wheel))
        run(outside, python, "example.py")
        run(outside, python, "-m", "sago")
        install(python, "triton", "numpy", "mypy")
        run(outside, python, "example.py", "triton", TRITON_INTERPRET="1")
        # Some functions of torch, such as `backward`, have no types.
        run(outside, python, "-m", "mypy", "--strict", "--allow-untyped-calls", "wrong.py")

        python = environment("sdist", str(sdist))
        run(outside, python, "example.py")
        shutil.unpack_archive(sdist, outside)
        unpacked = outside / sdist.name.removesuffix(".tar.gz")
        install(python, "--editable", f"{unpacked}[test]")
        run(unpacked, python, "-m", "pytest", "-q", *tests, OMP_NUM_THREADS="1")
    for file in (sdist, wheel):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
