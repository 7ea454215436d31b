"""Timers for work on a GPU: events around a captured graph of calls, or the host's clock around eager ones.

A graph rotates over input sets that together are several times the last cache, in whole rotations, so that no
call finds its data there. Graphs share one pool of memory, as what they return is not looked at.
"""

import gc
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mbperf.measure.rounds import Call, rotate
from mbperf.measure.traffic import Traffic

# Of all input sets together, times the last cache: at 2x a cold timer elsewhere was warm by a third.
CACHES = 5
GRAPH_S = 1e-3  # a graph lasts at least this long, so that starting it (some 10 us) is hidden behind the last
WARM_CALLS = 3  # compile, choose algorithms, fill the pool of memory
LEAD_CYCLES = 100_000  # some 50 us of waiting on the device, in which the host runs ahead


class Device(Protocol):
    """What a timer asks of a GPU; replaced by a fake one in the tests of this ruler."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return a call that replays `calls`, one after the other."""

    def event(self) -> Any:
        """Return an event with record() and elapsed_time(later), in milliseconds."""

    def synchronize(self) -> None:
        """Wait for all work of the device."""

    def lead(self) -> None:
        """Keep the device waiting for a moment."""

    def sm_clock_mhz(self) -> float | None:
        """Return the clock of the multiprocessors as it is now, or None where nobody tells."""

    def cache_bytes(self) -> int:
        """Return the size of the last cache."""

    def release(self) -> None:
        """Give back the memory that nothing holds any more, to whoever allocates next."""

    def roof(self, traffic: Traffic, copies: int) -> Sequence[Call]:
        """Return calls that move `traffic` and compute nothing, on as many pairs of buffers."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        """Make the pool of memory that all graphs share."""
        import torch

        self._torch = torch
        self._pool = torch.cuda.graph_pool_handle()
        self._clock: Callable[[], float | None] = _clock_reader(torch)

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return the replay of a graph of `calls`, after running each of them a few times."""
        cuda = self._torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_CALLS):
                for call in calls:
                    call()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        self.release()  # what the warm calls left would lie beside the graph's own pool
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool):
            for call in calls:
                call()
        return graph.replay

    def event(self) -> Any:
        """Return a CUDA event that keeps the time."""
        return self._torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait for all streams."""
        self._torch.cuda.synchronize()

    def lead(self) -> None:
        """Let the device wait while the host queues what is to be timed."""
        self._torch.cuda._sleep(LEAD_CYCLES)

    def sm_clock_mhz(self) -> float | None:
        """Return the clock, by NVML or nvidia-smi, whichever this machine has."""
        return self._clock()

    def cache_bytes(self) -> int:
        """Return the size of the L2 cache."""
        cuda = self._torch.cuda
        return int(cuda.get_device_properties(cuda.current_device()).L2_cache_size)

    def release(self) -> None:
        """Collect garbage, as graphs are in cycles with their calls, and empty torch's cache."""
        gc.collect()
        self._torch.cuda.empty_cache()

    def roof(self, traffic: Traffic, copies: int) -> list[Call]:
        """Return calls of the kernel that only moves bytes."""
        import mbperf.extension  # noqa: F401  (registers torch.ops.mbperf.roof)

        move, new = self._torch.ops.mbperf.roof.default, self._torch.full

        def one() -> Call:
            src, dst = (
                new((size,), 1, dtype=self._torch.uint8, device="cuda")
                for size in (traffic.read_bytes, traffic.written_bytes)
            )
            return lambda: move(src, dst, False)

        return [one() for _ in range(copies)]


def _clock_reader(torch: Any) -> Callable[[], float | None]:
    def by_nvml() -> float | None:
        return float(torch.cuda.clock_rate())

    def by_command() -> float | None:
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", "0"]
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout
        return float(said.split()[0])

    for reader in (by_nvml, by_command):
        try:
            reader()
        except Exception:  # no such library, no such command, no right to ask
            continue
        return reader
    return lambda: None


class GraphCalls:
    """Calls inside a captured graph, timed by events on the device.

    Args:
        calls: the same call on each input set; a graph makes whole rotations over them.
        device: the GPU.
    """

    def __init__(self, calls: Sequence[Call], device: Device) -> None:
        self._device = device
        once = device.capture(calls)
        rotations = max(1, math.ceil(GRAPH_S / max(self._elapsed_s(once, 1), 1e-9)))
        self._replay = once if rotations == 1 else device.capture(list(calls) * rotations)
        self.calls_a_graph = len(calls) * rotations

    def __call__(self) -> None:
        """Replay once, without a clock."""
        self._replay()

    def timed(self, n: int) -> float:
        """Return the seconds that n calls take: whole graphs of at least n calls, scaled to n."""
        replays = -(-n // self.calls_a_graph)
        return self._elapsed_s(self._replay, replays) * n / (replays * self.calls_a_graph)

    def _elapsed_s(self, replay: Call, replays: int) -> float:
        start, end = self._device.event(), self._device.event()
        self._device.lead()
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        self._device.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class EagerCalls:
    """Calls from the host, timed end to end: launches, Python and all, until the device has finished.

    Args:
        calls: the same call on each input set, taken in turns.
        device: the GPU.
        clock: seconds.
    """

    def __init__(
        self, calls: Sequence[Call], device: Device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._next, self._device, self._clock = rotate(calls), device, clock

    def __call__(self) -> None:
        """Make one call."""
        self._next()

    def timed(self, n: int) -> float:
        """Return the seconds that n calls take."""
        self._device.synchronize()
        start = self._clock()
        for _ in range(n):
            self._next()
        self._device.synchronize()
        return self._clock() - start


def timer(call: Call, n: int) -> float:
    """Time calls that know how: the `Timer` of rounds on a GPU."""
    assert isinstance(call, (GraphCalls, EagerCalls))
    return call.timed(n)


def input_sets(traffic: Traffic, cache_bytes: int) -> int:
    """Return how many input sets read `CACHES` times the last cache in all.

    >>> input_sets(Traffic(60 << 20, 0), 60 << 20)
    5
    >>> input_sets(Traffic(8 << 30, 0), 60 << 20)
    1
    """
    return max(1, -(-CACHES * cache_bytes // max(1, traffic.read_bytes)))
