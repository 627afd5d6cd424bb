"""Asserts that the host does not wait for the device."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_sync():
    """Inside the block, every operation that waits for the device raises."""
    torch.cuda.synchronize()
    try:
        _set("error")
        yield
    finally:
        _set("default")


def _set(mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
