"""Makes Triton's interpreter quicker."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from tests.support.backends import INTERPRETED, has_triton


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Triton patches all of its language at each call of a device function: once a launch is enough."""
    if not INTERPRETED or not has_triton():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    @cache
    def languages(fn):
        """The modules that are patched for this function."""
        return frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)

    def patch_once(fn):
        if languages(fn) in patched:
            return None  # what a device function patches stays, so nobody asks for its scope
        scope = patch(fn)
        patched.add(languages(fn))
        if scope is not None:  # Triton 3.4 never takes a patch back
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield
