"""`make hub`: the kernels in the layout of the Hugging Face hub, loaded without the library around them.

`make test-hub` runs these tests with the package `kernels` of Hugging Face, which the main environment lacks.
"""

import ast
import json
import subprocess
import sys
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from sago import reference
from tests.conftest import needs_interpreter, needs_triton

ROOT = Path(__file__).parents[1]
BACKENDS = ("cuda", "rocm")
try:
    metadata.version("kernels")
    has_kernels = True
except metadata.PackageNotFoundError:
    has_kernels = False
needs_kernels = pytest.mark.skipif(not has_kernels, reason="needs the package `kernels`: make test-hub")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, ROOT / "tools/hub.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder


def by_hand(variant):
    """Loads a variant as `kernels` does: under the name of its id, and not from `sys.path`."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_kernels(variant):
    from kernels import get_local_kernel

    return get_local_kernel(variant)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("load", [by_hand, pytest.param(by_kernels, marks=needs_kernels)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_and_sums_are_those_of_the_reference(hub, load, backend):
    kernel = load(hub / "build" / f"torch-{backend}")
    assert not kernel.__name__.startswith("sago")
    assert set(kernel.__all__) == {"Batch", "combine", "gram", "rules"}
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 1000, 33000)  # a tensor of two chunks
    for dtype in (torch.bfloat16, torch.float32):
        forget, retain = ([torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(2))
        f, r = (torch.cat(side).double() for side in (forget, retain))
        rows = range(len(sizes))
        for name in ("sum", "sago", "ties", "pcgrad"):
            out = [torch.full_like(t, torch.nan) for t in retain]
            batch = kernel.Batch(torch.device("cpu"), forget, retain, out, rows, len(sizes))
            table = kernel.gram(batch, 3)
            # Sums of n products in fp32, with fp64 across chunks
            fr = torch.stack([(a * b).sum() for a, b in zip(f.split(sizes), r.split(sizes), strict=True)])
            norms = torch.stack([x.square().sum().sqrt() for side in (f, r) for x in side.split(sizes)])
            bound = 1e-6 * norms[: len(sizes)] * norms[len(sizes) :]
            assert ((table[:, 1] - fr).abs() <= bound).all()

            kernel.combine(batch, kernel.rules.resolve(name), 0.75, 1.5, 0.0, table, 0)
            expected, _ = reference.synthesize(forget, retain, name, 0.75, 1.5)
            if name != "pcgrad":
                assert all(map(torch.equal, out, expected)), name
            for u, e in zip(out, expected, strict=True):
                # The coefficient of pcgrad inherits the error of the sums, and its update is rounded once.
                slack = torch.finfo(dtype).eps * e.abs() + 1e-5
                assert ((u - e).abs() <= slack).all(), name


def test_modules_import_only_what_the_hub_allows(hub):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    files = sorted(hub.rglob("*.py"))
    assert len(files) > 3 * 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed, file


def test_each_build_has_a_name_of_its_own(hub, tmp_path):
    ids = {json.loads((hub / f"build/torch-{b}/metadata.json").read_text())["id"] for b in BACKENDS}
    assert len(ids) == len(BACKENDS)
    assert all(name.isidentifier() for name in ids)


@needs_kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_reads_the_metadata(hub, backend):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    variant = hub / "build" / f"torch-{backend}"
    found = Metadata.read_from_file(variant / "metadata.json")
    assert (str(found.name), found.version, found.license) == ("sago-kernels", 0, "MIT")
    assert str(found.backend.backend_type) == backend
    found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
