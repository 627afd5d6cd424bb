import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks2():
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks4():
    yield from _pool(4)


def _pool(world):
    ranks = Ranks(world)
    yield ranks
    ranks.stop()
