"""The memory limit as a contender: the same bytes, the same read:write mix, nothing computed.

Which store is fastest depends on the size (plain in cache, streaming beyond), so a short pilot decides. Its
buffers are reused and already paged in: page faults are a cost of the operation, not of the memory.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import mbperf.extension  # noqa: F401  (registers torch.ops.mbperf.roof)
from mbperf.measure.rounds import rotate
from mbperf.measure.traffic import Traffic

PILOT_S = 0.02


def roof_call(traffic: Traffic, copies: int = 1) -> Callable[[], object]:
    """Return a call that moves `traffic` as fast as this machine can.

    Args:
        traffic: bytes to read and to write.
        copies: buffers to read in turn, for a group that is measured cold. What is written stays one buffer,
            as an allocator hands out again what the last call's result freed.

    Returns:
        A function of no arguments.

    >>> roof_call(Traffic(1 << 16, 1 << 16))() is None
    False
    """
    sources = [torch.ones(traffic.read_bytes, dtype=torch.uint8) for _ in range(copies)]
    dst = torch.zeros(traffic.written_bytes, dtype=torch.uint8)
    candidates = [rotate([_move(src, dst, streaming) for src in sources]) for streaming in (False, True)]
    if traffic.read_bytes == traffic.written_bytes:
        candidates.append(rotate([_copy(src, dst) for src in sources]))
    return min(candidates, key=_seconds)


def _move(src: Tensor, dst: Tensor, streaming: bool) -> Callable[[], object]:
    move = torch.ops.mbperf.roof.default
    return lambda: move(src, dst, streaming)


def _copy(src: Tensor, dst: Tensor) -> Callable[[], object]:
    return lambda: dst.copy_(src)


def _seconds(call: Callable[[], object]) -> float:
    """The least time of one call within the pilot's time: interference only ever adds."""
    call()
    least, end = float("inf"), time.perf_counter() + PILOT_S
    while (start := time.perf_counter()) < end:
        call()
        least = min(least, time.perf_counter() - start)
    return least
