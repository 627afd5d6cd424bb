"""Processes of one process group, in which tests run functions."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds, of a collective


class RankError(Exception):
    """What ranks raised: the text of each; None for those that raised nothing."""

    def __init__(self, errors):
        self.errors = errors
        super().__init__("\n".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e is not None))


class Ranks:
    """`world` processes with gloo between them. After an error they are started anew."""

    def __init__(self, world, timeout=TIMEOUT):
        self.world, self.timeout = world, timeout
        self._processes = []

    def __call__(self, function, *args):
        """What `function(*args)` returns on every rank. Raises `RankError` if it raises on any."""
        if not self._processes:
            self._start()
        for _, pipe in self._processes:
            pipe.send((function, args))
        results, errors = [], []
        for process, pipe in self._processes:
            result, error = None, "still running"
            try:
                if pipe.poll(3 * self.timeout):
                    result, error = pipe.recv()
            except EOFError:
                process.join()
                error = f"died, exit code {process.exitcode}"
            results.append(result)
            errors.append(error)
        if any(error is not None for error in errors):
            self.stop()
            raise RankError(errors)
        return results

    def stop(self):
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.join()
        self._processes = []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = theirs, rank, self.world, store, self.timeout
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))


def _serve(pipe, rank, world, store, timeout):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)
