"""Names of other libraries that are not part of their public interface, checked before they are relied upon.

A private name that was renamed must be an error: a default in its place would let wrong gradients pass.
"""

from __future__ import annotations

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
