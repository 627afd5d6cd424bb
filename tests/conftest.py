import os
import tempfile
from contextlib import nullcontext
from getpass import getuser

import numpy as np
import pytest
import torch
from hypothesis import settings

# Triton reads this when it is imported, which `import sago` does not do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch.compile takes code from its cache that was generated for other vector instructions, which does not
# build or gives wrong results. The library avoids this, but some tests compile a model or a peer. The
# processes that tests start inherit the variable.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(), f"torchinductor_{getuser()}_{torch.backends.cpu.get_cpu_capability()}"
    ),
)

from sago.backends import inductor
from tests.support.backends import INTERPRETED, Backend, has_triton
from tests.support.interpreter import quick_interpreter

settings.register_profile("default", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the GPU, not interpreted")

DEVICES = [
    pytest.param("cpu", id="interpreted", marks=[needs_triton, needs_interpreter]),
    pytest.param("cuda", id="cuda", marks=[needs_triton, pytest.mark.gpu]),
]
KERNEL_BACKENDS = [
    pytest.param(Backend("triton", "cpu"), id="triton", marks=[needs_triton, needs_interpreter]),
    pytest.param(Backend("triton", "cuda"), id="triton-cuda", marks=[needs_triton, pytest.mark.gpu]),
]
FAST_BACKENDS = [pytest.param(Backend("compiled", "cpu"), id="compiled"), *KERNEL_BACKENDS]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and not INTERPRETED:
        return
    reason = "needs a GPU, and Triton not interpreted"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    # The interpreter computes with numpy, which warns where IEEE arithmetic gives inf or NaN.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    with quick_interpreter():
        yield


@pytest.fixture(params=[pytest.param(Backend("reference", "cpu"), id="reference"), *FAST_BACKENDS])
def backend(request):
    return request.param


@pytest.fixture(params=FAST_BACKENDS)
def fast_backend(request):
    """A backend that shares no code with the reference."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    """Where the kernels run."""
    return request.param


@pytest.fixture
def compiled_at_once(monkeypatch):
    """The CPU path compiles what it would otherwise run uncompiled until a compilation pays."""
    monkeypatch.setattr(inductor, "COMPILE_AT_ONCE", inductor.COMPILE_FROM)


@pytest.fixture(scope="module")
def one_thread():
    """With small tensors a second one is only waited for, long where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
