"""Call a function in a fresh process, forked from one that has imported everything and started no thread.

A process costs milliseconds that way. Nothing of one measurement reaches the next: heap, memory layout,
caches, threads. A fork copies the calling thread alone, so OpenMP hangs in the child of a process whose pool
was running: such a process is refused.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TASKS = Path("/proc/self/task")
PR_SET_PDEATHSIG = 1  # prctl(2)
GRACE_S = 0.2  # a thread that was joined may show in /proc a moment longer


class ChildFailed(RuntimeError):
    """The child raised, died of a signal or took too long; the message says which."""


def call(function: Callable[[], Any], timeout_s: float) -> Any:
    """Return what `function` returns in a child of this process.

    Args:
        function: called in the child; its result has to be picklable.
        timeout_s: the child is killed after so long.

    Returns:
        The result, sent over a pipe.

    Raises:
        ChildFailed: the child raised, died or took too long.
        RuntimeError: this process has started threads.
    """
    ((_, result),) = call_each([function], timeout_s, at_once=1)
    if isinstance(result, ChildFailed):
        raise result
    return result


def call_each(
    functions: Sequence[Callable[[], Any]], timeout_s: float, at_once: int
) -> Iterator[tuple[int, Any]]:
    """Yield what each of `functions` returns in a child of its own, as they end.

    Args:
        functions: called in the children; their results have to be picklable.
        timeout_s: each child is killed after so long.
        at_once: how many children there may be at a time.

    Yields:
        Position of the function, and its result or the `ChildFailed` that says how the child failed.

    Raises:
        RuntimeError: this process has started threads.
    """
    waiting, running = list(enumerate(functions)), dict[Connection, _Child]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                child = _start(*waiting.pop(0), timeout_s)
                running[child.pipe] = child
            refuse_threads()
            soonest = min(child.deadline for child in running.values())
            ended = connection.wait(list(running), max(0.0, soonest - time.monotonic()))
            late = [pipe for pipe, child in running.items() if child.deadline <= time.monotonic()]
            for pipe in [one for one in running if one in ended or one in late]:
                child = running.pop(pipe)
                try:
                    yield child.position, _result(child, pipe in ended, timeout_s)
                finally:
                    _end(child)
    finally:
        for child in running.values():
            _end(child)


@dataclass(frozen=True)
class _Child:
    """One that runs: what it does, where its result arrives, and when (monotonic) it has to have ended."""

    position: int
    process: Any
    pipe: Connection
    deadline: float


def _start(position: int, function: Callable[[], Any], timeout_s: float) -> _Child:
    ours, its = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(function, its, os.getpid()))
    process.start()
    its.close()
    return _Child(position, process, ours, time.monotonic() + timeout_s)


def refuse_threads() -> None:
    """Raise if this process has other threads, just after a fork.

    Not before: OpenBLAS, which starts threads when numpy or scipy is imported, ends them at every fork.
    """
    end = time.monotonic() + GRACE_S
    while (count := threads()) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    if count > 1:
        raise RuntimeError(
            f"mbperf: groups are measured in forked processes, and this one has {count - 1} more thread(s): "
            "something computed, or started a thread, while test files were imported; move it into "
            "make_inputs, a contender or `optional`"
        )


def threads() -> int:
    """Return how many threads this process has; 1 where the system does not tell."""
    return len(list(TASKS.iterdir())) if TASKS.exists() else 1


def _serve(function: Callable[[], Any], pipe: Connection, parent: int) -> None:
    """In the child: a process group of its own, which ends with the parent."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    try:
        pipe.send((function(), ""))
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip()
        pipe.send((None, last))


def _result(child: _Child, has_ended: bool, timeout_s: float) -> Any:
    """What the child sent, or how it failed."""
    if not has_ended:
        return ChildFailed(f"the process did not end within {timeout_s:.0f} s")
    try:
        result, failure = child.pipe.recv()
    except EOFError:
        child.process.join()
        return ChildFailed(f"the process {_how_it_ended(child.process.exitcode)}")
    return ChildFailed(f"the process raised {failure}") if failure else result


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"died of {signal.Signals(-code).name}"


def _end(child: _Child) -> None:
    """End the child and its own children: workers of a DataLoader would wait for work for seconds."""
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.process.kill()
    child.process.join()
    child.process.close()
    child.pipe.close()
