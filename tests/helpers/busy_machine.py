"""Measure how much of the machine others used meanwhile: the covariate that makes a measurement void."""

import os
from pathlib import Path

import psutil

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class OthersLoad:
    """A context manager; afterwards `share` is the part of all processors that other processes used.

    Processes that this one started count as its own once they have ended and been waited for.
    """

    def __enter__(self):
        self.share = None
        self.before = machine_and_own()
        return self

    def __exit__(self, *exception):
        (total, idle, own), (total_0, idle_0, own_0) = machine_and_own(), self.before
        spent = total - total_0
        busy = spent - (idle - idle_0)
        self.share = max(0.0, (busy - (own - own_0)) / spent) if spent > 0 else 0.0


def machine_and_own():
    """Return seconds of all processors: in all, idle, and used by this process and its children."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    times = psutil.Process().cpu_times()
    own = times.user + times.system + times.children_user + times.children_system
    return sum(ticks) / TICKS_PER_S, (ticks[3] + ticks[4]) / TICKS_PER_S, own
