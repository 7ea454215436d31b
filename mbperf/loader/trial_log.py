"""What trials print: one file in the nursery's folder, emptied before each, read when one dies."""

import contextlib
import os
from typing import TextIO


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
