"""Compiles launches that are wrong on purpose, and prints their rows as JSON.

The script runs in a process of its own, because Triton's interpreter is on in the process of the tests.
"""

import json
import sys

from benchmarks import compile


def find(arch: str, dtype: str, **labels: object) -> compile.Launch:
    labels |= {"dtypes": f"{dtype}/{dtype}", "alignment": "aligned"}
    (launch,) = (x for x in compile.launches(arch) if labels.items() <= x.labels.items())
    return launch


def inspected(arch: str) -> dict[str, dict]:
    stats = find(arch, "fp32", kernel="combine", rule="sago", sums=9)
    plain = find(arch, "bf16", kernel="combine", rule="sum", sums=0)
    unpacked = find(arch, "fp32", kernel="combine", rule="sum", sums=0)
    variants = {
        "shipped": plain,
        "fused": unpacked._replace(kwargs=unpacked.kwargs | {"enable_fp_fusion": True}),
        "narrow block": plain._replace(kwargs=plain.kwargs | {"BLOCK": 512, "V": 4}),
        "too many values a thread": stats._replace(kwargs=stats.kwargs | {"BLOCK": 16384, "V": 1}),
    }
    return {name: compile.inspect(launch, arch) for name, launch in variants.items()}


if __name__ == "__main__":
    print(json.dumps({arch: inspected(arch) for arch in sys.argv[1:]}))
