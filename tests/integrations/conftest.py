import gc

import pytest


@pytest.fixture(scope="module")
def quick_collection():
    """The objects of earlier tests are left out when buckets search modules and trainers collect garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
