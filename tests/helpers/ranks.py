"""Functions run in every rank of a gloo world: in processes that a test cannot outlive, nor they it."""

import io
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

LIMIT_S = 60.0


class RankFailed(AssertionError):
    """A rank raised; holds its traceback."""


class World:
    """As many processes as the largest world has ranks, used again for each call.

    Args:
        most: ranks of the largest world.
        folder: for the stores that ranks meet in.
        timeout_s: of the process groups.
    """

    def __init__(self, most: int, folder: Path, timeout_s: float = LIMIT_S) -> None:
        self._folder, self._calls, self._timeout_s = folder, 0, timeout_s
        # Forked from a server that has imported torch and never started a thread: 0.1 s a rank.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mbperf.distributed", "torch.distributed.tensor"])
        self._pipes, self.processes = [], []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function(rank, *args)` returns in each rank.

        Raises:
            RankFailed: it raised in one.
            TimeoutError: it took longer than LIMIT_S; all ranks are dead then.
        """
        outcomes = self.outcomes(world, function, *args)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise RankFailed(f"rank {rank}: {outcome}")
        return outcomes

    def outcomes(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`, but an exception takes the place of a result; EOFError that of a rank that ended."""
        self._calls += 1
        path = str(self._folder / f"store{self._calls}")
        for rank in range(world):
            self._pipes[rank].send((path, self._timeout_s, rank, world, function, args))
        until_s = time.monotonic() + LIMIT_S
        return [self._outcome(rank, until_s) for rank in range(world)]

    def _outcome(self, rank: int, until_s: float) -> Any:
        try:
            if not self._pipes[rank].poll(max(until_s - time.monotonic(), 0)):
                self.end()
                raise TimeoutError(f"rank {rank} took longer than {LIMIT_S:g} s")
            kind, value = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
        except (EOFError, ConnectionResetError) as error:
            return EOFError(f"rank {rank} ended: {error}")
        return value if kind == "result" else RankFailed(value)

    def end(self) -> None:
        """Kill every process and wait for its end."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextmanager
def world_of(most: int, folder: Path, timeout_s: float = LIMIT_S) -> Iterator[World]:
    """A world whose processes end with the block."""
    world = World(most, folder, timeout_s)
    try:
        yield world
    finally:
        world.end()


def end_server() -> None:
    """End the process that ranks are forked from; there is no public way."""
    forkserver._forkserver._stop()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            path, timeout_s, rank, world, function, args = pipe.recv()
        except EOFError:
            return
        buffer = io.BytesIO()
        try:
            dist.init_process_group(
                "gloo", store=dist.FileStore(path, world), rank=rank, world_size=world,
                timeout=timedelta(seconds=timeout_s),
            )  # fmt: skip
            outcome = ("result", function(rank, *args))
        except BaseException:
            outcome = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        torch.save(outcome, buffer)
        pipe.send_bytes(buffer.getvalue())
