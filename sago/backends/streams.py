"""CUDA streams: a cache with a value for each, tensors that several use, and the capture of graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_PLACES = 8  # combinations of thread and streams that use one key


class Cache:
    """An LRU cache of values that own device memory, keyed by key, thread and CUDA stream.

    Device memory is filled and reused in the order of a stream, so only the thread and the streams that made
    a value find it. The capture of a CUDA graph is an exception. A capture starts after all earlier work, so
    it may use the value of any stream. The graph is replayed on the same memory, so the cache never drops
    that value. A value that is made during a capture has no content before the first replay, so it is not
    added.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: OrderedDict[Hashable, dict[Hashable, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._latest: tuple[Hashable, dict[Hashable, Any]] | None = None
        self._kept: dict[int, Any] = {}

    def get(self, key: Hashable, devices: Collection[torch.device], make: Callable[[], Any]) -> Any:
        found = self.find(key, devices)
        if found is None:
            found = make()
            self.add(key, devices, found)
        return found

    def find(self, key: Hashable, devices: Collection[torch.device]) -> Any:
        """The value of `key`, or None."""
        with self._lock:
            if (
                self._latest is None or self._latest[0] != key
            ):  # a comparison costs less than a long key's hash
                places = self._found.get(key)
                if places is None:
                    return None
                self._found.move_to_end(key)
                self._latest = key, places
            places = self._latest[1]
            if not is_capturing(devices):
                return places.get(_place(devices))
            found = next(iter(places.values()))
            self._kept[id(found)] = found  # once for any number of graphs
            return found

    def add(self, key: Hashable, devices: Collection[torch.device], value: Any) -> None:
        """Keeps the value. It replaces an earlier value of the key."""
        if is_capturing(devices):
            return
        with self._lock:
            places = self._found.setdefault(key, {})
            places[_place(devices)] = value
            if len(places) > _PLACES:
                del places[next(iter(places))]
            if len(self._found) > self._size:
                self._found.popitem(last=False)
            self._latest = None


def _place(devices: Collection[torch.device]) -> Hashable:
    streams = (torch.cuda.current_stream(d).cuda_stream for d in devices if d.type == "cuda")
    return threading.get_ident(), *streams


class Streams:
    """The CUDA streams that use tensors which are filled once, on the stream of their construction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found = [] if device.type != "cuda" else [torch.cuda.current_stream(device)]

    def join(self, tensors: Iterable[Tensor]) -> Hashable:
        """Lets the current stream use the tensors, and returns the stream.

        At its first use, another stream waits for the first one, and the memory of the tensors is not reused
        before the work of both is done. A capture of a CUDA graph does neither: `torch.cuda.graph` waits for
        all earlier work, and the tensors have to outlive the graph.
        """
        if not self._found:
            return None
        stream = torch.cuda.current_stream(self._device)
        if stream not in self._found and not is_capturing([self._device]):
            stream.wait_stream(self._found[0])
            for t in tensors:
                t.record_stream(stream)
            self._found.append(stream)
        return stream


def is_capturing(devices: Collection[torch.device]) -> bool:
    """Whether a CUDA graph is being captured on the current stream of one of the devices."""
    for device in devices:
        # Switching the device costs more than the question.
        if device.type == "cuda" and (_has_one_gpu() or device.index == torch.cuda.current_device()):
            if torch.cuda.is_current_stream_capturing():
                return True
        elif device.type == "cuda":
            with torch.cuda.device(device):
                if torch.cuda.is_current_stream_capturing():
                    return True
    return False


@lru_cache(maxsize=1)
def _has_one_gpu() -> bool:
    return torch.cuda.device_count() <= 1
