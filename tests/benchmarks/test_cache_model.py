"""The model of the second read, where the answer is known."""

import pytest

from tests.backends import import_with_triton

import_with_triton("triton")
cache = pytest.importorskip("benchmarks.experiments.cache")

CHUNK, PIECE = cache.CHUNK, cache.PIECE
ORDERS = {order.name: order for order in cache.ORDERS}
IN_TURN = {name: order._replace(threads=cache.THREADS) for name, order in ORDERS.items()}


def machine(pieces, sms=1):
    return cache.Machine("made up", 4 * PIECE * pieces, 1.0, sms)


@pytest.mark.parametrize("replacement", ["lru", "random"])
@pytest.mark.parametrize("name", list(ORDERS))
def test_what_fits_is_read_once(name, replacement):
    found = cache.simulate([CHUNK + 3, 5], 2, machine(100), ORDERS[name], replacement)
    assert found["hit_share"] == 1
    assert found["traffic_in_s"] == 3


@pytest.mark.parametrize("name", list(ORDERS))
def test_what_misses_is_read_twice(name):
    sizes = [3 * CHUNK, 7, CHUNK]
    found = cache.simulate(sizes, 2, machine(1), ORDERS[name])
    assert found["traffic_in_s"] == pytest.approx(5 - 2 * found["hit_share"])
    assert found["hit_share"] <= len(sizes) * PIECE / sum(sizes)  # of each tensor the last piece


@pytest.mark.parametrize(
    ("name", "hits"),
    [
        ("two launches", 0),  # the last used is dropped just before it is asked for
        ("reverse, chunks only", 4),  # the last chunk; the piece before it is dropped just in time
        ("reverse", 5),  # all that the cache holds
        ("reverse, evict first", 5),
        ("one launch", 0),
        ("one launch, reverse, evict first", 10),  # of each of two tensors
    ],
)
def test_one_program_at_a_time(name, hits):
    sizes = [2 * CHUNK, 2 * CHUNK]
    found = cache.simulate(sizes, 2, machine(5), IN_TURN[name])
    assert found["hit_share"] == hits * PIECE / sum(sizes)


def test_many_programs_need_more_than_chunks_in_reverse():
    """They are at the ends of their chunks when the reduction ends, and start over at the beginnings."""
    programs = 2048 // cache.THREADS
    sizes, some = [(4 * programs + 6) * CHUNK], machine(programs, sms=2)
    chunks, pieces, evict_first = (
        cache.simulate(sizes, 2, some, ORDERS[name])["hit_share"]
        for name in ("reverse, chunks only", "reverse", "reverse, evict first")
    )
    assert chunks < pieces < evict_first == pytest.approx(cache.best_share(sizes, 2, some, 2))


def test_what_lags():
    order = ORDERS["one launch, lag"]._replace(lag=2)
    found = [(c, combines) for c, _, combines in cache.tickets([CHUNK] * 4, order)]
    reduced = [(c, False) for c in range(4)]
    assert found == [*reduced[:3], (0, True), reduced[3], (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("name", list(ORDERS))
def test_work_comes_once_and_waits_for_no_one_behind(name):
    sizes = [CHUNK, 3 * CHUNK + 1, 1]
    reduced, combined = [], []
    for chunk, group, combines in cache.tickets(sizes, ORDERS[name]):
        if combines:
            assert set(range(6) if ORDERS[name].launches == 2 else [[0], [1, 2, 3, 4], [5]][group]) <= set(
                reduced
            )
        (combined if combines else reduced).append(chunk)
    assert reduced == sorted(combined) == list(range(6))


def test_no_time_below_that_of_the_bytes():
    for order in cache.ORDERS:
        found = cache.simulate([1 << 20] * 3, 2, machine(8), order)
        assert found["time_of_5s"] >= found["traffic_in_s"] / 5
