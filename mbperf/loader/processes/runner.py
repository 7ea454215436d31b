"""Run jobs in fresh processes, each within its time: start them, listen, end whatever they left behind.

After `close` no process, descriptor, temporary file or shared-memory file of any trial is left.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TextIO

import torch

from mbperf import processors
from mbperf.loader.processes import causes, stacks
from mbperf.loader.processes.cleanup import KILL_WAIT_S, kill_tree, oom_kills
from mbperf.loader.search import limits
from mbperf.loader.shard import Shard
from mbperf.loader.source import LoaderError, Source
from mbperf.loader.subject import resolve
from mbperf.loader.trial.probe import CurrentIndex

FORKSERVER = "mbperf.loader.processes.forkserver"
READY_S = 120.0
HARD_GRACE_S = 1.0  # between a job's own alarm and its end by force: C code may hold up the alarm
LONGEST_FOLDER = 50  # mbperf-loader-*, pymp-* and listener-* add 54 more


@dataclass
class End:
    """How a job ended: its answer if it gave one, its exit status if known, whether it had to be stopped."""

    answer: dict[str, Any] | None = None
    status: int | None = None
    overran: bool = False


@dataclass
class Running:
    """A job that has begun: its limit, when it is ended by force, the kernel's kills for memory before."""

    job: dict[str, Any]
    limit_s: float
    deadline: float
    kills: int


class TrialRunner:
    """Run trials, each in a process of its own; use it as a context manager.

    Args:
        source: how the dataset gets there.
        ready_s: how long making the dataset may take.
        shard: which rank's part of the dataset trials read.
    """

    def __init__(self, source: Source, ready_s: float = READY_S, shard: Shard | None = None):
        self.source = source
        self.ready_s = ready_s
        self.shard = shard or Shard()
        self.host, self.cores = socket.gethostname(), processors.cores()
        self.folder = tempfile.mkdtemp(prefix="mbperf-loader-", dir=short_temporary_folder())
        self._log = TrialLog(self.folder)
        self.subject: dict[str, Any] = {}
        self._server: int | None = None
        self._popen: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._status: int | None = None
        self._deadline: float | None = None  # for making the dataset, while that goes on
        self._running: Running | None = None

    def __enter__(self) -> "TrialRunner":
        """Make the dataset in its process."""
        try:
            self.start()
            self.await_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End everything."""
        self.close()

    def run(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run one job and return its answer; a death or a silence becomes `infeasible` with its cause.

        Args:
            job: plain values; "job" names it.
            limit_s: the job's alarm; it is ended by force HARD_GRACE_S later.
        """
        self.begin(job, limit_s)
        return self.finish()

    def begin(self, job: dict[str, Any], limit_s: float) -> None:
        """Start a job; `finish` waits for its answer."""
        self.start()
        self.await_ready()
        assert self._connection is not None
        job = job | {
            "soft_limit_s": limit_s,
            "folder": self.folder,
            "scratch": os.path.join(self.folder, "index"),
            "inline": not self.reusable,
        }
        self._log.clear()
        stacks.clear(self.folder)
        kills = oom_kills()
        with contextlib.suppress(OSError):  # of a process that has died, which `finish` finds out
            self._connection.send(job)
        self._running = Running(job, limit_s, time.monotonic() + limit_s + HARD_GRACE_S, kills)

    def finish(self) -> dict[str, Any]:
        """Return the answer of the job that has begun."""
        assert self._running is not None
        running, self._running = self._running, None
        try:
            end = self._listen(running.deadline)
        except (EOFError, OSError):
            end = End(status=self._died())
        kills = oom_kills() - running.kills
        answer = end.answer or self._verdict(running.job, end, kills, running.limit_s)
        answer = causes.refine(answer, kills, self._log.tail())
        if not self.reusable or end.status is None:
            self._stop()
        return answer

    at_once = 1  # ranks whose trials run at the same time

    @property
    def cpus(self) -> float:
        """Processors that a trial has for itself."""
        return limits.usable_cpus()

    @property
    def reusable(self) -> bool:
        """True when trials are forked from one process; else each gets an interpreter of its own."""
        return bool(self.subject.get("forkable"))

    def close(self) -> None:
        """End everything that is left and remove the folder."""
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the process that makes the dataset, unless it is there."""
        if self._connection is not None:
            return
        self._deadline = time.monotonic() + self.ready_s
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        log = self._log.open()
        try:
            if self.source.live is not None:
                self._server = self._fork(theirs, log)
            else:
                self._popen = self._execute(theirs, log)
                self._server = self._popen.pid
        finally:
            theirs.close()
            os.close(log)
        if self._popen is not None:
            self._connection.send(self.source.order(self.folder) | {"shard": self.shard})

    def _execute(self, theirs: socket.socket, log: int) -> subprocess.Popen:
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [sys.executable, *flags, "-m", FORKSERVER]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        return subprocess.Popen(
            [*command, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=environment,
        )

    def _fork(self, theirs: socket.socket, log: int) -> int:
        """Fork this process; the child serves trials and never returns."""
        # At the top of this file it would be imported twice in the process that runs it with -m.
        from mbperf.loader.processes import forkserver

        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = line_by_line(1), line_by_line(2)
            os.environ["MBPERF_LOADER_TRIAL"] = "1"
            # The process that was forked may have had OpenMP's threads. A trial with more than one would wait
            # for them without end.
            torch.set_num_threads(1)
            live, fixed = self.source.live, self.source.fixed
            forkserver.serve(
                Connection(theirs.detach()), lambda: resolve(live, shard=self.shard, **fixed), self.shard
            )
        finally:
            os._exit(0)

    def await_ready(self) -> None:
        """Wait until the dataset is made.

        Raises:
            LoaderError: it cannot be made, or not in time.
        """
        if self._deadline is None:
            return
        deadline, self._deadline = self._deadline, None
        kind: str = "late"
        value: Any = None
        try:
            kind, value = self._receive(deadline) or (kind, value)
        except (EOFError, OSError):
            kind, value = "died", None
        if kind == "ready":
            self.subject = value
            return
        tail = self._log.tail()
        self._stop()
        if kind == "failed":
            raise LoaderError(f"profile: the dataset cannot be made in a fresh process: {value}")
        if kind == "late":
            raise LoaderError(f"profile: making the dataset took longer than {self.ready_s:.0f} s")
        raise LoaderError(
            f"profile: the process that makes the dataset died: {tail.strip()[-500:] or 'no output'}"
        )

    def _receive(self, deadline: float) -> tuple[str, Any] | None:
        """Return the next message, or None at the deadline. EOFError when the other side is gone."""
        assert self._connection is not None
        while True:
            if self._connection.poll(max(0.0, min(0.2, deadline - time.monotonic()))):
                return self._connection.recv()
            if not self._alive():
                if self._connection.poll(0):
                    return self._connection.recv()
                raise EOFError
            if time.monotonic() >= deadline:
                return None

    def _listen(self, deadline: float) -> "End":
        """Follow one job to its end."""
        end = End()
        trial: int | None = None
        while True:
            message = self._receive(deadline)
            if message is None:
                end.overran = end.answer is None
                end.status = self._end_by_force(trial)
                return end
            kind, value = message
            if kind == "pid":
                trial = value
            elif kind == "answer":
                end.answer = value
                deadline = time.monotonic() + KILL_WAIT_S
            elif kind == "exit":
                end.status = value
                return end

    def _end_by_force(self, trial: int | None) -> int | None:
        """Kill a trial that overran; return its status if the forkserver lives to report it."""
        if trial is None or trial == self._server:
            return None
        kill_tree(trial)
        with contextlib.suppress(EOFError, OSError):
            while message := self._receive(time.monotonic() + KILL_WAIT_S):
                if message[0] == "exit":
                    return message[1]
        return None

    def _alive(self) -> bool:
        if self._popen is not None:
            return self._popen.poll() is None
        if self._server is None:
            return False
        pid, status = os.waitpid(self._server, os.WNOHANG)
        if pid:
            self._status = os.waitstatus_to_exitcode(status)
            self._server = None
        return not pid

    def _died(self) -> int | None:
        """Return the exit status of the forkserver, and forget it."""
        status = self._popen.poll() if self._popen is not None else self._status
        self._stop()
        return status if status is not None else -signal.SIGKILL

    def _verdict(self, job: dict[str, Any], end: "End", kills: int, limit_s: float) -> dict[str, Any]:
        if end.overran:
            return {
                "cause": "timeout",
                "infeasible": self._timeout_words(job, f"no answer within {limit_s:.1f} s"),
            }
        cause, words = causes.of_status(end.status or 0, kills, self._log.tail())
        return {"cause": cause, "infeasible": words}

    def _timeout_words(self, job: dict[str, Any], words: str) -> str:
        if job["job"] == "probe":
            index, ago = CurrentIndex(job["scratch"]).get()
            if index >= 0:
                return f"{words}: dataset[{index}] was still running after {ago:.1f} s"
        where = stacks.where(self.folder)
        return f"{words}; {where}" if where else words

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            kill_tree(self._server)
        if self._popen is not None:
            self._popen.wait()
            self._popen = None
        elif self._server is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._server, 0)
        self._server = None


def short_temporary_folder() -> str:
    """Return a folder for temporary files whose sockets' paths stay below the 108 bytes that Unix allows."""
    folder = tempfile.gettempdir()
    return "/tmp" if len(folder) > LONGEST_FOLDER and os.access("/tmp", os.W_OK) else folder


class TrialLog:
    """The file that standard output and error of trials go to."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "log")

    def open(self) -> int:
        """Return a descriptor to append with; it is not inherited by programs that are executed."""
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def clear(self) -> None:
        """Forget what earlier trials printed."""
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)

    def tail(self, size: int = 20_000) -> str:
        """Return the end of what the current trial printed."""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(max(0, os.path.getsize(self.path) - size))
            return file.read().decode(errors="replace")
        return ""


def line_by_line(descriptor: int) -> TextIO:
    """Return a stream that a process which is killed leaves nothing in."""
    return os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace", closefd=False)
