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
from collections.abc import Callable
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
    ours, its = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    child = multiprocessing.get_context("fork").Process(target=_serve, args=(function, its, os.getpid()))
    child.start()
    its.close()
    try:
        refuse_threads()
        return _receive(ours, child, timeout_s)
    finally:
        _end(child)
        ours.close()


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


def _receive(pipe: Connection, child: Any, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise ChildFailed(f"the process did not end within {timeout_s:.0f} s")
    try:
        result, failure = pipe.recv()
    except EOFError:
        child.join()
        raise ChildFailed(f"the process {_how_it_ended(child.exitcode)}") from None
    if failure:
        raise ChildFailed(f"the process raised {failure}")
    return result


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"died of {signal.Signals(-code).name}"


def _end(child: Any) -> None:
    """End the child and its own children: workers of a DataLoader would wait for work for seconds."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.join()
    child.close()
