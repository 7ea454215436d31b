"""Find where a loader hangs: each worker process writes its stack, when asked, into a file of its own.

The handler is C code (faulthandler), so it answers from inside C code too. Workers do not share a file:
faulthandler writes a stack in pieces, and two workers that write at once would mix their lines.
"""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

STANDARD_LIBRARY = os.path.dirname(os.__file__)
WORKER_LOOP = "torch/utils/data/_utils/worker.py"
STARTS_WORKERS = "torch/utils/data/dataloader.py"
# Frames outside these are not the dataset's; stages.py holds the profiler's own stand-ins.
LOOPS = (WORKER_LOOP, "mbperf/loader/trial/time_loader.py", "mbperf/loader/processes/jobs.py")
STAND_INS = "mbperf/loader/trial/stages.py"
FRAME = re.compile(r'^  File "([^"]+)", line (\d+) in (\S+)\n', re.MULTILINE)


def listen(folder: str) -> None:
    """Let every process that is forked from this one from now on answer `ask`, with a file in `folder`."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _open(folder))


def _open(folder: str) -> None:
    with contextlib.suppress(OSError):  # out of descriptors: this worker cannot be asked
        file = os.open(_path(folder, os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)


def _path(folder: str, pid: int) -> str:
    return os.path.join(folder, f"stack-{pid}")


def ask(folder: str, pids: Iterable[int], wait_s: float) -> None:
    """Ask processes for their stacks; wait until one of them tells a place in the user's code."""
    asked = [pid for pid in pids if os.path.exists(_path(folder, pid))]  # another would die of the signal
    for pid in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + wait_s
    while asked and _place_of_any(_dumps(folder)) is None and time.monotonic() < until:
        time.sleep(0.01)


def pids(folder: str) -> set[int]:
    """Return every process that was forked from the job's, dead or alive: each has a file."""
    return {int(path.name.removeprefix("stack-")) for path in Path(folder).glob("stack-*")}


def clear(folder: str) -> None:
    """Forget the stacks of an earlier job."""
    for path in Path(folder).glob("stack-*"):
        path.unlink(missing_ok=True)


def where(folder: str) -> str | None:
    """Return in words where the workers that were asked stood, the most telling first; None if unknown."""
    dumps = _dumps(folder)
    if place := _place_of_any(dumps):
        return f"a worker was at {place}"
    if any(STARTS_WORKERS in dump and WORKER_LOOP not in dump for dump in dumps):
        return "a worker was still starting"
    return None


def _dumps(folder: str) -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(Path(folder).glob("stack-*"))]


def _place_of_any(dumps: list[str]) -> str | None:
    places = (place_of((path, int(line), name) for path, line, name in FRAME.findall(d)) for d in dumps)
    return next((place for place in places if place), None)


def where_raised(traceback_: TracebackType | None) -> str | None:
    """Return the innermost place of the user's code in the traceback of what an alarm's handler raised."""
    frames = [(frame.filename, frame.lineno or 0, frame.name) for frame in traceback.extract_tb(traceback_)]
    return place_of(reversed(frames[:-1]))  # the last is the handler


def place_of(frames: Iterable[tuple[str, int, str]]) -> str | None:
    """Return `file:line in function` of the first frame that is the user's, coming from the innermost."""
    for path, line, function in frames:
        if path.endswith(LOOPS):
            return None
        if is_users(path):
            return f"{_short(path)}:{line} in {function}"
    return None


def is_users(path: str) -> bool:
    """Tell whether a source file is neither Python's, nor torch's, nor one of the profiler's stand-ins."""
    library = path.startswith((STANDARD_LIBRARY, sys.base_prefix)) and "site-packages" not in path
    return not (library or path.startswith("<frozen") or "/torch/" in path or path.endswith(STAND_INS))


def _short(path: str) -> str:
    """Return a file's name, with its folder's where the name alone says nothing."""
    parts = path.rsplit("/", 2)
    return "/".join(parts[-2:]) if parts[-1] == "__init__.py" else parts[-1]
