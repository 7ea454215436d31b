"""Turn an exception, an exit status or silence into one line that says why a configuration could not run."""

import re
import signal
from typing import Any

CAUSES = (
    "out_of_memory",
    "shared_memory",
    "descriptors",
    "pickling",
    "timeout",
    "exception",
    "killed",
    "setup",
    "empty",
)

_PATTERNS = (
    (
        "shared_memory",
        r"bus error|out of shared memory|allocate shared memory|unable to mmap|shm_open|/dev/shm",
    ),
    ("descriptors", r"too many open files|received \d+ items of ancdata|Errno 24"),
    (
        "pickling",
        r"can't pickle|cannot pickle|PicklingError|Can't get local object|Can't get attribute|not picklable",
    ),
    (
        "out_of_memory",
        r"MemoryError|can't allocate memory|Cannot allocate memory|DefaultCPUAllocator",
    ),
    ("killed", r"killed by signal|exited unexpectedly|ConnectionResetError|ConnectionRefusedError|EOFError"),
)

_ADVICE = {
    "shared_memory": "/dev/shm is full (raise it, e.g. docker --shm-size, or lower batch, prefetch, workers)",
    "descriptors": "too many open files (raise ulimit -n, or lower prefetch or workers)",
    "pickling": "does not pickle, which this start method needs",
    "out_of_memory": "out of memory",
    "killed": "a worker died, as when the kernel ends a process for memory",
}


def of_exception(error: BaseException) -> tuple[str, str]:
    """Return (cause, words) for an exception that ended a trial."""
    text = f"{type(error).__name__}: {error}"
    for cause, pattern in _PATTERNS:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            return cause, f"{_ADVICE[cause]}: {last_line(text)}"
    return "exception", last_line(text)


def refine(answer: dict[str, Any], oom_kills: int, log_tail: str) -> dict[str, Any]:
    """Correct a failed trial's answer by the kernel's count of kills and by what workers printed last."""
    if answer.get("cause") not in ("killed", "timeout"):
        return answer
    cause, words = of_text(log_tail, "")
    if cause != "killed":
        return {"cause": cause, "infeasible": words}
    if not oom_kills or answer["cause"] == "timeout":
        return answer
    return answer | {
        "cause": "out_of_memory",
        "infeasible": f"the kernel ran out of memory: {answer['infeasible']}",
    }


def last_line(text: str) -> str:
    """Return what was raised: the last line of the original traceback, or the first line there is."""
    if "Original Traceback" in text:
        lines = [line for line in text.strip().splitlines() if line.strip()]
        raised = [
            line
            for line in lines
            if re.match(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)?(:|$)", line)
        ]
        return (raised[-1] if raised else lines[-1]).strip()[:300]
    return text.strip().splitlines()[0][:300]


def of_status(status: int, oom_kills: int, log_tail: str) -> tuple[str, str]:
    """Return (cause, words) for a trial whose process ended without an answer.

    Args:
        status: exit status, negative for a signal (as in `subprocess`).
        oom_kills: how many processes the kernel killed for memory meanwhile.
        log_tail: the end of what the trial printed.
    """
    if status >= 0:
        return of_text(log_tail, f"exit status {status}")
    name = signal.Signals(-status).name
    if -status == signal.SIGBUS:
        return "shared_memory", f"{name}: {_ADVICE['shared_memory']}"
    if -status == signal.SIGKILL and oom_kills:
        return "out_of_memory", f"{name}: the kernel ran out of memory"
    if -status == signal.SIGKILL:
        return "killed", f"{name}: killed from outside (no out-of-memory kill was counted)"
    return of_text(log_tail, name)


def of_text(text: str, otherwise: str) -> tuple[str, str]:
    """Return (cause, words) from what a process printed before it ended."""
    for cause, pattern in _PATTERNS:
        found = re.search(rf".*(?:{pattern}).*", text, re.IGNORECASE)
        if found:
            return cause, f"{_ADVICE[cause]}: {found.group(0).strip()[:200]}"
    tail = text.strip().splitlines()
    return "killed", f"{otherwise}: {tail[-1][:200]}" if tail else otherwise
