"""Inputs that no cache holds, whatever its size: taken out of the caches between calls, outside the clock.

A contender rotates over distinct inputs. Before each rotation all that its calls read is evicted, so that
every call waits for memory, while the clock and the waking of threads are paid once a rotation. Where the
processor has no instruction to evict, a buffer of twice the last cache is read instead.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import mbperf.extension  # noqa: F401  (registers torch.ops.mbperf.evict)
from mbperf.measure import machine
from mbperf.measure.agreement import tensors
from mbperf.measure.group import Group, Inputs, nothing
from mbperf.measure.roof import roof_call
from mbperf.measure.rounds import Call, Clock, Plan, WallTimer, rotate
from mbperf.measure.rows import NULL, ROOF

# Bounds on the distinct inputs of a group, all contenders together: none of them follows from a cache.
MOST_INPUTS = 32
MOST_BYTES = 256 << 20
MOST_CHECK_S = 1.0
MEMORY_SHARE = 4  # at most a fourth of the memory that is left

MOST_READING_S = 0.1  # to empty the caches by reading; there are some hundred evictions in a group
# What one thread reads: several wait for each other, on a busy machine longer than for memory.
PROBE_BYTES, PROBES = 64 << 10, 100
# On Zen 4, with the call's own 1.4 us in both, 2.0 us from the second cache and 3.5 us evicted.
LEAST_SLOWDOWN = 1.25


class ColdCalls:
    """Calls on distinct inputs, in turn; `evict` comes before each turn of all of them, outside the clock.

    >>> calls = ColdCalls([int, str], lambda: None)
    >>> calls(), calls.timed(3) > 0
    (0, True)
    """

    def __init__(self, calls: Sequence[Call], evict: Call, clock: Clock = time.perf_counter) -> None:
        """Begin with the first of `calls`."""
        self._order = [*calls[-1:], *calls[:-1]]  # rotate() makes the second first
        self._next, self._evict, self._timer = rotate(self._order), evict, WallTimer(clock)

    def __call__(self) -> object:
        """Make the next call, wherever its input lies."""
        return self._next()

    def timed(self, n: int) -> float:
        """Make `n` calls on inputs that come from memory and return the seconds they took together."""
        seconds, most = 0.0, len(self._order)
        for done in range(0, n, most):
            self._evict()
            seconds += self._timer(self._next, min(most, n - done))
        return seconds


def timer(call: Call, n: int) -> float:
    """Time calls that know how: the `Timer` of rounds for a cold group."""
    assert isinstance(call, ColdCalls)
    return call.timed(n)


def calls(
    group: Group, functions: Mapping[str, Callable[..., Any]], sets: Sequence[Sequence[Inputs]]
) -> dict[str, list[Call]]:
    """Return the calls of every row of a cold group, the memory limit and the null call among them.

    Args:
        group: what is measured.
        functions: the contenders.
        sets: the input sets, each of the same number of distinct inputs.
    """
    evictions = [partial(evict, tensors_read(group, one)) for one in sets]
    its: dict[str, list[Call]] = {
        name: [
            ColdCalls([partial(function, *inputs) for inputs in one], its_eviction)
            for one, its_eviction in zip(sets, evictions, strict=True)
        ]
        for name, function in functions.items()
    }
    if group.traffic:
        its[ROOF] = [roof_call(group.traffic, copies=len(sets[0]), in_turn=_in_turn, timer=timer)]
    return {**its, NULL: [ColdCalls([nothing] * len(sets[0]), nothing)]}


def _in_turn(moves: Sequence[Call], sources: Sequence[Tensor]) -> ColdCalls:
    return ColdCalls(moves, partial(evict, sources))


def more_inputs(
    group: Group,
    functions: Mapping[str, Callable[..., Any]],
    sets: Sequence[Sequence[Inputs]],
    plan: Plan,
    held_bytes: int,
) -> Iterator[int]:
    """Yield the numbers of the inputs that every set gets beside its first, while the bounds allow more.

    Args:
        group, functions, sets: as in `calls`.
        plan: no rotation need be longer than the calls of a round.
        held_bytes: memory that one input takes beside those of the sets and the memory limit's.
    """
    fastest_s = min(_seconds_per_call(group, function, sets[0][:1]) for function in functions.values())
    each = held_bytes + sum(t.nbytes for one in sets for inputs in one[:1] for t in tensors(inputs))
    each += group.traffic.read_bytes if group.traffic else 0
    most_bytes = min(MOST_BYTES, machine.available_bytes() // MEMORY_SHARE)
    most = min(MOST_INPUTS, math.ceil(plan.batch_s / fastest_s), most_bytes // max(each, 1))
    began = time.monotonic()
    for number in range(1, most):
        if time.monotonic() - began > MOST_CHECK_S:
            return
        yield number


def _seconds_per_call(group: Group, function: Callable[..., Any], inputs: Sequence[Inputs]) -> float:
    """The least of three."""
    call = ColdCalls([partial(function, *one) for one in inputs], partial(evict, tensors_read(group, inputs)))
    return max(1e-9, min(call.timed(1) for _ in range(3)))


def evict(tensors: Sequence[Tensor]) -> None:
    """Take the memory of `tensors` out of every cache.

    >>> evict([torch.ones(3)])
    """
    if not _evict_lines(tensors):
        _read(_larger_than_the_caches())


def _evict_lines(tensors: Sequence[Tensor]) -> bool:
    """Return whether the processor has an instruction that did it."""
    return bool(torch.ops.mbperf.evict.default(tensors))


@cache
def why_not() -> str:
    """Return why nothing can be made cold on this machine, or an empty string.

    >>> why_not()
    ''
    """
    if not _evict_lines([]) and (reason := _why_not_by_reading()):
        return reason
    cached_s, evicted_s = _probe()
    if evicted_s < LEAST_SLOWDOWN * cached_s:
        return (
            f"{PROBE_BYTES >> 10} KiB taken out of the caches are read in {evicted_s * 1e6:.1f} us, "
            f"in them in {cached_s * 1e6:.1f} us"
        )
    return ""


def _why_not_by_reading() -> str:
    last = machine.last_cache_bytes()
    no_instruction = "the processor has no instruction that evicts"
    if last is None:
        return f"{no_instruction}, and the system does not tell how large a cache there is to read through"
    if 2 * last > machine.available_bytes() // MEMORY_SHARE:
        return (
            f"{no_instruction}, and twice its last cache ({last >> 20} MiB) is no small share of the memory"
        )
    buffer = _larger_than_the_caches()
    start = time.perf_counter()
    _read(buffer)
    seconds = time.perf_counter() - start
    if seconds > MOST_READING_S:
        return f"{no_instruction}, and to read twice its last cache ({last >> 20} MiB) takes {seconds:.2f} s"
    return ""


@cache
def _larger_than_the_caches() -> Tensor:
    """Twice the last cache; the size is known, or `why_not` has said so."""
    return torch.ones(2 * (machine.last_cache_bytes() or 0), dtype=torch.uint8)


def _read(tensor: Tensor) -> None:
    torch.ops.mbperf.roof.default(tensor, tensor[:0], False)


def _probe() -> tuple[float, float]:
    """The least seconds of reading a small buffer from the caches, and after it was evicted."""
    buffer = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    cached, evicted = [], []
    for _ in range(PROBES):
        _read(buffer)
        cached.append(_seconds(buffer))
        evict([buffer])
        evicted.append(_seconds(buffer))
    return min(cached), min(evicted)


def _seconds(buffer: Tensor) -> float:
    start = time.perf_counter()
    _read(buffer)
    return time.perf_counter() - start


def tensors_read(group: Group, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return the tensors whose memory calls on `inputs` read: what the group says, or all of the inputs'."""
    reads = group.reads or (lambda *one: tensors(one))
    return [tensor for one in inputs for tensor in reads(*one)]
