"""Checks that private names of other libraries exist before they are used.

A renamed private name must raise an error, because a default value could silently give wrong gradients.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any


def require(owner: Any, names: Iterable[str], library: str, tested: str) -> None:
    """Raises RuntimeError unless `owner`, an object of `library`, has all of these attributes.

    An attribute that is only annotated in the class counts: the library sets it later.
    """
    annotated = getattr(type(owner), "__annotations__", {})
    for name in names:
        if not hasattr(owner, name) and name not in annotated:
            raise RuntimeError(
                f"{library} should have the private attribute `{type(owner).__name__}.{name}`, on which sago "
                f"relies. Found none in the installed version. Install {tested}, with which sago was tested."
            )


def has_since(owner: Any, name: str, package: str, since: tuple[int, ...], library: str, tested: str) -> bool:
    """Whether `owner`, an object of `library`, has an attribute that a later version added.

    Args:
        owner, name, library, tested: As in `require`.
        package: The name under which the library is imported.
        since: The version that added the attribute. From this version on, a missing attribute is an error.
    """
    if hasattr(owner, name):
        return True
    if version(package) >= since:
        require(owner, [name], library, tested)
    return False


def version(package: str) -> tuple[int, ...]:
    """The first three numbers in the version of a package that was imported."""
    digits = re.findall(r"\d+", sys.modules[package].__version__)
    return tuple(int(x) for x in digits[:3])
