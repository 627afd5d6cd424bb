"""Values that are made once for a key."""

import importlib
import sys
import threading
from contextlib import contextmanager
from unittest import mock

import torch

from sago.backends import streams as cache_module
from sago.backends.streams import Cache, Streams, is_capturing

upload_module = importlib.import_module("sago.backends.upload")  # its function has the same name

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


def test_captures_of_the_same_value_keep_it_once():
    cache = Cache(3)
    value = cache.get("a", [CPU], object)
    with mock.patch.object(cache_module, "is_capturing", return_value=True):
        for _ in range(100):
            assert cache.get("a", [CPU], object) is value
    assert len(cache._kept) == 1


def test_captures_of_the_same_table_keep_it_once(monkeypatch):
    """The pinned memory that a replay reads has to live as long as the process."""
    gpu = mock.Mock(type="cuda")
    copied = []
    monkeypatch.setattr(upload_module, "_captured", {})
    monkeypatch.setattr(upload_module, "is_capturing", lambda devices: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: copied.append(self) or self)
    for _ in range(100):
        for values in ([1, 2], [1, 3], torch.tensor([[1, 2]])):
            upload_module.upload(values, torch.int64, gpu)
    upload_module.upload([1, 2], torch.float64, gpu)
    assert len(upload_module._captured) == 4
    assert {t.data_ptr() for t in copied} == {t.data_ptr() for t in upload_module._captured.values()}


class Key:
    """Compared by Python, so that another thread may come in between."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return self.number

    def __eq__(self, other):
        return isinstance(other, Key) and self.number == other.number


def test_threads_at_once():
    """pytest reports an exception in a thread as a warning, which is an error here."""
    cache, wrong = Cache(4), []
    interval = sys.getswitchinterval()

    def use(start):
        for i in range(3000):
            number = (start * i) % 7
            value = cache.get(Key(number), [CPU], lambda n=number: [n])
            if value != [number]:
                wrong.append(value)

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


class Stream:
    """Like `torch.cuda.Stream`."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, stream):
        self.waited.append(stream)


class Recorded:
    """Like a tensor on a GPU."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def test_another_stream_waits_once_and_keeps_the_memory(monkeypatch):
    made, other, table = Stream(), Stream(), Recorded()
    capturing_now = False
    monkeypatch.setattr(cache_module, "is_capturing", lambda devices: capturing_now)
    current = made
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    streams = Streams(torch.device("cuda:0"))
    assert streams.join([table]) is made
    assert (made.waited, table.streams) == ([], [])
    current = Stream()
    capturing_now = True
    streams.join([table])
    assert (current.waited, table.streams) == ([], [])  # a capture starts after all earlier work
    capturing_now, current = False, other
    for _ in range(2):
        assert streams.join([table]) is other
    current = made
    streams.join([table])
    assert (other.waited, made.waited, table.streams) == ([made], [], [other])


def test_a_capture_is_found_on_the_stream_of_each_device(monkeypatch):
    """The current stream of a device that is not the current one may be in a capture."""
    capturing, current = {1}, [0]

    @contextmanager
    def device(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(cache_module, "_has_one_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] in capturing)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert not is_capturing([CPU, first])
    assert is_capturing([second])
    assert is_capturing([first, second])
    capturing.clear()
    assert not is_capturing([first, second])


def test_there_are_no_streams_on_the_cpu():
    assert Streams(CPU).join([torch.zeros(1)]) is None
