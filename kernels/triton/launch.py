"""Launches kernels directly once they are compiled, without the dispatch of `triton.jit`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
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
                    if found is not None:  # not interpreted
                        one.compiled[key] = found[one.chunks, 1, 1], tuple(values.values())
                else:
                    # For an integer address the launcher does not query the driver, as it does for a tensor.
                    pointers = [None if t is None else t.data_ptr() for t in tensors]
                    run, values = compiled
                    run(*one.addresses, *pointers, *numbers, *values)
    except BaseException:
        batch.discard_counters()
        raise


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
