"""Compiles graphs for the CPU with TorchInductor.

`make_fx` traces each graph once, with symbolic sizes, and TorchInductor compiles it once for each combination
of dtypes. TorchDynamo takes no part, so none of its limits and none of its guards on global state (threads,
grad mode, autocast, default dtype, deterministic mode) apply. A graph is a function of tensors, and gives the
same bits when it is not compiled. It runs uncompiled on small tensors, until a compilation would have paid
for itself, while another thread compiles, and if the compilation fails.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sago.rules.draws import Drawn
from sago.rules.form import current_helpers

COMPILE_FROM = 1 << 15  # elements of the smallest tensor for which a call of compiled code pays
COMPILE_AT_ONCE = 1 << 20  # elements of a tensor that is not run uncompiled first
COMPILE_AFTER = 1 << 26  # elements that run uncompiled first: less than a second, for compilations of seconds
_EXAMPLE = 1 << 21  # elements of the tensors that a graph is compiled with

_log = logging.getLogger("sago")


def compiled_code(
    graph: Any, constant: Any, tensors: Sequence[Tensor], coefficients: Tensor | None = None
) -> Callable[..., Any] | None:
    """The compiled code of `graph(*tensors, coefficients, constant)`; None where it runs uncompiled.

    Args:
        constant: A hashable value that the code is compiled for.
        tensors: 1-D tensors of one size.
        coefficients: A tensor of another size. None if the graph takes none.
    """
    numel = tensors[0].numel()
    if numel < COMPILE_FROM or not all(t.is_contiguous() for t in tensors):
        return None
    if any(isinstance(x, Drawn) for x in constant):  # random gates are not compiled
        return None
    small = () if coefficients is None else (coefficients.ndim, coefficients.shape[-1])
    # A function that a gate calls may be defined again, which the gate itself does not show.
    used = tuple(current_helpers(x) for x in constant if isinstance(x, FunctionType))
    key = graph, constant, used, small, *(t.dtype for t in tensors)
    if key in _compiled:
        return _compiled[key]
    if numel < COMPILE_AT_ONCE:
        _uncompiled[key] += numel
        if _uncompiled[key] <= COMPILE_AFTER:
            return None
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or not _lock.acquire(blocking=False):
        return None
    try:
        if key not in _compiled:
            _compiled[key] = _compile(graph, constant, tensors, coefficients)
    finally:
        _lock.release()
    return _compiled[key]


_compiled: dict[Any, Callable[..., Any] | None] = {}  # None where the compilation failed
_uncompiled: Counter[Any] = Counter()  # elements that were processed uncompiled, by the same keys
_lock = threading.Lock()  # two compilations at a time would share the state of the compiler


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held the lock


def _compile(
    graph: Any, constant: Any, tensors: Sequence[Tensor], coefficients: Tensor | None
) -> Callable[..., Any] | None:
    """The compiled code for tensors like these of any size; None if it cannot be compiled."""
    _announce()
    try:
        return _build(graph, constant, tensors, coefficients)
    except Exception as error:  # torch, TorchInductor and the C++ compiler share no base class of errors
        _warn_uncompiled(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return None


def _build(
    graph: Any, constant: Any, tensors: Sequence[Tensor], coefficients: Tensor | None
) -> Callable[..., Any]:
    from torch._inductor import compile as compile_graph
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.fx.experimental.proxy_tensor import make_fx

    with (
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # warnings of torch at its imports
        # The size is large so that the compiler uses threads. The memory is not touched.
        examples = [torch.empty(_EXAMPLE, dtype=t.dtype) for t in tensors]
        if coefficients is not None:
            rows = (_EXAMPLE // (tensors[0].numel() // len(coefficients)),) if coefficients.ndim > 1 else ()
            examples.append(torch.empty(*rows, coefficients.shape[-1], dtype=coefficients.dtype))
        traced = make_fx(lambda *args: graph(*args, constant), tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
        options = {
            # Without this option, the code would contain the current number of threads.
            "cpp.dynamic_threads": True,
            # TorchInductor chooses this width by itself, but the key of its cache on disk contains only the
            # options. Code that a machine with other vectors has cached would leave elements unwritten.
            "cpp.simdlen": pick_vec_isa().bit_width(),
        }
        if torch.__version__.startswith("2.6."):
            options["fx_graph_cache"] = False  # a cached graph raises an error without TorchDynamo
        return compile_graph(traced, inputs, options=options)


@cache
def _announce() -> None:
    _log.warning(
        "sago: compiling code for gradients on the CPU, which takes some seconds for each combination of "
        "dtypes. Later processes take less, because torch caches the result on disk."
    )


@cache
def _warn_uncompiled(reason: str) -> None:
    warnings.warn(
        f"sago: torch cannot compile code for the CPU ({reason}); gradients on the CPU are synthesized by "
        "eager torch, which gives the same result more slowly.",
        RuntimeWarning,
        stacklevel=2,
    )
