"""What may excuse a round: time the machine took away, seen from outside the times themselves.

A round is never judged by its own value; only by involuntary context switches of this process and by
CPU time the hypervisor stole.
"""

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC_STAT = Path("/proc/stat")
STEAL_FIELD = 8  # "cpu user nice system idle iowait irq softirq steal"; proc(5)

# An otherwise idle 2-core virtual machine shows 75 a second to two busy threads (kernel threads, mostly); one
# may fall into any round.
SWITCHES_PER_S, SWITCHES_ALLOWED = 200.0, 1
STEAL_SHARE = 0.01
MOST_DROPPED = 0.3


@dataclass(frozen=True)
class Covariates:
    """Involuntary context switches (count) and stolen CPU time (seconds), as counters or as a difference."""

    switches: int
    steal_s: float

    def since(self, earlier: "Covariates") -> "Covariates":
        """Return what was counted after `earlier`."""
        return Covariates(self.switches - earlier.switches, self.steal_s - earlier.steal_s)


Reader = Callable[[], Covariates]


def read() -> Covariates:
    """Return the counters of this process and machine as they stand.

    >>> read().switches >= 0
    True
    """
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return Covariates(switches, _steal_s())


def page_faults() -> int:
    """Return how many pages the system has handed this process so far without reading a disk.

    >>> page_faults() > 0
    True
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _steal_s() -> float:
    """Stolen time since boot over all CPUs; 0 where the system does not tell."""
    try:
        with PROC_STAT.open() as file:
            fields = file.readline().split()
        return int(fields[STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def disturbed(seen: Sequence[Covariates], round_s: Sequence[float]) -> tuple[list[bool], bool]:
    """Say which rounds to drop, and whether the group is noisy.

    Args:
        seen: covariates of each round.
        round_s: how long each round took in all.

    Returns:
        One flag per round, and True where so many rounds were disturbed (over 30 %) that all are kept.

    >>> disturbed([Covariates(0, 0.0)] * 9 + [Covariates(9, 0.0)], [0.01] * 10)[0][-1]
    True
    """
    flags = [is_disturbed(one, seconds) for one, seconds in zip(seen, round_s, strict=True)]
    noisy = sum(flags) > MOST_DROPPED * len(flags)
    return ([False] * len(flags), True) if noisy else (flags, False)


def is_disturbed(one: Covariates, round_s: float) -> bool:
    """Say whether a round that took so long may be dropped.

    >>> is_disturbed(Covariates(1, 0.0), 0.01)
    False
    """
    return one.switches > SWITCHES_ALLOWED + SWITCHES_PER_S * round_s or one.steal_s > STEAL_SHARE * round_s
