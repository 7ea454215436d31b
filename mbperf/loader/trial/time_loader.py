"""Time one DataLoader configuration in this process: drained (as fast as possible) or paced (T s a step).

The first prefetch x workers batches of every epoch are discarded: they arrive from a cold, idle pipeline.
"""

import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from mbperf.loader.trial.timing import Epoch, Timing, steady_seconds, summarise

SPIN_S = 2e-4  # time.sleep overshoots by some 60 us: the last part of a paced step is spun
STUCK_SHARE = 0.5  # what has been seen for less of the time than this says nothing about the rest


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


def _consume(epoch: Epoch, batches: Iterator, deadline: float, step: Callable, limit: int, size: int | None):
    """Take batches until the deadline, the limit or the end of the epoch; note each arrival as it happens."""
    clock = time.perf_counter
    while len(epoch.ends) < limit:
        # As in `for batch in loader`, the last batch lives until the name is bound to the next. Letting go
        # of it (20 ms for 100 MB of shared memory) delays the step, but is no part of the consumer's T: it
        # counts as waiting, so that idle is 1 - T * rate.
        asked = epoch.ends[-1] if epoch.ends else clock()
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
        seconds: stop after this long behind the warm-up (more epochs begin as needed).
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
    epochs: list[Epoch] = []
    timed = 0.0
    try:
        while timed < seconds:
            epoch = Epoch(begin=time.perf_counter())
            epochs.append(epoch)
            batches = iter(loader)
            _take_epoch(epoch, batches, warmup, seconds - timed, consume_step, max_batches, loader.batch_size)
            if not epoch.ends:
                break
            timed += steady_seconds(epoch, warmup) or (epoch.end - epoch.begin)
            if max_batches is not None or not epoch.complete:
                break
    except TrialInterrupted:
        epochs[-1].end = time.perf_counter()
        if stuck(epochs):
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
    """A trial's own alarm raises this; what the trial has seen until then is its answer."""


def stuck(epochs: list[Epoch]) -> bool:
    """Tell whether an interrupted trial hung rather than was slow: its last wait took most of its time."""
    last = epochs[-1]
    waited = last.end - (last.ends[-1] if last.ends else last.begin)
    return waited > STUCK_SHARE * (last.end - epochs[0].begin)


def _take_epoch(
    epoch: Epoch, batches: Iterator, warmup: int, seconds: float, step, max_batches, size
) -> None:
    """Take the warm-up (however long it lasts), then batches for `seconds`."""
    limit = sys.maxsize if max_batches is None else max_batches
    _consume(epoch, batches, float("inf"), step, min(warmup, limit), size)
    if not epoch.complete and len(epoch.ends) < limit:
        _consume(epoch, batches, time.perf_counter() + seconds, step, limit, size)


def _later_first_batch(loader: DataLoader, epochs: list[Epoch], batches: Iterator) -> float:
    """Return the time to the first batch of an epoch that is not the first."""
    if len(epochs) > 1:
        return epochs[1].ends[0] - epochs[1].begin
    del batches  # without persistent workers the old ones end before the new ones start, as between epochs
    begin = time.perf_counter()
    for _ in loader:
        break
    return time.perf_counter() - begin
