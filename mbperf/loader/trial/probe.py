"""Measure in one process, for a second, what a dataset costs: a sample, collating, bytes of a batch.

These costs feed the model of the rate (model.py); they also find a sample that raises or hangs, by its index.
"""

import itertools
import mmap
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from mbperf.loader.settings import Settings
from mbperf.loader.subject import Subject
from mbperf.loader.trial.time_loader import TrialInterrupted, rng_left_as_found

MAX_SAMPLES = 4096
COLLATE_REPEATS = 5


@dataclass
class Costs:
    """Single-process costs. Seconds per sample or batch, bytes per batch of `batch_size` samples."""

    getitem_s: float = 0.0
    getitem_cpu_s: float = 0.0
    getitem_p50_s: float = 0.0
    getitem_p99_s: float = 0.0
    first_getitem_s: float = 0.0
    samples: int = 0
    batch_size: int | None = None
    collate_s: dict[str, float] = field(default_factory=dict)
    collate_error: dict[str, str] = field(default_factory=dict)
    tensor_dataset_s: float | None = None
    pin_s: float | None = None
    batch_bytes: int = 0
    tensors_per_batch: int = 0
    slowest: list[tuple[int, float]] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    collate_agrees: bool = False
    exhausted: bool = False
    seconds: float = 0.0


class CurrentIndex:
    """The index being fetched, in a mapped file: readable from outside when the process hangs in C code."""

    LAYOUT = struct.Struct("<qd")
    NONE = -1

    def __init__(self, path: str):
        with open(path, "a+b") as file:
            file.truncate(self.LAYOUT.size)
            self._map = mmap.mmap(file.fileno(), self.LAYOUT.size)

    def set(self, index: int) -> None:
        """Note that the fetch of `index` begins now."""
        self.LAYOUT.pack_into(self._map, 0, index, time.monotonic())

    def get(self) -> tuple[int, float]:
        """Return the index being fetched, or NONE, and how many seconds ago its fetch began."""
        index, began = self.LAYOUT.unpack_from(self._map, 0)
        return (index if began else self.NONE), time.monotonic() - began


def leaves(batch: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of a batch."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from leaves(value)


def batch_bytes(batch: Any) -> tuple[int, int]:
    """Return the bytes and the number of the tensors of a batch."""
    tensors = list(leaves(batch))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), len(tensors)


def indices_to_try(length: int, shuffled: bool, seed: int) -> Iterator[int]:
    """Yield sample indices in the order a loader would read them."""
    if not shuffled:
        return iter(range(length))
    chosen = random.Random(seed)
    if length <= MAX_SAMPLES:
        return iter(chosen.sample(range(length), length))
    return (chosen.randrange(length) for _ in range(MAX_SAMPLES))


class _SampleReader:
    """Read samples one by one with a clock on each, until time is up."""

    def __init__(self, subject: Subject, seed: int, current: CurrentIndex, keep: int):
        self.subject = subject
        self.keep = keep
        self.current = current
        self.wall: list[float] = []
        self.indices: list[int] = []
        self.failures: list[tuple[int, str]] = []
        self.samples: list[Any] = []
        self.cpu = 0.0
        self.exhausted = False
        length = subject.length()
        if subject.iterable:
            self._source = iter(subject.dataset)
            self._order: Iterator[int] = itertools.count()
        else:
            self._order = indices_to_try(length or 0, subject.shuffled, seed)

    def _fetch(self, index: int) -> Any:
        return next(self._source) if self.subject.iterable else self.subject.dataset[index]

    def read(self, seconds: float, at_least: int) -> None:
        """Fetch for `seconds`, and on until `at_least` samples are there; an alarm may cut in."""
        begin = time.perf_counter()
        for index in itertools.islice(self._order, MAX_SAMPLES):
            self.current.set(index)
            try:
                self._timed_fetch(index)
            except StopIteration:
                break
            except TrialInterrupted:
                self.failures.append((index, f"still running after {self.current.get()[1]:.1f} s"))
                return
            if time.perf_counter() - begin > seconds and len(self.wall) >= at_least:
                return
        self.exhausted = True

    def _timed_fetch(self, index: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            sample = self._fetch(index)
        except (StopIteration, TrialInterrupted):
            raise
        except Exception as error:
            self.failures.append((index, f"{type(error).__name__}: {error}"))
            if self.subject.iterable:  # a generator that raised is finished
                raise StopIteration from error
            return
        self.wall.append(time.perf_counter() - wall)
        self.cpu += time.process_time() - cpu
        self.indices.append(index)
        if len(self.samples) < self.keep:
            self.samples.append(sample)


def probe(subject: Subject, settings: Settings, seconds: float, seed: int, scratch: str) -> Costs:
    """Measure one process's costs for about `seconds`; never longer than its caller's alarm."""
    with rng_left_as_found():
        begin = time.perf_counter()
        size = settings.batch_size or 1
        reader = _SampleReader(subject, seed, CurrentIndex(scratch), keep=size)
        reader.read(seconds * 0.7, at_least=min(4, size))
        reader.current.set(CurrentIndex.NONE)
        costs = _sample_costs(reader)
        costs.batch_size = settings.batch_size
        if reader.samples and subject.batches:
            _time_collates(costs, subject, reader.samples, size)
        elif reader.samples:
            costs.batch_bytes, costs.tensors_per_batch = batch_bytes(reader.samples[0])
        if subject.tensors() is not None:
            _time_tensor_dataset(costs, subject, size, seed)
        costs.seconds = time.perf_counter() - begin
        return costs


def _sample_costs(reader: _SampleReader) -> Costs:
    costs = Costs(samples=len(reader.wall), failures=reader.failures[:10], exhausted=reader.exhausted)
    if not reader.wall:
        return costs
    costs.first_getitem_s = reader.wall[0]
    # The first access may open files or fill caches; with others to go by it is no typical cost.
    typical = reader.wall[1:] or reader.wall
    ordered = sorted(typical)
    costs.getitem_s = sum(typical) / len(typical)
    costs.getitem_cpu_s = min(costs.getitem_s, reader.cpu / len(reader.wall))
    costs.getitem_p50_s = ordered[len(ordered) // 2]
    costs.getitem_p99_s = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    pairs = sorted(zip(reader.wall[1:], reader.indices[1:], strict=True), reverse=True)[:10]
    costs.slowest = [(index, spent) for spent, index in pairs]
    return costs


def _time_collates(costs: Costs, subject: Subject, samples: list[Any], size: int) -> None:
    """Time each collate function on the same samples; scale to a full batch where fewer could be read.

    The first is the loader's own; `collate_agrees` says whether mbperf's makes the same batch.
    """
    scale = size / len(samples)
    own: Any = None
    for name in ("user", "torch", "mbperf"):
        if name == "user" and subject.user_collate() is None:
            continue
        try:
            collate = subject.collate(name)
            batch = collate(list(samples))  # type: ignore[misc]
            times = [_timed(collate, list(samples)) for _ in range(COLLATE_REPEATS)]
        except TrialInterrupted:
            costs.collate_error[name] = "still running at the end of its time"
            return
        except Exception as error:
            known = isinstance(error, ImportError)
            costs.collate_error[name] = str(error) if known else f"{type(error).__name__}: {error}"
            continue
        costs.collate_s[name] = min(times) * scale
        own = batch if own is None else own
        if name == "mbperf":
            costs.collate_agrees = same_batch(own, batch)
        if not costs.batch_bytes:
            found, costs.tensors_per_batch = batch_bytes(batch)
            costs.batch_bytes = int(found * scale)
            costs.pin_s = pinning_s(batch, scale)


def pinning_s(batch: Any, scale: float) -> float | None:
    """Return the time to copy a batch to page-locked memory; None where there is no accelerator."""
    if not (hasattr(torch, "accelerator") and torch.accelerator.is_available()):
        return None
    return scale * min(
        sum(_timed(tensor.pin_memory) for tensor in leaves(batch)) for _ in range(COLLATE_REPEATS)
    )


def same_batch(expected: Any, actual: Any) -> bool:
    """Tell whether two batches are equal in structure, dtypes, shapes and values."""
    if isinstance(expected, torch.Tensor):
        same = (
            isinstance(actual, torch.Tensor)
            and expected.dtype == actual.dtype
            and expected.shape == actual.shape
        )
        return same and torch.equal(torch.nan_to_num(expected), torch.nan_to_num(actual))
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and expected.keys() == actual.keys()
            and all(same_batch(value, actual[key]) for key, value in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(actual, (list, tuple))
            and len(expected) == len(actual)
            and all(same_batch(*pair) for pair in zip(expected, actual, strict=True))
        )
    return type(expected) is type(actual) and bool(expected == actual)


def _timed(function: Any, *args: Any) -> float:
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def _time_tensor_dataset(costs: Costs, subject: Subject, size: int, seed: int) -> None:
    try:
        dataset = subject.dataset_for(Settings(dataset="mbperf.TensorDataset"))
        order = random.Random(seed)
        batches = [[order.randrange(len(dataset)) for _ in range(size)] for _ in range(COLLATE_REPEATS)]
        costs.tensor_dataset_s = min(_timed(dataset.__getitems__, batch) for batch in batches)
    except (ImportError, AttributeError) as error:
        costs.collate_error["mbperf.TensorDataset"] = str(error)
