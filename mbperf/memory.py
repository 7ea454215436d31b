"""The memory of large CPU results: which blocks wait to be used again, and how to give them back.

Gradients and batches of 128 KB or more have a block of their own. Clearing fresh pages takes as long as
computing a gradient into them, so the block of a freed tensor waits for the next request:

- it serves a request that needs at least half of it;
- all waiting blocks together are at most as large as all blocks in use together ever were; beyond 256 MB a
  block waits only in a loop: where another one is asked for within 10 s of turning such a block away;
- a block that no request has taken for 10 s is given back. The next request of any size to an operator of
  mbperf on the CPU, or the next release of a block, looks at the clock; no thread does;
- a waiting block of 4 MB or more is marked MADV_FREE. Linux takes its pages before it swaps or kills, under a
  cgroup's limit as well. Until then the resident size (`top`, RSS) counts them;
- a fork gives all waiting blocks back first; a child starts with none.

`MBPERF_MEMORY_CACHE=0`, read once when mbperf loads, turns the waiting off; 1 is the default, anything else a
ValueError. Large results keep their huge pages either way.

>>> import torch, mbperf
>>> logits = torch.zeros(64, 1_000, requires_grad=True)
>>> mbperf.cross_entropy(logits, torch.zeros(64, dtype=torch.int64)).backward()
>>> mbperf.memory.stats().in_use_bytes >= logits.grad.nbytes or not mbperf.memory.stats().enabled
True
"""

from dataclasses import dataclass

from mbperf.extension import _C


@dataclass(frozen=True)
class MemoryStats:
    """Counters of this process; a forked child goes on from its parent's.

    Attributes:
        enabled: whether blocks wait at all, by MBPERF_MEMORY_CACHE.
        kept_bytes: waiting blocks.
        in_use_bytes: blocks that tensors use, each counted whole.
        peak_in_use_bytes: the largest `in_use_bytes` so far, which bounds `kept_bytes`.
        hits: requests of 128 KB or more that a waiting block served.
        misses: those that took fresh pages.
    """

    enabled: bool
    kept_bytes: int
    in_use_bytes: int
    peak_in_use_bytes: int
    hits: int
    misses: int


def stats() -> MemoryStats:
    """Return what the cache of blocks holds and how often it served.

    Equivalent to `torch.cuda.memory_stats`, for mbperf's results on the CPU.

    Returns:
        MemoryStats, sizes in bytes.

    Example:
        >>> before = stats()
        >>> before.kept_bytes <= before.peak_in_use_bytes
        True
    """
    return MemoryStats(*_C.memory_stats())


def empty_cache() -> None:
    """Give every waiting block back to the system.

    Equivalent to `torch.cuda.empty_cache`. Blocks that tensors use stay.

    Example:
        >>> empty_cache()
        >>> stats().kept_bytes
        0
    """
    _C.empty_memory_cache()
