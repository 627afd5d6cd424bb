"""`python -m sago`: the facts about an environment that a bug report needs; `python -m sago analyze`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

DISTRIBUTION = "sago-kernels"
OTHER = "sago"  # an unrelated distribution on the package index, with the same import name

USAGE = "Usage: python -m sago [analyze ...]."


def lines() -> list[tuple[str, str]]:
    import sago
    from sago.backends.choose import triton_version
    from sago.backends.compiled import has_compiler

    found = [
        (DISTRIBUTION, f"{sago.__version__}, imported from {Path(sago.__file__).parent}"),
        ("rules", ", ".join(sago.list_rules())),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        ("triton", triton_version() or "none of version 3.4 or newer"),
    ]
    for package in ("transformers", "accelerate", "peft", "deepspeed", "torchjd", "matplotlib"):
        version = _version(package)
        if version is not None:
            found.append((package, version))
    found.append(("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"))
    found.append(
        (
            "cpu backend",
            "compiled" if has_compiler() else "compiled, run eagerly: torch does not compile here",
        )
    )
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    if torch.cuda.is_available():
        found.append(("cuda backend", "triton" if triton_version() else "reference"))
        found.append(
            (
                "torch built for",
                f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
            )
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(("TRITON_INTERPRET", "1: kernels are interpreted"))
    return found


def other_package() -> str | None:
    """Describes a clash with the unrelated distribution `sago`; None if there is no clash."""
    import sago

    remedy = f"Run `pip uninstall {OTHER} {DISTRIBUTION}` and then `pip install {DISTRIBUTION}`."
    if not hasattr(sago, "GradientBuckets"):
        return f"The imported package {sago.__file__} is not part of {DISTRIBUTION}. {remedy}"
    version = _version(OTHER)
    if version is not None:
        return (
            f"The distribution `{OTHER}` {version} is installed as well. It is an unrelated project that "
            f"uses the same folder, so that each of the two overwrites files of the other. {remedy}"
        )
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the facts. Returns 1 if there is a clash with the unrelated distribution `sago`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "analyze":
        from sago.monitor import analyze

        return analyze.main(argv[1:])
    if argv in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if argv:
        print(f"{USAGE} Found {' '.join(argv)!r}.", file=sys.stderr)
        return 2
    clash = other_package()
    try:
        found = lines()
    except (ImportError, AttributeError):
        if clash is None:
            raise
        found = []
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        print(f"{name.ljust(width)}  {value}")
    if clash is not None:
        print(clash, file=sys.stderr)
    return int(clash is not None)


if __name__ == "__main__":
    raise SystemExit(main())
