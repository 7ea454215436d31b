"""The memory limit as a contender: the same bytes, the same read:write mix, nothing computed.

Which store is fastest depends on the size (plain in cache, streaming beyond), so a short pilot decides. Its
buffers are reused and already paged in: page faults are a cost of the operation, not of the memory.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import mbperf.extension  # noqa: F401  (registers torch.ops.mbperf.roof)
from mbperf.measure.rounds import Call, Timer, WallTimer, rotate
from mbperf.measure.traffic import Traffic

PILOT_S = 0.02
WALL = WallTimer()


InTurn = Callable[[Sequence[Call], Sequence[Tensor]], Call]


def roof_call(traffic: Traffic, copies: int = 1, in_turn: InTurn | None = None, timer: Timer = WALL) -> Call:
    """Return a call that moves `traffic` as fast as this machine can.

    Args:
        traffic: bytes to read and to write.
        copies: buffers to read in turn, for a group that is measured cold. What is written stays one buffer,
            as an allocator hands out again what the last call's result freed.
        in_turn: makes one call of those on each of these buffers; `rotate` of the calls by default.
        timer: of that call, in the pilot.

    Returns:
        A function of no arguments.

    >>> roof_call(Traffic(1 << 16, 1 << 16))() is None
    False
    """
    in_turn = in_turn or (lambda moves, _: rotate(moves))
    sources = [torch.ones(traffic.read_bytes, dtype=torch.uint8) for _ in range(copies)]
    dst = torch.zeros(traffic.written_bytes, dtype=torch.uint8)
    ways: list[Callable[[Tensor], Call]] = [partial(_move, dst, streaming) for streaming in (False, True)]
    if traffic.read_bytes == traffic.written_bytes:
        ways.append(partial(_copy, dst))
    calls = [in_turn([way(src) for src in sources], sources) for way in ways]
    return min(calls, key=partial(_seconds, timer))


def _move(dst: Tensor, streaming: bool, src: Tensor) -> Call:
    move = torch.ops.mbperf.roof.default
    return lambda: move(src, dst, streaming)


def _copy(dst: Tensor, src: Tensor) -> Call:
    return lambda: dst.copy_(src)


def _seconds(timer: Timer, call: Call) -> float:
    """The least time of one call within the pilot's time: interference only ever adds."""
    call()
    least, end = float("inf"), time.perf_counter() + PILOT_S
    while time.perf_counter() < end:
        least = min(least, timer(call, 1))
    return least
