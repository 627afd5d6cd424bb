"""Compiles kernels to PTX in a process of its own, because the tests run with Triton's interpreter.

`python -m tests.ptx.compiler [FILE OLD NEW]` reads requests from its input and writes answers to its output.
In FILE of the kernels it replaces OLD by NEW, to compile a kernel that is wrong on purpose.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import ROOT


class Request(NamedTuple):
    """A launch to compile the code for.

    Attributes:
        kernel: `gram` or `combine`.
        arch: `sm_80`, `sm_90` or `sm_100`.
        arguments: Of the kernel, in order: an integer, None, or the dtype of a tensor.
        constants: The constexpr arguments and the options of the compiler. FORMULA and GATE are functions
            of a rule, which have to be found by their module and name.
    """

    kernel: str
    arch: str
    arguments: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]


class Compiled(NamedTuple):
    """The code, and the bytes of shared memory that a block uses."""

    ptx: str
    shared: int


class Compiler:
    """Compiles each request once. The process starts with the first.

    Args:
        change: A file of the kernels, a text in it, and the text that takes its place.
    """

    def __init__(self, change: tuple[str, str, str] | tuple[()] = ()) -> None:
        self._change = change
        self._process: subprocess.Popen[bytes] | None = None
        self._found: dict[Request, Compiled] = {}

    def __call__(self, request: Request) -> Compiled:
        if request not in self._found:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
            if isinstance(answer, BaseException):
                raise answer
            self._found[request] = answer
        return self._found[request]

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ptx.compiler", *self._change],
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


def _compile(request: Request) -> Compiled:
    import torch

    from benchmarks.compile import Launch, compile_launch

    on_device: Callable[[Any], Any] = import_module("sago.kernels.formula").on_device
    kernel = getattr(import_module(f"sago.kernels.{request.kernel}"), f"_{request.kernel}_kernel")
    constants = dict(request.constants)
    if constants.get("FORMULA") is not None:
        constants["FORMULA"] = on_device(constants["FORMULA"])
    if constants["GATE"] is not None:
        constants["GATE"] = on_device(constants["GATE"])
    arguments = tuple(torch.empty(1, dtype=x) if isinstance(x, torch.dtype) else x for x in request.arguments)
    found, _ = compile_launch(Launch({}, kernel, arguments, constants), request.arch)
    return Compiled(found.asm["ptx"], found.metadata.shared)


def _change_source(folder: Path, file: str, old: str, new: str) -> None:
    """Imports `sago.kernels` from a copy in `folder` in which the text is replaced."""
    shutil.copytree(ROOT / "kernels" / "triton", folder, dirs_exist_ok=True)
    text = (folder / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} should have the text {old!r} once. Found it {text.count(old)} times.")
    (folder / file).write_text(text.replace(old, new))
    spec = spec_from_file_location(
        "sago.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["sago.kernels"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            _change_source(Path(folder), *sys.argv[1:])
        _serve()


def _serve() -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing else may write between the answers
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Compiled | BaseException = _compile(request)
        except Exception as error:  # any error of Triton goes to the asking process, which raises it
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # Under its own name, so that what it answers can be read by the asking process.
    import_module("tests.ptx.compiler").main()
