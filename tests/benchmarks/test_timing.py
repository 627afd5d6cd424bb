"""The order in which calls are timed. A list of requests stands for the GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import contenders, timing
from benchmarks.gradients import Prepared


@pytest.fixture
def log():
    return []


@pytest.fixture
def gpu(log, monkeypatch):
    """Takes the place of `torch` in the modules that time calls."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def inside(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    def empty(size, dtype, device):
        assert (dtype, device.type) == (torch.uint8, "cuda")
        return SimpleNamespace(zero_=lambda: log.append(f"flush {size >> 20} MiB"))

    def stream():
        return SimpleNamespace(wait_stream=lambda other: None)

    cuda = SimpleNamespace(
        synchronize=lambda: log.append("wait"),
        Event=Event,
        _sleep=lambda cycles: log.append("sleep"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        Stream=stream,
        current_stream=stream,
        stream=lambda other: inside("stream"),
        CUDAGraph=Graph,
        graph=lambda graph: inside("capture"),
    )
    fake = SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8)
    for module in (timing, contenders):
        monkeypatch.setattr(module, "torch", fake)
    return SimpleNamespace(type="cuda")


@pytest.fixture
def prepared(log):
    return Prepared(lambda: log.append("run"), lambda: log.append("restore"))


def test_on_a_gpu(gpu, log, prepared):
    sample = timing.Clock(gpu).sample(prepared)
    assert log == [
        *["restore", "flush 100 MiB", "wait", "run", "wait"],
        *["restore", "flush 100 MiB", "sleep", "event", "run", "event", "wait"],
    ]
    assert sample.ms == 2.0
    assert sample.host_ms > 0
    assert sample.wall_ms > 0


def test_on_the_cpu(log, prepared):
    sample = timing.Clock(torch.device("cpu")).sample(prepared)
    assert log == ["restore", "run"]
    assert sample.ms > 0
    assert sample[1:] == (None, None)


def test_a_graph_is_captured_after_a_first_call_and_replayed(gpu, log, prepared):
    gradients = SimpleNamespace(retain=["update"])
    graphed = contenders._graph(lambda given: prepared, gradients)
    assert log == [
        *["restore", "stream begins", "run", "stream ends"],
        *["restore", "capture begins", "run", "capture ends"],
    ]
    log.clear()
    graphed.restore()
    assert graphed.run() == ["update"]
    assert log == ["restore", "replay"]
    assert graphed.keeps is prepared
