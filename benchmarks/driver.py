"""Runs Triton's launch path without a GPU: a stub of `libcuda.so.1` records the launches.

The driver of the process is replaced for good. Use a process of its own, without TRITON_INTERPRET. CPU
tensors stand for tensors on the device. The kernels are compiled for sm_90, and do not run.
"""

import ctypes
import hashlib
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia.driver as nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

PARAMETERS = RECORDS = 64  # as in stub_driver.c


class Launch(NamedTuple):
    """A launch that the driver was asked for.

    Attributes:
        kernel: The name of the kernel.
        code: A hash of the kernel's cubin.
        parameters: Each parameter as a signed little-endian integer.
        sizes: The bytes of the parameters, as the cubin declares them.
    """

    kernel: str
    code: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    parameters: tuple[int, ...]
    sizes: tuple[int, ...]


class _Kernel(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("sizes", ctypes.c_int * PARAMETERS))


class _Record(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_ubyte * 8 * PARAMETERS),
    )


class StubDriver:
    """Compiles the stub into `folder`, and activates a driver whose launches go to the stub."""

    def __init__(self, folder: Path) -> None:
        self._library = _build(folder)
        self._kernels: dict[int, tuple[str, str, _Kernel]] = {}
        knobs.nvidia.libcuda_path = str(folder)
        active = nvidia.CudaDriver()
        active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        active.utils.load_binary = self._load
        active.utils.get_device_properties = lambda device: {"max_shared_mem": 232448}
        driver.set_active(active)

    def launches(self) -> list[Launch]:
        """Returns the launches since the last call."""
        recorded = ctypes.c_uint.in_dll(self._library, "recorded")
        if recorded.value > RECORDS:
            raise RuntimeError(f"{recorded.value} launches, of which the last {RECORDS} were kept")
        records = (_Record * RECORDS).in_dll(self._library, "records")[: recorded.value]
        recorded.value = 0
        return [self._launch(record) for record in records]

    def _launch(self, record: _Record) -> Launch:
        name, code, kernel = self._kernels[record.kernel]
        sizes = tuple(kernel.sizes[: kernel.count])
        parameters = tuple(
            int.from_bytes(bytes(parameter[:size]), "little", signed=True)
            for parameter, size in zip(record.parameters, sizes, strict=False)
        )
        return Launch(name, code, tuple(record.grid), record.threads, record.shared, parameters, sizes)

    def _load(self, name, cubin, shared, device):
        sizes = parameter_sizes(cubin)
        kernel = _Kernel(len(sizes), tuple(sizes))
        handle = ctypes.addressof(kernel)
        self._kernels[handle] = name, hashlib.sha256(cubin).hexdigest(), kernel
        return handle, handle, 0, 0, 1024  # module, function, registers, spills, threads


def parameter_sizes(cubin: bytes) -> list[int]:
    """Reads the bytes of each parameter from the EIATTR_KPARAM_INFO attributes of a cubin with one kernel."""
    entries = re.findall(rb"\x04\x17\x0c\x00\0\0\0\0(..)..(....)", cubin, re.DOTALL)
    found = {struct.unpack("<H", at)[0]: struct.unpack("<I", bits)[0] >> 18 for at, bits in entries}
    if sorted(found) != list(range(len(found))) or not found or max(found.values()) > 8:
        raise ValueError(f"The cubin should have parameters of at most 8 bytes. Found {found}.")
    return [found[i] for i in range(len(found))]


def _build(folder: Path) -> ctypes.CDLL:
    source = Path(__file__).with_name("stub_driver.c")
    # Triton's modules load only if every function that they name exists. The added functions are empty.
    named = [Path(nvidia.dirname, name).read_text() for name in ("driver.c", "driver.py")]
    wanted = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", "".join(named))))
    idle = folder / "idle.c"
    idle.write_text("".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n" for name in wanted))
    library = folder / "libcuda.so.1"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{nvidia.dirname}/include"]
    subprocess.run(["gcc", *flags, source, idle, "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # Triton 3.4 links with this name
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
