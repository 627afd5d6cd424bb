"""Values that are made once for a key."""

import threading

import torch

from sago.cache import Cache

CPU = torch.device("cpu")


def test_what_is_kept_is_bounded():
    cache = Cache(3)
    made = [cache.get(key, [CPU], object) for key in "abc"]
    assert cache.get("a", [CPU], object) is made[0]
    cache.get("d", [CPU], object)  # drops b, the least recently used
    assert cache.get("a", [CPU], object) is made[0]
    assert cache.get("c", [CPU], object) is made[2]
    assert cache.get("b", [CPU], object) is not made[1]


def test_a_value_can_be_replaced():
    cache = Cache(3)
    old, new = object(), object()
    cache.add("a", [CPU], old)
    cache.add("a", [CPU], new)
    assert cache.find("a", [CPU]) is new
    assert cache.find("b", [CPU]) is None


def test_threads_have_values_of_their_own():
    """They may be on one stream, and kernels of two threads may then interleave."""
    cache = Cache(3)
    mine = cache.get("a", [CPU], object)
    theirs = []
    for _ in range(50):
        thread = threading.Thread(target=lambda: theirs.append(cache.get("a", [CPU], object)))
        thread.start()
        thread.join()
    assert all(value is not mine for value in theirs)
    assert sum(len(places) for places in cache._found.values()) <= 8
