"""Starts processes in which Triton compiles kernels, because the tests themselves use its interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: Any, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python *arguments` in the root of the repository, without TRITON_INTERPRET."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key != "TRITON_INTERPRET" and not key.startswith("PYTEST_")
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def need_stub_driver() -> None:
    """Skips the importing file unless a stub can take the place of the CUDA driver."""
    if find_spec("triton.backends.nvidia") is None:
        pytest.skip("needs Triton's CUDA backend", allow_module_level=True)
    if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs gcc and Python's headers", allow_module_level=True)
    if torch.cuda.is_available():
        pytest.skip("the driver of the GPU is loaded", allow_module_level=True)
