"""Times a synthesis on the CPU beside plain torch code for the same update.

The inputs and the timing are those of `benchmarks.speed`. If one contender is wrong, nothing is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.contenders import Contender, others, ours, peer
from benchmarks.gradients import ALPHA, GAMMA, WrongResult
from benchmarks.measure import dtype_name, judge, origin
from benchmarks.speed import Case, measure

COLUMNS = (
    "dtype", "contender", "in_place", "ms", "p20", "p80",
    "ratio_to_add", "faster_than_released", "target", "met",
)  # fmt: skip

_compiled = partial(peer, "torch.compile(where)", "sago", compiles=True)
CONTENDERS = (
    ours("sago", False, name="sago"),
    ours("sago", True, name="sago, statistics"),
    ours("pcgrad", False, name="pcgrad"),
    ours("pcgrad", True, name="pcgrad, statistics"),
    peer("torch.add(f, r, out=r)", "add", peers.add_),
    _compiled(partial(peers.compiled, peers.sago_)),
    _compiled(partial(peers.compiled, peers.formula), in_place=False),
    peer("torch.where", "sago", peers.where, in_place=False),
    *(others(rule, False)[0]._replace(name=f"released {rule}") for rule in ("sago", "pcgrad")),
)
# Contender, dtype (None: any), field, sense, bound.
TARGETS = (
    ("sago", None, "ratio_to_add", "<=", 1.5),
    ("sago", "bfloat16", "faster_than_released", ">=", 50.0),
    ("sago, statistics", None, "ratio_to_add", "<=", 3.0),
)


def run(
    elements: int = 1 << 26,
    tensors: int = 1,
    repeats: int = 10,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    contenders: Sequence[Contender] = CONTENDERS,
) -> dict[str, Any]:
    """Times `contenders` on `tensors` pairs with `elements` elements in all.

    Gradients have 4096 rows if 4096 divides them. Otherwise they are flat.
    """
    each = elements // tensors
    shape = (4096, each // 4096) if each % 4096 == 0 else (each,)
    rows = []
    for dtype in map(dtype_name, dtypes):
        found = measure(Case("cpu", dtype, list(contenders)), [shape] * tensors, "cpu", repeats, math.inf)
        for row in found:
            if row["note"]:
                raise WrongResult(row["note"])
        rows += [_compared(row, found) for row in found]
    return {
        **origin("cpu", "kernels", "sago"),
        "elements": elements,
        "tensors": tensors,
        "shape": list(shape),
        "repeats": repeats,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "rows": rows,
    }


def _compared(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row with its ratios to `torch.add` and to the released code, and with its targets."""
    ms = {other["contender"]: other["ms"] for other in rows}
    add, released = ms.get("torch.add(f, r, out=r)"), ms.get(f"released {row['rule']}")
    row["ratio_to_add"] = add and row["ms"] / add
    row["faster_than_released"] = released and released / row["ms"]
    dtypes = (None, row["dtype"])
    row.update(judge(row, [t[2:] for t in TARGETS if t[0] == row["contender"] and t[1] in dtypes]))
    return {column: row[column] for column in COLUMNS}
