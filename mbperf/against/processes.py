"""The parent's side of a tree's processes: start them, ask them, end them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mbperf.measure import heap
from mbperf.measure.rounds import Call

SCRIPT = Path(__file__).with_name("serve.py")
# Importing torch and collecting take 4 s alone; a judge beside other work took 69 s.
TIMEOUT_S = 180.0


class TreeFailed(RuntimeError):
    """A tree's process raised, died or took too long; the message says which."""


@dataclass
class TreeProcess:
    """A fresh interpreter that has collected a tree's groups and serves one at a time in forks of its own.

    Args:
        name: of the tree, for messages.
        tree: its folder.
        selection: pytest's arguments, such as `-k collate`.
        state: of the heap, see `mbperf.measure.heap`.
        hash_seed: of strings; one for all processes of a pass, so that dicts collide alike in each tree.
    """

    name: str
    tree: Path
    selection: Sequence[str]
    state: str
    hash_seed: int = 0
    switches: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _pipe: Connection | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Start the interpreter; `ready` waits for it."""
        self._pipe, its = Pipe()
        arguments = [str(its.fileno()), str(self.tree), *self.selection]
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,  # a Ctrl-C reaches the parent alone, and all of this ends together
            )
        finally:
            its.close()

    def _environment(self) -> dict[str, str]:
        """What is set from outside, so that a tree of any age obeys it."""
        its = {"GLIBC_TUNABLES": tunables(self.state), "PYTHONHASHSEED": str(self.hash_seed)}
        return os.environ | its

    def ready(self) -> dict[str, Any]:
        """Wait until the tree is collected, and return its groups and facts."""
        self.facts = self._answer()
        return self.facts

    def ask(self, *message: Any) -> Any:
        """Send a message and return the answer.

        Raises:
            TreeFailed: the process failed; it is ended, and can be started afresh.
        """
        assert self._pipe is not None
        with suppress(OSError):  # it died before it was asked; how, says the answer
            self._pipe.send(message)
        return self._answer()

    def tell(self, *message: Any) -> None:
        """Send a message that has no answer."""
        assert self._pipe is not None
        self._pipe.send(message)

    def _answer(self) -> Any:
        assert self._pipe is not None
        assert self._process is not None
        try:
            if not self._pipe.poll(TIMEOUT_S):
                raise TreeFailed(f"{self.name}: its process did not answer within {TIMEOUT_S:.0f} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise TreeFailed(f"{self.name}: its process ended with code {code}") from None
        if kind == "error":
            raise TreeFailed(f"{self.name}: {value}")
        return value

    def end(self) -> None:
        """End the interpreter and whatever it started."""
        if self._process is not None:
            kill_session(self._process)
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


@dataclass(frozen=True)
class RemoteCall:
    """The subject of the group that a process serves, on one of its input sets.

    Called, it warms up there; `seconds` is how a timer of rounds has it make `n` calls.
    """

    process: TreeProcess
    number: int

    def __call__(self) -> None:
        """Make a few untimed calls."""
        self.seconds(0)

    def seconds(self, n: int) -> float:
        """Make `n` calls and return the seconds they took together."""
        seconds, self.process.switches = self.process.ask(self.number, n)
        return float(seconds)


def remote_timer(call: Call, n: int) -> float:
    """Time calls where they are made, as `mbperf.measure.rounds.Timer` asks."""
    assert isinstance(call, RemoteCall)
    return call.seconds(n)


def tunables(state: str) -> str:
    """Return GLIBC_TUNABLES for a state of the heap, beside what the user has set."""
    return ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES", ""), heap.TUNABLES[state]]))


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, and all others in its group; then wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """End a process that leads a session when the block is left, however it is left."""
    try:
        yield process
    finally:
        kill_session(process)
