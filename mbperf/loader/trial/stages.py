"""Time per stage of an instrumented run: stand-ins that note times, and their summary.

Each process appends records of fixed size to its own file, so nothing travels with the batches and a worker
that dies leaves what it had. Clock: CLOCK_MONOTONIC, the same in all processes of a machine.
"""

import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from mbperf.loader.subject import Hooks

START, FETCH, COLLATE, SLOW = range(4)
RECORD = struct.Struct("<ddqi")  # begin s, end s, samples or index, kind
SLOWEST = 10


class Journal:
    """One file of records per process, opened when first written (so it survives fork and pickling)."""

    def __init__(self, folder: str):
        self.folder = folder
        self._owner = -1
        self._file = -1

    def write(self, kind: int, begin: float, end: float, count: int) -> None:
        """Append one record."""
        if self._owner != os.getpid():
            info = get_worker_info()
            name = "main" if info is None else f"worker-{info.id}"
            path = os.path.join(self.folder, f"{name}.journal")
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._owner = os.getpid()
        os.write(self._file, RECORD.pack(begin, end, count, kind))

    def __getstate__(self) -> dict[str, Any]:
        """Return the folder alone: another process opens its own file."""
        return {"folder": self.folder, "_owner": -1, "_file": -1}


class SlowestSamples:
    """Keep the slowest few samples seen by this process and note each newcomer in the journal."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.times: list[float] = []

    def saw(self, index: int, begin: float, end: float) -> None:
        """Take one sample's time into account."""
        spent = end - begin
        if len(self.times) == SLOWEST and spent <= self.times[0]:
            return
        self.times = sorted([*self.times, spent])[-SLOWEST:]
        self.journal.write(SLOW, begin, end, index)


class _Transparent:
    """Attribute access goes to the user's dataset, so code that reads or sets its attributes still works."""

    def __init__(self, inner: Any, journal: Journal):
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_journal", journal)
        object.__setattr__(self, "_slowest", SlowestSamples(journal))

    def __getattr__(self, name: str) -> Any:
        if name in (
            "_inner",
            "_journal",
            "_slowest",
            "__getitems__",
        ):  # absent while unpickling; ours to decide
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._inner)


class TimedMapDataset(_Transparent):
    """A map-style dataset that notes how long each batch, and the slowest samples, took."""

    def __getitem__(self, index: Any) -> Any:
        """Return one sample, for loaders that do not batch."""
        begin = time.monotonic()
        sample = self._inner[index]
        self._journal.write(FETCH, begin, time.monotonic(), 1)
        return sample

    def __getitems__(self, indices: list) -> Any:
        """Return the samples of a batch, as DataLoader's fetcher asks for them."""
        clock = time.monotonic
        begin = clock()
        inner = getattr(self._inner, "__getitems__", None)
        if inner:
            samples = inner(indices)
        else:
            samples, before = [], begin
            for index in indices:
                samples.append(self._inner[index])
                now = clock()
                self._slowest.saw(index if isinstance(index, int) else -1, before, now)
                before = now
        self._journal.write(FETCH, begin, clock(), len(indices))
        return samples


class TimedIterableDataset(_Transparent, IterableDataset):
    """An iterable-style dataset that notes how long each sample took; a sample's index is its position."""

    def __iter__(self) -> Iterator:
        """Yield the user's samples."""
        clock = time.monotonic
        position = 0
        samples = iter(self._inner)
        while True:
            begin = clock()
            try:
                sample = next(samples)
            except StopIteration:
                return
            end = clock()
            self._slowest.saw(position, begin, end)
            self._journal.write(FETCH, begin, end, 1)
            position += 1
            yield sample


@dataclass
class TimedCollate:
    """A collate_fn that notes how long each batch took."""

    collate: Callable
    journal: Journal

    def __call__(self, samples: Any) -> Any:
        """Return the batch."""
        begin = time.monotonic()
        batch = self.collate(samples)
        self.journal.write(
            COLLATE, begin, time.monotonic(), len(samples) if hasattr(samples, "__len__") else 1
        )
        return batch


@dataclass
class TimedInit:
    """A worker_init_fn that notes when the worker was ready for the user's own."""

    init: Callable | None
    journal: Journal

    def __call__(self, worker_id: int) -> None:
        """Note the start, then run the user's own."""
        now = time.monotonic()
        self.journal.write(START, now, now, worker_id)
        if self.init is not None:
            self.init(worker_id)


def timed_hooks(folder: str) -> Hooks:
    """Return the hooks whose journals go into `folder`."""
    journal = Journal(folder)

    def wrap_dataset(dataset: Any) -> Any:
        kind = TimedIterableDataset if isinstance(dataset, IterableDataset) else TimedMapDataset
        return kind(dataset, journal)

    return Hooks(
        wrap_dataset, lambda collate: TimedCollate(collate, journal), lambda init: TimedInit(init, journal)
    )


@dataclass
class Record:
    """One journal entry; `count` is the samples of a fetch or collate, the index of a slow sample."""

    begin: float
    end: float
    count: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass
class Stages:
    """The journals of one process, by kind."""

    starts: list[Record] = field(default_factory=list)
    fetches: list[Record] = field(default_factory=list)
    collates: list[Record] = field(default_factory=list)
    slow: list[Record] = field(default_factory=list)


def read_journals(folder: str) -> dict[str, Stages]:
    """Return every process's records: "main", "worker-0", ..."""
    journals = {}
    for path in sorted(Path(folder).glob("*.journal")):
        stages = Stages()
        kinds = (stages.starts, stages.fetches, stages.collates, stages.slow)
        data = path.read_bytes()
        whole = len(data) - len(data) % RECORD.size  # a killed process may leave half a record
        for begin, end, count, kind in RECORD.iter_unpack(data[:whole]):
            kinds[kind].append(Record(begin, end, count))
        journals[path.stem] = stages
    return journals


def summarise_stages(
    journals: dict[str, Stages], num_workers: int, begin: float, arrivals: list[tuple[float, float]]
) -> dict[str, Any]:
    """Return the figures of an instrumented run.

    Args:
        journals: records per process, from `read_journals`.
        num_workers: of the configuration.
        begin: when the loader was first asked for its iterator (monotonic s).
        arrivals: (asked, arrived) of each batch at the consumer.

    Returns:
        Plain values: seconds per sample (getitem) and per batch (collate, transfer), shares between 0 and 1.
    """
    end = arrivals[-1][1] if arrivals else begin
    workers = {name: stages for name, stages in journals.items() if name.startswith("worker-")}
    every = list(journals.values())
    return {
        "batches": len(arrivals),
        "getitem_s": _per_sample([record for stages in every for record in stages.fetches]),
        "collate_s": _mean([record.seconds for stages in every for record in stages.collates]),
        "transfer_s": _transfer(workers, num_workers, arrivals),
        "slowest": _slowest(every),
        "busy_share": {name: _busy(stages, begin, end) for name, stages in sorted(workers.items())},
        "imbalance": _imbalance(workers),
    } | _first_batch(journals, num_workers, begin, arrivals)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _per_sample(fetches: list[Record]) -> float | None:
    samples = sum(record.count for record in fetches)
    return sum(record.seconds for record in fetches) / samples if samples else None


def _slowest(every: list[Stages]) -> list[tuple[int, float]]:
    seen: dict[int, float] = {}
    for stages in every:
        for record in stages.slow:
            seen[record.count] = max(seen.get(record.count, 0.0), record.seconds)
    return sorted(seen.items(), key=lambda pair: -pair[1])[:SLOWEST]


def _busy(stages: Stages, begin: float, end: float) -> float:
    """Share of a worker's life, from ready to the last arrival, spent fetching and collating."""
    ready = stages.starts[0].begin if stages.starts else begin
    worked = sum(
        max(0.0, min(r.end, end) - r.begin) for r in [*stages.fetches, *stages.collates] if r.begin < end
    )
    return min(1.0, worked / (end - ready)) if end > ready else 0.0


def _imbalance(workers: dict[str, Stages]) -> float | None:
    """Busiest worker's working time over the mean, less 1: 0 is perfectly even."""
    worked = [sum(r.seconds for r in [*stages.fetches, *stages.collates]) for stages in workers.values()]
    mean = statistics.fmean(worked) if worked else 0.0
    return max(worked) / mean - 1 if mean > 0 else None


def _transfer(
    workers: dict[str, Stages], num_workers: int, arrivals: list[tuple[float, float]]
) -> float | None:
    """Median time from collated (in the worker) to handed over, of batches the consumer was waiting for.

    Batches come from the workers in turn, so batch k is the (k // workers)-th of worker k % workers.
    """
    delays = []
    for k, (asked, arrived) in enumerate(arrivals):
        stages = workers.get(f"worker-{k % num_workers}") if num_workers else None
        if stages is None or k // num_workers >= len(stages.collates):
            continue
        collated = stages.collates[k // num_workers].end
        if asked <= collated <= arrived:
            delays.append(arrived - collated)
    return statistics.median(delays) if delays else None


def _first_batch(
    journals: dict[str, Stages], num_workers: int, begin: float, arrivals: list[tuple[float, float]]
) -> dict[str, Any]:
    """Split the time to the first batch: start of its worker, fetch and collate, the rest."""
    if not arrivals:
        return {"first_batch": None}
    maker = journals.get("worker-0" if num_workers else "main", Stages())
    first = arrivals[0][1] - begin
    started = maker.starts[0].begin - begin if maker.starts else 0.0
    made = maker.collates[0].end if maker.collates else None
    every_start = [s.starts[0].begin - begin for s in journals.values() if s.starts]
    return {
        "first_batch": {
            "total_s": first,
            "start_worker_s": started,
            "start_all_workers_s": max(every_start, default=0.0),
            "fetch_and_collate_s": made - begin - started if made is not None else None,
            "hand_over_s": arrivals[0][1] - made if made is not None else None,
        }
    }
