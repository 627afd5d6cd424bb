from collections import Counter

import pytest

from tests.ptx import device

TOTALS: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="session")
def _compiler():
    yield
    device.SHIPPED.close()


@pytest.fixture
def emulated(request):
    """`device.emulated`, whose launches are counted for the summary."""

    def start(arch, **setting):
        return device.emulated(arch, counts=TOTALS, **setting)

    TOTALS["cases"] += 1
    return start


def pytest_terminal_summary(terminalreporter):
    if TOTALS:
        found = ", ".join(f"{TOTALS[name]:,} {name}" for name in ("cases", "launches", "blocks", "elements"))
        terminalreporter.write_line(f"Executed compiled kernels: {found}.")
