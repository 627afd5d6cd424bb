"""Launches that are wrong on purpose, inspected as the shipped ones are; prints their rows as JSON.

A script, because nothing compiles in the process of the tests: Triton's interpreter is on there.
"""

import json
import sys
from importlib import import_module

import triton
import triton.language as tl

from benchmarks import compile

stream = import_module("sago.kernels.stream")


@triton.jit
def hint_ahead_of_the_cast(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return tl.multiple_of(address, 16).to(tl.pointer_type(DTYPE)) + start


def find(arch: str, dtype: str, **labels: object) -> compile.Launch:
    labels |= {"dtypes": f"{dtype}/{dtype}", "alignment": "aligned"}
    (launch,) = (x for x in compile.launches(arch) if labels.items() <= x.labels.items())
    return launch


def inspected(arch: str) -> dict[str, dict]:
    stats = find(arch, "fp32", kernel="combine", rule="sago", sums=9)
    plain = find(arch, "bf16", kernel="combine", rule="sum", sums=0)
    variants = {
        "shipped": plain,
        "fused": plain._replace(kwargs=plain.kwargs | {"enable_fp_fusion": True}),
        "narrow block": plain._replace(kwargs=plain.kwargs | {"BLOCK": 512}),
        "too many values a thread": stats._replace(kwargs=stats.kwargs | {"BLOCK": 16384, "V": 1}),
    }
    return {name: compile.inspect(launch, arch) for name, launch in variants.items()}


def inspected_unhinted(arch: str) -> dict[str, dict]:
    # In a process of its own: kernels remember what they were compiled from.
    stream.pointer = hint_ahead_of_the_cast
    launch = find(arch, "bf16", kernel="combine", rule="sum", sums=0)
    return {"hint ahead of the cast": compile.inspect(launch, arch)}


if __name__ == "__main__":
    inspect = inspected_unhinted if sys.argv[1] == "unhinted" else inspected
    print(json.dumps({arch: inspect(arch) for arch in sys.argv[2:]}))
