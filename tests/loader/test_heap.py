"""Repeated trials vary the state of the heap that large samples find."""

import subprocess
import sys

import pytest

from mbperf.loader.search.model import Consumer
from mbperf.loader.search.sweep import Budget, Sweep
from mbperf.loader.settings import Settings

# Small objects among samples of 3 MB: put into room below, or at the top, where they keep it mapped.
BATCHES = """
import ctypes, resource
from mbperf.loader.trial.memory import fill_heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])
room = [libc.malloc(200) for _ in range(200)]
for block in room[::2]:
    libc.free(block)
{prepare}
def batch():
    made = [(libc.malloc(200), libc.malloc(3 << 20)) for _ in range(32)]
    for small, large in made:
        ctypes.memset(large, 1, 3 << 20)
    for small, large in made:
        libc.free(large)
    for small, large in reversed(made):
        libc.free(small)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    batch()
before = faults()
for _ in range(5):
    batch()
print((faults() - before) * resource.getpagesize() / (5 * 32 * (3 << 20)))
"""


@pytest.mark.parametrize(("prepare", "low", "high"), [("", 0.9, 1.1), ("fill_heap()", 0.0, 0.2)])
def test_a_filled_heap_keeps_its_pages(prepare, low, high):
    """Return which share of the bytes of batches is faulted in again, in pages: load does not matter."""
    code = BATCHES.format(prepare=prepare)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert low <= float(done.stdout) <= high


class Recorder:
    """Stands for a runner: keeps the jobs."""

    def __init__(self):
        self.subject, self.jobs = {"has_step": False}, []

    def run(self, job, limit_s):
        self.jobs.append(job)
        return {"infeasible": "not run", "cause": "timeout"}


def test_repeated_trials_take_turns():
    runner = Recorder()
    sweep = Sweep(runner, Consumer(0.01, 64), Budget(60.0), 0.03, 0, lambda event, payload: None)
    for paced in (False, True, False, True, False):
        sweep.run_trial(Settings(), 0.1, 1.0, paced)
    assert [job["fill_heap"] for job in runner.jobs] == [True, True, False, False, True]
