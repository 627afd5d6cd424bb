"""The packages import each other in one direction only, and CONTRIBUTING.md says what the code does."""

import ast
import re
import sys
from collections import Counter
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sago
from sago.backends import inductor
from sago.integrations.transformers import GradientSynthesisMixin

ROOT = Path(sago.__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The packages that each package may import. Every package may also import `sago.private`.
MAY_IMPORT = {
    "private": set(),
    "rules": set(),
    "backends": {"rules"},
    "kernels": {"backends", "rules"},
    "core": {"backends", "rules"},
    "ranks": {"backends"},
    "in_graph": {"core", "rules"},
    "synthesis": {"in_graph", "ranks", "core", "backends", "rules"},
    "capture": {"ranks", "core", "backends", "rules"},
    "monitor": {"capture", "synthesis", "core", "rules"},
    "integrations": {"capture", "monitor", "synthesis", "ranks", "core", "backends", "rules"},
    "reference": {"ranks", "core", "backends", "rules"},
    "distributed": {"ranks"},
    "testing": {"reference", "synthesis", "rules"},
}
# The files that may import a module by a string, and the other packages that their strings name.
NAMED = {
    "sago/backends/choose.py": {"kernels"},  # MODULES
    "sago/capture/opening.py": {"integrations"},  # ENGINES
    "sago/core/report.py": {"monitor"},  # _PLOTS
}
# It imports modules that a user's configuration names.
OF_USERS = "sago/integrations/trainer/configuration.py"
BY_STRING = {"import_module", "__import__", "importlib", "resolve_name"}


class Source(NamedTuple):
    """A file of the library, and the name under which it is imported."""

    file: str
    module: str
    text: str

    @property
    def package(self):
        return self.module.split(".")[1]


def sources():
    for folder, prefix in (("sago", "sago"), ("kernels/triton", "sago.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT)
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield Source(file.as_posix(), ".".join(parts), path.read_text(encoding="utf-8"))


LIBRARY = [s for s in sources() if s.module not in ("sago.__init__", "sago.__main__")]


def imports(source):
    """The names of the modules that a file imports. `import sago.x` also gives access to all of sago."""
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.ImportFrom):
            # The last part of the module's name is the file, `__init__` included.
            around = source.module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), around)
            yield from (f"{base}.{a.name}" for a in node.names) if base == "sago" else [base]
        elif isinstance(node, ast.Import):
            yield from ("sago.*" if a.name.partition(".")[0] == "sago" else a.name for a in node.names)


def by_string(source):
    """The functions for imports by strings that a file uses without being allowed to."""
    if source.file in {
        *NAMED,
        OF_USERS,
        "sago/rules/__init__.py",
    }:  # which imports the files of its own package
        return set()
    found = set()
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, (ast.Name, ast.Attribute)):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found & BY_STRING


def named(source):
    """The other packages that a string constant names as a module."""
    constants = (n.value for n in ast.walk(ast.parse(source.text)) if isinstance(n, ast.Constant))
    modules = (v for v in constants if isinstance(v, str) and re.fullmatch(r"sago(\.\w+)+", v))
    return {v.split(".")[1] for v in modules} - {source.package}


def against(source):
    """The imports of a file that go against the direction, or that hide where they go."""
    found = {name.split(".")[1] for name in imports(source) if name.startswith("sago.")}
    allowed = {source.package, "private", *MAY_IMPORT[source.package]}
    return (found - allowed) | by_string(source) | (named(source) - NAMED.get(source.file, set()))


def test_every_package_has_its_place():
    assert {source.package for source in LIBRARY} == set(MAY_IMPORT)


@pytest.mark.parametrize("source", LIBRARY, ids=lambda source: source.file)
def test_imports_go_in_one_direction(source):
    assert against(source) == set()


def test_no_arrow_leads_back():
    """The table itself has no cycle."""
    order = []
    while len(order) < len(MAY_IMPORT):
        free = [p for p, others in MAY_IMPORT.items() if p not in order and others <= set(order)]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


def test_modules_that_are_named_by_strings_are_known():
    assert {source.file: found for source in LIBRARY if (found := named(source))} == NAMED


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("sago.rules.sago", "from sago.core.pairs import Call"),
        ("sago.core.seen", "import sago.capture.buckets"),
        ("sago.core.seen", "def f():\n    from sago import ranks"),
        ("sago.core.seen", "from ..capture.buckets import GradientBuckets"),
        ("sago.core.seen", "from .. import capture"),
        ("sago.core.__init__", "from ..capture import buckets"),
        ("sago.core.seen", "import sago; sago.capture"),
        ("sago.core.seen", "import sago as s"),
        ("sago.core.seen", "from sago import *"),
        ("sago.core.seen", "import importlib; importlib.import_module(f'sago.{n}')"),
        ("sago.core.seen", "from importlib import import_module as i; i('sago.' + x)"),
        ("sago.core.seen", "import_module('.capture', 'sago')"),
        ("sago.core.seen", "__import__(x)"),
        ("sago.core.seen", "builtins.__import__(x)"),
        ("sago.core.seen", "sys.modules['sago.capture.buckets']"),
        ("sago.backends.compiled", "MODULE = 'sago.kernels'"),
        ("sago.capture.buckets", "from sago.integrations import deepspeed"),
        ("sago.kernels.batch", "from sago.core.pipeline import Pipeline"),
        ("sago.kernels.batch", "from ..core.pipeline import Pipeline"),
    ],
)
def test_an_arrow_against_the_direction_is_seen(module, text):
    assert against(Source(module.replace(".", "/") + ".py", module, text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("sago.core.seen", "from sago.core import pairs, checks\nfrom sago import private"),
        ("sago.core.seen", "from .pairs import Call\nfrom ..backends import choose"),
        ("sago.kernels.__init__", "from .batch import Batch\nimport torch"),
    ],
)
def test_an_arrow_in_the_direction_is_none(module, text):
    assert not against(Source(module.replace(".", "/") + ".py", module, text))


def test_contributing_has_the_table_of_packages():
    """A package is a folder or a file. The names in the last column are those of `MAY_IMPORT`."""
    found = {}
    rows = re.findall(r"^\| `(?:sago/)?([\w/.]+)` \|.*\| ([^|]+) \|$", CONTRIBUTING, re.MULTILINE)
    for path, allowed in rows:
        name = path.strip("/").removesuffix(".py").replace("kernels/triton", "kernels")
        found[name] = set() if allowed == "none" else set(allowed.split(", "))
    assert found == MAY_IMPORT


def innermost(frame):
    """The file of the innermost function of the library, up from this frame; None if there is none."""
    while frame is not None and not frame.f_code.co_filename.startswith(f"{ROOT}/sago/"):
        frame = frame.f_back
    return None if frame is None else frame.f_code.co_filename.removeprefix(f"{ROOT}/")


class Touched(TorchDispatchMode):
    """Records the files of the library in which operations read or write the memory of these tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.memory = {t.untyped_storage().data_ptr() for t in tensors}
        self.files = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        if not func.is_view and any(t.untyped_storage().data_ptr() in self.memory for t in tensors):
            self.files.add(innermost(sys._getframe()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [4, 256])
@pytest.mark.parametrize("rule", ["sago", "pcgrad"])
def test_the_path_of_a_gradient_is_that_of_contributing(rule, width, monkeypatch):
    # Other tests may have compiled `_write`, whose calls the profiler then does not see.
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_uncompiled", Counter())
    steps = re.findall(r"^\d\. `(sago/[\w/]+\.py)`: `(\w+)`", CONTRIBUTING, re.MULTILINE)
    assert len(steps) <= 6
    assert len({file for file, _ in steps}) == len(steps)
    packed, written = (file for file, _ in steps[-2:])
    model = torch.nn.Linear(width, width, bias=False)
    buckets = sago.GradientBuckets(model)
    calls = []

    def record(frame, event, _):
        if event == "call":
            calls.append((frame.f_code.co_filename.removeprefix(f"{ROOT}/"), frame.f_code.co_name))

    with Touched([*buckets._forget.buffers, *buckets._retain.buffers]) as touched:
        sys.setprofile(record)
        try:
            for side, sign in ((buckets.forget, -1.0), (buckets.retain, 1.0)):
                with side():
                    (sign * model(torch.ones(3, width)).square().sum()).backward()
            buckets.synthesize_(rule)
        finally:
            sys.setprofile(None)
    # Each step is last entered after the one in front of it. Large gradients are not packed.
    taken = [step for step in steps if width == 4 or step[0] != packed]
    calls.reverse()
    assert sorted(taken, key=calls.index, reverse=True) == taken
    # Autograd adds to the accumulators. Only one step reads their elements and writes the update.
    assert touched.files - {None} == {packed if width == 4 else written}


def overridden(kind):
    """The private functions of a class that replace one of a class above it. Enum ends its own with `_`."""
    private = (n for n, v in vars(kind).items() if n.startswith("_") and not n.endswith("_") and callable(v))
    return {name for name in private if any(hasattr(above, name) for above in kind.__mro__[1:])}


def classes():
    for source in LIBRARY:
        module = re.sub(r"\.__init__$", "", source.module)
        if source.package == "kernels" and find_spec("triton") is None:
            continue
        if module == "sago.integrations.torchjd" and find_spec("torchjd") is None:
            continue
        yield from (v for v in vars(import_module(module)).values() if isinstance(v, type))


def test_no_class_overrides_a_private_method_of_another():
    ours = {kind for kind in classes() if kind.__module__.startswith("sago.")}
    assert len(ours) > 20
    assert {kind.__name__: found for kind in ours if (found := overridden(kind))} == {}


def test_the_trainer_mixin_overrides_one_private_method():
    """Documented in the mixin: nothing else tells the end of a training that raises."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    trainer = type("Trainer", (transformers.Trainer,), {})
    names = vars(GradientSynthesisMixin)
    private = {n for n in names if n.startswith("_") and not n.endswith("__") and hasattr(trainer, n)}
    assert private == {"_inner_training_loop"}


def test_a_private_method_that_is_overridden_is_seen():
    class Above:
        def _step(self):
            pass

    class Below(Above):
        def _step(self):
            pass

    assert overridden(Below) == {"_step"}
    assert overridden(Above) == set()
