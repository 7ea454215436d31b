"""Every check of the doctor, in the order shown."""

from collections.abc import Callable, Sequence
from functools import partial

from mbperf import extras
from mbperf.doctor import heap, processor, software
from mbperf.doctor.finding import Finding

Check = Callable[[], Finding]

CHECKS: dict[str, Check] = {
    "mbperf": software.versions,
    "torch": software.torch,
    "extension": software.build,
    "instruction set": processor.instruction_set,
    "OpenMP": processor.openmp,
    "threads": processor.threads,
    "huge pages": processor.huge_pages,
    "memory cache": processor.memory_cache,
    "heap": heap.heap,
    "CUDA": processor.cuda,
    "lesson data": software.lesson_data,
    **{f"extra {name}": partial(software.extra, name) for name in extras.EXTRAS},
}


def examine(checks: dict[str, Check] | None = None) -> list[Finding]:
    """Run every check and return what each found."""
    return [result(subject, check) for subject, check in (CHECKS if checks is None else checks).items()]


def result(subject: str, check: Check) -> Finding:
    """Run one check; where it needs torch or the extension and they do not load, say so and go on.

    The extension raises ValueError for a setting in the environment that it does not know.
    """
    try:
        return check()
    except (ImportError, OSError, ValueError) as error:
        return Finding(subject, f"cannot tell: {software.first_line(error)}", "note")


def wrong(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that call for a remedy."""
    return [finding for finding in findings if finding.state == "wrong"]
