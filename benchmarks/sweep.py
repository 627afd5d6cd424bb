"""Other configurations of the kernels that ship: the elements of a chunk and of a block, and the threads.

`python -m benchmarks sweep` times them on a GPU, after a check of every update. `compile --configuration
CHUNK BLOCK THREADS` compiles one of them without a GPU. All three numbers change the last bits of sums, but
not an elementwise update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

from sago.kernels.batch import BLOCK, CHUNK, THREADS

from benchmarks.contenders import Contender, ceiling, ours
from benchmarks.gradients import Gradients, Prepared, Tensors
from benchmarks.speed import Case
from sago.backends.streams import Cache


class Configuration(NamedTuple):
    chunk: int
    block: int
    threads: int


SHIPPED = Configuration(CHUNK, BLOCK, THREADS)


@contextmanager
def configured(configuration: Configuration) -> Iterator[None]:
    """Temporarily replaces the constants of `sago.kernels`. Batches that are made inside have new layouts."""
    batch, *kernels = (import_module(f"sago.kernels.{name}") for name in ("batch", "gram", "combine"))
    constants: dict[str, Any] = {name.upper(): value for name, value in configuration._asdict().items()}
    with mock.patch.multiple(batch, **constants, _layouts=Cache(64)), ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.multiple(kernel, **constants))
        yield


def cases(
    workloads: Sequence[str],
    rules: Sequence[str],
    dtypes: Sequence[str],
    configurations: Sequence[Configuration],
    mode: str = "graph",
) -> Iterator[Case]:
    """Yields cases for `benchmarks.speed.run`, with configurations of 8 or 16 elements a thread.

    With fewer elements a thread, the loads of 16-bit gradients are narrower than 16 bytes.
    """
    for workload, dtype in product(workloads, dtypes):
        contenders = ceiling()[:1]
        for rule, stats, made in product(rules, (True, False), configurations):
            if made.block // made.threads in (8, 16):
                plan = ours(rule, stats, "Plan", mode)
                name = ", ".join(f"{name} {x}" for name, x in made._asdict().items())
                contenders.append(plan._replace(name=name, prepare=partial(_prepare, plan, made)))
        yield Case(workload, dtype, contenders)


def _prepare(contender: Contender, configuration: Configuration, gradients: Gradients) -> Prepared:
    with configured(configuration):
        prepared = contender.prepare(gradients)

    def run() -> Tensors:
        with configured(configuration):
            return prepared.run()

    return Prepared(run, prepared.restore, keeps=prepared)
