"""Values that are made once for a key."""

import sys
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
    values, all_there = [cache.get("a", [CPU], object)], threading.Barrier(20)

    def use():
        all_there.wait()  # so that no thread is called as one before it
        values.append(cache.get("a", [CPU], object))
        all_there.wait()

    threads = [threading.Thread(target=use) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(value) for value in values}) == 21
    assert sum(len(places) for places in cache._found.values()) == 8


class Key:
    """Compared by Python, so that another thread may come in between."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return self.number

    def __eq__(self, other):
        return isinstance(other, Key) and self.number == other.number


def test_threads_at_once():
    cache, wrong = Cache(4), []
    interval = sys.getswitchinterval()

    def use(start):
        try:
            for i in range(3000):
                number = (start * i) % 7
                value = cache.get(Key(number), [CPU], lambda n=number: [n])
                if value != [number]:
                    wrong.append(value)
        except Exception as error:  # whichever: what ends a thread does not fail a test by itself
            wrong.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(start,)) for start in (1, 2, 3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
