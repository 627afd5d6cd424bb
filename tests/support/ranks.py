"""Processes of one process group, in which tests run functions."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds, of a collective
PATIENCE = 180.0  # seconds, until all ranks have started, and until all have answered


FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
NO_FSDP2 = f"FSDP2 of torch {torch.__version__} does not run on the CPU: its stream has no record_event"


class RankError(Exception):
    """What ranks raised.

    Attributes:
        errors: The text of each rank; None for those that raised nothing.
    """

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e is not None))


class Ranks:
    """`world` processes with gloo between them, of one thread each, in which every warning is an error.

    They are started by the first call and kept for the next ones; after a `RankError` they are started again,
    because what they were about to send to each other is not known.

    Args:
        world: How many.
        timeout: Seconds that a collective waits for the other ranks.
        patience: Seconds until a call gives up on ranks that wait for nothing.
    """

    def __init__(self, world: int, timeout: float = TIMEOUT, patience: float = PATIENCE) -> None:
        self.world, self.timeout, self.patience = world, timeout, patience
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """The results of `function(*args, **options)` on all ranks, which look the function up by its name.

        Raises:
            RankError: If it raises on any rank, if a rank dies, or if one does not answer.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args, options))
        for pipe in self._pipes:
            with suppress(OSError):  # it has died since the last call: no answer will come
                pipe.send_bytes(message)
        return self._answers(self.patience)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = theirs, rank, self.world, store, self.timeout
            process = context.Process(target=_serve, args=args, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers(PATIENCE)

    def _answers(self, patience: float) -> list[Any]:
        results: list[Any] = [None] * self.world
        errors: list[str | None] = [None] * self.world
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        until = time.monotonic() + patience
        while waiting and (ready := connection.wait(list(waiting), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank], errors[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    errors[rank] = f"died, exit code {self._processes[rank].exitcode}"
        for rank in waiting.values():
            errors[rank] = f"no answer within {patience:g} s"
        if any(error is not None for error in errors):
            self.stop()
            if not FSDP2_ON_CPU and any("has no attribute 'record_event'" in (e or "") for e in errors):
                pytest.skip(NO_FSDP2)
            raise RankError(errors)
        return results


def error_of(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[type, str] | None:
    """The error that the call raises, in a form that can be sent, or None."""
    try:
        function(*args, **options)
    except Exception as error:  # any class: the test that asked checks it
        return type(error), str(error)
    return None


def _serve(pipe: Any, rank: int, world: int, store: str, timeout: float) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")  # torch 2.6
    # As launchers set them, for those who look there.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    pipe.send_bytes(pickle.dumps((None, None)))  # only now: others may have taken longer to import torch
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            if not dist.is_initialized():
                limit = timedelta(seconds=timeout)
                dist.init_process_group("gloo", f"file://{store}", limit, world, rank)
            function, args, options = pickle.loads(message)
            answer = pickle.dumps((function(*args, **options), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)
