"""Trials of several ranks at once: they begin together, and each loads on until all have been timed."""

import time
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed as dist
from torch.utils.data import DataLoader

from mbperf.loader.trial.time_loader import TrialInterrupted

PAUSE_S = 1e-3
CONNECT_S = 10.0


class Gate:
    """Where the trials of all ranks meet; a context manager, whose end counts as having passed.

    Waiting never blocks in C++: the trial's alarm ends it.

    Args:
        where: host and port of the profiler's store, and the name of this meeting; None: a rank alone.
        ranks: how many meet.
    """

    def __init__(self, where: tuple[str, int, str] | None, ranks: int):
        self._ranks, self._told, self._store = ranks, set[str](), None
        if where is not None:
            host, port, self._name = where
            limit = timedelta(seconds=CONNECT_S)
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)

    def __enter__(self) -> "Gate":
        """Begin."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the others go on, whatever happened here."""
        self._tell("here")
        self._tell("timed")

    def arrive(self) -> None:
        """Wait until every rank has come this far."""
        self._tell("here")
        while not self._all("here"):
            time.sleep(PAUSE_S)

    def load_on(self, loader: DataLoader, batches: Iterator) -> None:
        """Load until every rank has been timed: who stops early leaves the others more of the machine."""
        self._tell("timed")
        try:
            while not self._all("timed"):
                if next(batches, None) is None:
                    batches = iter(loader)
        except TrialInterrupted:
            pass  # what was timed is whole; the rank that the others waited for says why

    def _tell(self, what: str) -> None:
        if self._store is not None and what not in self._told:
            self._told.add(what)
            self._store.add(f"{self._name}/{what}", 1)

    def _all(self, what: str) -> bool:
        return self._store is None or self._store.add(f"{self._name}/{what}", 0) >= self._ranks
