"""The process that trials are forked from: a fresh interpreter which has imported torch and made the dataset.

It runs no trial itself (unless told to), so every trial starts from the same clean state, without paying the
seconds that importing torch and making the dataset take. Messages to the profiler are (kind, value) pairs.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from mbperf.loader.processes import stacks
from mbperf.loader.processes.cleanup import remove_shared_memory_of
from mbperf.loader.processes.jobs import run_job
from mbperf.loader.shard import Shard
from mbperf.loader.subject import Subject, fixed_words, resolve

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# These remove shared memory when their clients are gone; given a moment they leave nothing behind.
SHARED_MEMORY_MANAGERS = ("resource_tracker", "torch_shm_manager")
MANAGER_GRACE_S = 1.0


def prctl(option: int, value: int) -> None:
    """Call Linux prctl; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def serve(connection: Connection, build: Callable[[], Subject], shard: Shard) -> None:
    """Make the subject, tell what it is, then run one job after the other until the profiler hangs up."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the profiler decides what Ctrl-C ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an OpenMP pool made here would hang every fork that enters a parallel region
    before = running_threads()
    try:
        shard.announce()
        subject = build()
        # Imports leave a full collection due, which takes 0.1 s. Without this call every trial would run one,
        # while its consumer waits.
        gc.collect()
        connection.send(("ready", describe(subject) | {"forkable": forkable(before)}))
    except BaseException as error:
        connection.send(("failed", failure(error)))
        return
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        _serve_one(connection, subject, job, threads)


def failure(error: BaseException) -> str:
    """Return the one line that tells what went wrong, and where in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    user = [frame for frame in frames if stacks.is_users(frame.filename)]
    where = f" ({os.path.basename(user[-1].filename)}:{user[-1].lineno})" if user else ""
    return f"{type(error).__name__}: {error}{where}"


def running_threads() -> int:
    """Return how many threads this process has."""
    return psutil.Process().num_threads()


def forkable(threads_before: int) -> bool:
    """Tell whether trials may be forked: making the dataset started no thread and no CUDA context."""
    return sys.platform == "linux" and running_threads() <= threads_before and not torch.cuda.is_initialized()


def describe(subject: Subject) -> dict[str, Any]:
    """Return what the profiler has to know about the subject."""
    own = subject.own_settings()
    tensors = subject.tensors()
    return {
        "name": type(subject.dataset).__name__,
        "iterable": subject.iterable,
        "length": subject.share(),
        "own_settings": own.as_dict() if own else None,
        "loader_class": type(subject.template).__name__ if subject.template else None,
        "batches": subject.batches,
        "fixed_batches": subject.fixed_batches,
        "user_collate": subject.user_collate() is not None,
        "tensor_dataset": tensors is not None,
        "shuffled": subject.shuffled,
        "fixed_words": fixed_words(subject),
        "has_step": subject.step is not None,
        "accelerator": torch.accelerator.is_available() if hasattr(torch, "accelerator") else False,
    }


def _serve_one(connection: Connection, subject: Subject, job: dict[str, Any], threads: int) -> None:
    if job.get("inline"):
        _run(connection, subject, job, threads)
        connection.send(("exit", 0))
        return
    pid = os.fork()
    if pid == 0:
        _child(connection, subject, job, threads)
    _, status = os.waitpid(pid, 0)
    end_descendants()
    remove_shared_memory_of({pid} | stacks.pids(job["folder"]))
    connection.send(("exit", os.waitstatus_to_exitcode(status)))


def _child(connection: Connection, subject: Subject, job: dict[str, Any], threads: int) -> None:
    """Run the job in the forked process, and never return from it."""
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _run(connection, subject, job, threads)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def _run(connection: Connection, subject: Subject, job: dict[str, Any], threads: int) -> None:
    connection.send(("pid", os.getpid()))
    # Sockets of multiprocessing and the like go where the runner clears up: a trial does not end by exiting.
    tempfile.tempdir = os.environ["TMPDIR"] = job["folder"]
    torch.set_num_threads(threads)
    connection.send(("answer", run_job(subject, job)))


def end_descendants() -> None:
    """Kill and reap what a trial left running, orphans included (this process is their reaper)."""
    left = psutil.Process().children(recursive=True)
    managers = [process for process in left if manages_shared_memory(process)]
    for process in left:
        if process not in managers:
            with contextlib.suppress(psutil.Error):
                process.kill()
    _, stubborn = psutil.wait_procs(left, timeout=MANAGER_GRACE_S)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    remove_shared_memory_of(process.pid for process in left)


def manages_shared_memory(process: psutil.Process) -> bool:
    """Tell whether a process is one of those that remove the shared memory of others."""
    with contextlib.suppress(psutil.Error):
        return any(name in part for part in process.cmdline() for name in SHARED_MEMORY_MANAGERS)
    return False


def import_object(path: str) -> Any:
    """Return what `package.module:attribute` names.

    Raises:
        ValueError: the path has another form.
        ImportError, AttributeError: there is no such module or attribute.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f"loader: expected package.module:dataset, got {path!r}")
    found = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def build_subject(order: dict[str, Any]) -> Subject:
    """Return the subject an order describes: by import path (with arguments), or pickled in a file."""
    if "pickled" in order:
        with open(order["pickled"], "rb") as file:
            given = pickle.load(file)
        os.unlink(order["pickled"])
        return resolve(given.pop("dataset"), shard=order["shard"], **given)
    found = import_object(order["path"])
    if callable(found) and order.get("arguments"):
        found = found(**order["arguments"])
    fixed = dict(order["fixed"])
    for name in ("collate_fn", "step", "worker_init_fn"):
        if isinstance(fixed.get(name), str):
            fixed[name] = import_object(fixed[name])
    return resolve(found, shard=order["shard"], **fixed)


def main() -> None:
    """Serve over the descriptor named on the command line; the first message says what to make."""
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    begin = time.monotonic()
    order = connection.recv()
    from multiprocessing import spawn

    def build() -> Subject:
        os.environ["MBPERF_LOADER_TRIAL"] = (
            "1"  # a script without a main guard would start profiles without end
        )
        spawn.prepare(order["preparation"])
        subject = build_subject(order)
        subject.notes.append(f"made in {time.monotonic() - begin:.2f} s")
        return subject

    serve(connection, build, order["shard"])


if __name__ == "__main__":
    main()
