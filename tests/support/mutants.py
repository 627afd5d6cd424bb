"""Wrong functions, which are made by replacing a part of the source of a right one."""

import inspect
import textwrap


def mutated(module, original, old, new, folder):
    """The function, compiled from a file in this folder with `new` in place of `old`."""
    source = textwrap.dedent(inspect.getsource(getattr(original, "fn", original)))
    assert source.count(old) == 1, f"{old!r} is not once in {original.__name__}"
    path = folder / f"{original.__name__}.py"  # from where Triton reads the source
    path.write_text(source.replace(old, new))
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), vars(module), namespace)
    return namespace[original.__name__]
