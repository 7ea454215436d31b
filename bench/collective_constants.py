"""The constants of the model in docs/distributed.md, here: python bench/collective_constants.py [RANKS]

An all-gather of M bytes a rank takes a(p) + M (p - 1) / B: a(p) is the time of the smallest message, B the
slope between two large ones. Ranks are processes of one thread on gloo; each time is the slowest rank's, the
median of many calls behind a barrier.
"""

import statistics
import sys
import tempfile
import time
from datetime import timedelta

import torch
from torch import distributed as dist

SMALLEST, LARGE, LARGER = 32, 1 << 22, 1 << 24  # bytes a rank
CALLS = 60
LIMIT = timedelta(minutes=1)


def all_gather_s(bytes_a_rank: int, calls: int = CALLS) -> float:
    """Return the median seconds of an all-gather of the world, as its slowest rank sees it.

    Args:
        bytes_a_rank: M.
        calls: how many to time; every rank has to make as many.
    """
    c10d, world = torch.ops._c10d_functional, dist.group.WORLD
    assert world is not None
    message, seconds = torch.ones(bytes_a_rank, dtype=torch.uint8), []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        c10d.wait_tensor(c10d.all_gather_into_tensor(message, dist.get_world_size(), world.group_name))
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return statistics.median(seconds)


def constants() -> tuple[float, float]:
    """Return a(p) in seconds and B in bytes a second, in every rank."""
    times = {size: all_gather_s(size) for size in (SMALLEST, LARGE, LARGER)}
    received = (LARGER - LARGE) * (dist.get_world_size() - 1)
    return times[SMALLEST], received / (times[LARGER] - times[LARGE])


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=LIMIT)
    latency_s, bytes_per_s = constants()
    if rank == 0:
        print(f"p = {ranks}: a(p) = {latency_s * 1e6:.0f} us, B = {bytes_per_s / 1e9:.2f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, folder), ranks)
