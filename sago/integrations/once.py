"""Warnings that are logged once in a process."""

from __future__ import annotations

import logging

warned: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    if kind not in warned:
        warned.add(kind)
        logging.getLogger("sago").warning("sago: %s", text)
