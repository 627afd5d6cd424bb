"""`python -m sago`: what a bug report should say about the environment."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import sago
from sago.arguments import triton_version
from sago.compiled import has_compiler


def lines() -> list[tuple[str, str]]:
    found = [
        ("sago", sago.__version__),
        ("rules", ", ".join(sago.list_rules())),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        ("triton", triton_version() or "none that is 3.4 or newer"),
    ]
    for package in ("transformers", "accelerate", "deepspeed", "torchjd"):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    found.append(("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"))
    found.append(("cpu backend", "compiled" if has_compiler() else "compiled, run eagerly: no C++ compiler"))
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


def main() -> None:
    found = lines()
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name.ljust(width)}  {value}")


if __name__ == "__main__":
    main()
