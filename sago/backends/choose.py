"""Which backend runs on a device."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib import import_module

import torch

from sago.backends.protocol import Backend

# The modules behind the names. They are imported when they are first used.
MODULES = {
    "triton": "sago.kernels",
    "compiled": "sago.backends.compiled",
    "reference": "sago.backends.reference",
}
BACKENDS = tuple(MODULES)
# The backends whose `Batch.release` drops the tensors on every device.
BY_ADDRESS = ("triton",)


def load(backend: str) -> Backend:
    """The module of that name."""
    found: Backend = import_module(MODULES[backend])  # type: ignore[assignment]
    return found


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"Parameter `backend` should be None or one of {', '.join(BACKENDS)}. Found {backend!r}."
        )


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend that runs on `device`. Raises ValueError if the requested one cannot run there."""
    if backend is None:
        if device.type == "cpu":
            return "compiled"
        if device.type == "cuda" and triton_version():
            return "triton"
        _warn_without_triton(device)
        return "reference"
    if backend == "triton":
        if not triton_version():
            raise ValueError("Backend 'triton' should have Triton 3.4 or newer installed. Found none.")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "Backend 'triton' should be given tensors on a GPU. Found tensors on the CPU, where only "
                "Triton's interpreter runs (TRITON_INTERPRET=1)."
            )
    if backend == "compiled" and device.type != "cpu":
        raise ValueError(f"Backend 'compiled' should be given tensors on the CPU. Found tensors on {device}.")
    return backend


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The installed version of Triton; None if Triton is missing or older than 3.4."""
    try:
        version: str = import_module("triton").__version__
    except ImportError:
        return None
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) >= (3, 4) else None


@lru_cache(maxsize=1)
def _warn_without_triton(device: torch.device) -> None:
    warnings.warn(
        f"sago: no Triton 3.4 or newer for gradients on {device}; the slow plain torch reference runs.",
        RuntimeWarning,
        stacklevel=2,
    )
