"""Time one DataLoader configuration in this process: drained (as fast as possible) or paced (T s a step).

The first prefetch x workers batches of every epoch are discarded: they arrive from a cold, idle pipeline.
Rates are ratios of totals, never medians: one slow index in a hundred belongs in the answer.
"""

import contextlib
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

BLOCKS = 12  # blocks of batches whose rates give the interval; a sign-test interval at 95 % needs 6 or more
SPIN_S = 2e-4  # time.sleep overshoots by some 60 us: the last part of a paced step is spun


@dataclass
class Timing:
    """What one trial saw. Times in seconds, rates per second, `waits_s` per step of the consumer.

    `blocks` are the rates (samples/s) of consecutive blocks of equally many batches, for intervals.
    `later_first_batch_s` is the time to the first batch when the loader is iterated a second time.
    """

    samples: int = 0
    batches: int = 0
    seconds: float = 0.0
    warmup_batches: int = 0
    first_batch_s: float | None = None
    later_first_batch_s: float | None = None
    epoch_s: list[float] = field(default_factory=list)
    epoch_samples: int | None = None
    blocks: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    step_s: float = 0.0
    whole_epochs: bool = False

    @property
    def rate_samples_per_s(self) -> float:
        """Samples per second after the warm-up."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def rate_batches_per_s(self) -> float:
        """Batches per second after the warm-up."""
        return self.batches / self.seconds if self.seconds > 0 else 0.0

    @property
    def idle_fraction(self) -> float:
        """Share of its time that the consumer waited: sum of waits over sum of waits and steps."""
        waited = sum(self.waits_s)
        total = waited + self.step_s
        return waited / total if total > 0 else 0.0


@contextlib.contextmanager
def rng_left_as_found() -> Iterator[None]:
    """Restore the random states of Python, torch (CPU) and, if it is loaded, numpy afterwards."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy and numpy_state is not None:
            numpy.random.set_state(numpy_state)


def count_samples(batch: Any, batch_size: int | None) -> int:
    """Return how many samples a collated batch holds: the first dimension of its first leaf.

    A count above `batch_size` (packed sequences, custom batches) is no count of samples; `batch_size` is.
    """
    leaf = batch
    while isinstance(leaf, dict) or (
        isinstance(leaf, (list, tuple)) and leaf and not isinstance(leaf[0], (str, bytes, int, float))
    ):
        if not leaf:
            return 0
        leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
    try:
        count = len(leaf)
    except TypeError:
        count = 1
    return count if batch_size is None or count <= batch_size else batch_size


def pace(until: float) -> None:
    """Wait until the clock shows `until`: sleep, then spin the last bit."""
    now = time.perf_counter()
    if until - now > SPIN_S:
        time.sleep(until - now - SPIN_S)
    while time.perf_counter() < until:
        pass


@dataclass
class _Epoch:
    """Arrivals of one pass: `waits[k]` s for batch k, its `counts[k]` samples, `ends[k]` after its step."""

    waits: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    complete: bool = False


def _consume(epoch: _Epoch, batches: Iterator, deadline: float, step: Callable, limit: int, size: int | None):
    """Take batches until the deadline, the limit or the end of the epoch; note each arrival as it happens."""
    clock = time.perf_counter
    while len(epoch.ends) < limit:
        asked = clock()
        try:
            batch = next(batches)
        except StopIteration:
            epoch.complete = True
            break
        arrived = clock()
        step(batch, arrived)
        epoch.waits.append(arrived - asked)
        epoch.counts.append(count_samples(batch, size))
        epoch.ends.append(clock())
        del batch  # a batch kept alive while the next is made would double its memory
        if epoch.ends[-1] > deadline:
            break
    epoch.end = clock()


def _step_function(
    step_time_s: float, step: Callable[[Any], object] | None
) -> Callable[[Any, float], object]:
    if step is not None:
        own_step = step
        return lambda batch, arrived: own_step(batch)
    if step_time_s > 0:
        return lambda batch, arrived: pace(arrived + step_time_s)
    return lambda batch, arrived: None


def default_warmup(loader: DataLoader) -> int:
    """Return the batches to discard: prefetch_factor x num_workers, one without workers."""
    return max(1, loader.num_workers * (loader.prefetch_factor or 0))


def time_loader(
    loader: DataLoader,
    seconds: float = 2.0,
    *,
    step_time_s: float = 0.0,
    step: Callable[[Any], object] | None = None,
    warmup_batches: int | None = None,
    max_batches: int | None = None,
    later_epoch: bool = False,
    while_alive: Callable[[Iterator], object] | None = None,
) -> Timing:
    """Time one loader as a consumer sees it; random states of this process are left as found.

    Torch equivalent: `for batch in loader: step(batch)`, with a clock.

    Args:
        loader: any DataLoader or subclass; it is only iterated.
        seconds: stop after this long behind the warm-up (further epochs are begun as needed).
        step_time_s: a paced consumer takes this long with each batch; 0 drains.
        step: the consumer's own step, called with each batch, instead of `step_time_s`.
        warmup_batches: batches discarded at the start of each epoch; default prefetch x workers.
        max_batches: stop after this many batches in an epoch at the latest, and after one epoch.
        later_epoch: begin one more epoch at the end, to time its first batch.
        while_alive: called with the live iterator when timing is over, e.g. to measure its workers' memory.

    Returns:
        Timing: totals behind the warm-up, rates of blocks, waits, times to the first batch.

    Raises:
        ValueError: the loader yields no batch at all.
        Exception: whatever dataset, collate_fn or step raise.

    >>> time_loader(DataLoader(range(64), batch_size=8), 0.01).rate_samples_per_s > 0
    True
    """
    with rng_left_as_found():
        return _time_epochs(
            loader, seconds, step_time_s, step, warmup_batches, max_batches, later_epoch, while_alive
        )


def _time_epochs(loader, seconds, step_time_s, step, warmup, max_batches, later_epoch, while_alive) -> Timing:
    warmup = default_warmup(loader) if warmup is None else warmup
    consume_step = _step_function(step_time_s, step)
    epochs: list[_Epoch] = []
    timed = 0.0
    try:
        while timed < seconds:
            epoch = _Epoch(begin=time.perf_counter())
            epochs.append(epoch)
            batches = iter(loader)
            _take_epoch(epoch, batches, warmup, seconds - timed, consume_step, max_batches, loader.batch_size)
            if not epoch.ends:
                break
            timed += _steady_seconds(epoch, warmup) or (epoch.end - epoch.begin)
            if max_batches is not None or not epoch.complete:
                break
    except TrialInterrupted:
        epochs[-1].end = time.perf_counter()
        if not any(epoch.ends for epoch in epochs):
            raise
    if not any(epoch.ends for epoch in epochs):
        raise ValueError(
            "time_loader: loader yields no batch (empty dataset, or drop_last with too few samples)"
        )
    timing = summarise(epochs, warmup, max(1, loader.num_workers))
    if while_alive is not None:
        while_alive(batches)
    if later_epoch:
        timing.later_first_batch_s = _later_first_batch(loader, epochs, batches)
    return timing


class TrialInterrupted(Exception):
    """Raised into a trial by its own alarm: what has been seen until then is the answer."""


def _take_epoch(
    epoch: _Epoch, batches: Iterator, warmup: int, seconds: float, step, max_batches, size
) -> None:
    """Take the warm-up (however long it lasts), then batches for `seconds`."""
    limit = sys.maxsize if max_batches is None else max_batches
    _consume(epoch, batches, float("inf"), step, min(warmup, limit), size)
    if not epoch.complete and len(epoch.ends) < limit:
        _consume(epoch, batches, time.perf_counter() + seconds, step, limit, size)


def _later_first_batch(loader: DataLoader, epochs: list[_Epoch], batches: Iterator) -> float:
    """Return the time to the first batch of an epoch that is not the first."""
    if len(epochs) > 1:
        return epochs[1].ends[0] - epochs[1].begin
    del batches  # without persistent workers the old ones end before the new ones start, as between epochs
    begin = time.perf_counter()
    for _ in loader:
        break
    return time.perf_counter() - begin


def _steady_seconds(epoch: _Epoch, warmup: int) -> float:
    return epoch.end - epoch.ends[warmup - 1] if len(epoch.ends) > warmup >= 1 else 0.0


def summarise(epochs: list[_Epoch], warmup: int, turn: int) -> Timing:
    """Reduce arrivals to a Timing; epochs no longer than the warm-up are timed whole, start-up included."""
    timing = Timing(warmup_batches=warmup)
    timing.first_batch_s = epochs[0].ends[0] - epochs[0].begin if epochs[0].ends else None
    timing.epoch_s = [epoch.end - epoch.begin for epoch in epochs if epoch.complete]
    timing.epoch_samples = next((sum(epoch.counts) for epoch in epochs if epoch.complete), None)
    timing.whole_epochs = not any(len(epoch.ends) > warmup for epoch in epochs)
    skip = 0 if timing.whole_epochs else warmup
    durations: list[float] = []
    counts: list[int] = []
    for epoch in epochs:
        before = [epoch.begin, *epoch.ends[:-1]]
        durations += [end - start for start, end in zip(before[skip:], epoch.ends[skip:], strict=True)]
        counts += epoch.counts[skip:]
        timing.waits_s += epoch.waits[skip:]
    timing.seconds, timing.batches, timing.samples = sum(durations), len(durations), sum(counts)
    timing.step_s = max(0.0, timing.seconds - sum(timing.waits_s))
    timing.blocks = block_rates(durations, counts, turn)
    return timing


def block_rates(durations: list[float], counts: list[int], turn: int = 1) -> list[float]:
    """Return samples/s of up to BLOCKS consecutive blocks of equally many batches.

    Batches of equally fast workers arrive together, `turn` of them at a time, so blocks hold whole turns.
    """
    size = max(turn, len(durations) // BLOCKS // turn * turn)
    rates = []
    for start in itertools.islice(range(0, len(durations) - size + 1, size), BLOCKS):
        spent = sum(durations[start : start + size])
        if spent > 0:
            rates.append(sum(counts[start : start + size]) / spent)
    return rates
