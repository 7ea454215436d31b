"""What the state of glibc's heap is worth on this machine: F.cross_entropy at a language model's size.

Three fresh processes take turns: as this one was started, with huge pages for the heap, and with every page
recycled ("Memory Allocation Tunables" in the manual of glibc). Run as a module, this is one of them.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mbperf import processors
from mbperf.doctor.finding import Finding
from mbperf.doctor.software import torch_module
from mbperf.measure.heap import RECYCLED, TUNABLES, has_states

CLASSES, ROWS = 32_000, (512, 256, 128, 64)
BYTES_A_LOGIT = 16  # logits, their log-softmax and two gradients, float32
AS_IT_IS, HUGE = "as it is", "hugetlb"
SETTINGS = {AS_IT_IS: "", HUGE: "glibc.malloc.hugetlb=1", RECYCLED: TUNABLES[RECYCLED]}
UNTIMED, ROUNDS = 4, 9  # after two calls a recycled heap may still have to grow
CLEAR_GAIN = 1.1  # in the medians, and faster in all rounds but two
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Timing:
    """Of one setting: seconds and page faults of a call in each round."""

    seconds: Sequence[float]
    page_faults: Sequence[float]

    def gain(self, base: "Timing") -> float:
        """Return how many times as fast as another setting this one is."""
        return statistics.median(base.seconds) / statistics.median(self.seconds)

    def gains_clearly(self, base: "Timing") -> bool:
        """Whether it is faster by more than chance and more than nothing."""
        faster = sum(its < mine for its, mine in zip(self.seconds, base.seconds, strict=True))
        return self.gain(base) >= CLEAR_GAIN and faster >= len(base.seconds) - 2

    def __str__(self) -> str:
        """Return both medians in words."""
        faults = statistics.median(self.page_faults)
        return f"{statistics.median(self.seconds) * 1e3:.1f} ms with {faults:,.0f} page faults"


def heap() -> Finding:
    """Tell what recycled and huge pages gain for large tensors here, and the line that brings it."""
    torch_module()
    if not has_states():
        return Finding("heap", "not glibc's: the settings that keep its pages do not apply")
    rows = rows_that_fit(available_bytes())
    if rows is None:
        return Finding("heap", "cannot tell: too little memory is free to measure", "note")
    timings = measured(rows)
    base = timings[AS_IT_IS]
    others = {name: timing for name, timing in timings.items() if name != AS_IT_IS}
    told = "; ".join(f"{name} {timing} ({timing.gain(base):.1f}x)" for name, timing in others.items())
    fact = f"F.cross_entropy forward and backward at {rows}x{CLASSES}: {base}; {told}"
    values = {"rows": rows, "classes": CLASSES} | {
        name: {
            "time_s": statistics.median(timing.seconds),
            "page_faults": statistics.median(timing.page_faults),
        }
        for name, timing in timings.items()
    }
    gaining = [name for name in (RECYCLED, HUGE) if timings[name].gains_clearly(base)]
    return Finding("heap", fact, "note" if gaining else "ok", remedy(gaining), values)


def remedy(gaining: Sequence[str]) -> str:
    """Return the line to export for each setting that gains.

    >>> remedy(["hugetlb"])
    'export GLIBC_TUNABLES=glibc.malloc.hugetlb=1'
    """
    lines = [f"export GLIBC_TUNABLES={SETTINGS[name]}" for name in gaining]
    if RECYCLED in gaining:
        lines[0] += " (the process then gives no memory back until it ends)"
    return ", or ".join(lines)


def rows_that_fit(free_bytes: int) -> int | None:
    """Return the most rows for which all settings together take half of the free memory at most.

    >>> rows_that_fit(8 << 30), rows_that_fit(1 << 30), rows_that_fit(1 << 20)
    (512, 256, None)
    """
    needed = len(SETTINGS) * BYTES_A_LOGIT * CLASSES
    return next((rows for rows in ROWS if 2 * needed * rows <= free_bytes), None)


def available_bytes() -> int:
    """Return the memory that is free, or can be, within the limits of the control groups."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", processors.read(MEMINFO) or "", re.MULTILINE)
    available, left = int(found[1]) * 1024 if found else 0, processors.memory_left()
    return available if left is None else min(available, left)


def measured(rows: int) -> dict[str, Timing]:
    """Return the timing of each setting; the processes start together and then take turns.

    Raises:
        ChildProcessError: one of them did not answer.
    """
    with ExitStack() as ends:
        children = {name: ends.enter_context(_Child(setting, rows)) for name, setting in SETTINGS.items()}
        for child in children.values():
            child.answer()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in children}
        for _ in range(ROUNDS):
            for name, child in children.items():
                found[name].append(child.turn())
    return {name: Timing(*zip(*its, strict=True)) for name, its in found.items()}


class _Child:
    """A fresh interpreter with a setting of the heap; killed when the block is left."""

    def __init__(self, setting: str, rows: int) -> None:
        tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES", ""), setting]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"GLIBC_TUNABLES": tunables},
            text=True,
        )

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def turn(self) -> tuple[float, float]:
        """Have it make a call, and return seconds and page faults."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, faults = self.answer().split()
        return float(seconds), float(faults)

    def answer(self) -> str:
        """Return its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"a process that measures ended with code {self._process.wait()}")
        return line


def serve(rows: int) -> None:
    """Say "ready" once the heap has settled, then make a call for each line and print what it took."""
    import torch

    from mbperf.measure.covariates import page_faults

    logits = torch.randn(rows, CLASSES, requires_grad=True)
    target = torch.randint(0, CLASSES, (rows,))

    def call() -> None:
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)

    for _ in range(UNTIMED):
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        faults, start = page_faults(), time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        print(seconds, page_faults() - faults, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
