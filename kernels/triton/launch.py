"""Launches kernels directly once they are compiled, without the dispatch of `triton.jit`."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .batch import Batch


def launch(
    kernel: Any,
    batch: Batch,
    key: Hashable,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    constants: Callable[[Any], dict[str, Any]],
    options: Callable[..., dict[str, Any]],
) -> None:
    """`kernel[grid](*tables, *tensors, *numbers, **constants, **options)` for every launch of the batch.

    Only the first launch goes through Triton's binding and specialisation of the arguments. Nothing is
    specialised on values, so the compiled kernel depends on `key` and on the dtypes and alignment of a launch
    only. `constants(one)` returns the constexpr arguments in the order of the kernel's parameters. `options`
    returns the compiler's options.
    """
    try:
        with _on(batch):
            for one in batch.launches:
                compiled = one.compiled.get(key)
                if compiled is None:
                    values = constants(one)
                    found = kernel[(one.chunks,)](
                        *one.tables,
                        *tensors,
                        *numbers,
                        **values,
                        **options(batch.device, one.aligned, one.dtypes),
                    )
                    if found is not None and launches_directly():  # None: interpreted
                        one.compiled[key] = found[one.chunks, 1, 1], tuple(values.values())
                else:
                    # For an integer address the launcher does not query the driver, as it does for a tensor.
                    pointers = [None if t is None else t.data_ptr() for t in tensors]
                    run, values = compiled
                    run(*one.addresses, *pointers, *numbers, *values)
    except BaseException:
        batch.discard_counters()
        raise


@lru_cache(maxsize=1)
def launches_directly() -> bool:
    """Whether the arguments of a compiled kernel's launcher are known for the installed version of Triton.

    That they include the constexpr arguments, and that an integer passes for a pointer, is not a part of
    Triton's public interface. With a version that was not tested, every launch is dispatched by Triton.
    """
    if _version(triton.__version__) <= LAST_TESTED:
        return True
    logging.getLogger("sago").warning(
        "sago was tested with Triton 3.4 to %d.%d, and found Triton %s. Updates are computed as before, but "
        "each launch goes through the slower dispatch of Triton.",
        *LAST_TESTED,
        triton.__version__,
    )
    return False


LAST_TESTED = (3, 9)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def bits(weight: float | Tensor) -> int:
    """A weight as a kernel takes it: the bits of an fp64 number, or the address of a 0-d fp64 tensor."""
    if isinstance(weight, Tensor):
        return weight.data_ptr()
    found: int = _INT64.unpack(_DOUBLE.pack(weight))[0]
    return found


_INT64, _DOUBLE = struct.Struct("<q"), struct.Struct("<d")


def _on(batch: Batch) -> Any:
    """Makes the device of a batch current, as a launch needs."""
    if batch.device.type != "cuda" or torch.cuda.current_device() == batch.device.index:
        return nullcontext()
    return torch.cuda.device(batch.device)
