"""Arrivals of batches in one trial, and the rates they come to.

Rates are ratios of totals, never medians: one slow index in a hundred belongs in the answer.
"""

import itertools
from dataclasses import dataclass, field

BLOCKS = 12  # blocks of batches whose rates give the interval; a sign-test interval at 95 % needs 6 or more
SHORT_EPOCH = 4  # an epoch of up to this many warm-ups is timed whole


@dataclass
class Timing:
    """Figures of one trial. Times in seconds, rates per second, `waits_s` per step of the consumer.

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


@dataclass
class Epoch:
    """Arrivals of one pass: `waits[k]` s for batch k, its `counts[k]` samples, `ends[k]` after its step."""

    waits: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    complete: bool = False


def steady_seconds(epoch: Epoch, warmup: int) -> float:
    """Return how long the part of an epoch behind its warm-up lasted."""
    return epoch.end - epoch.ends[warmup - 1] if len(epoch.ends) > warmup >= 1 else 0.0


def summarise(epochs: list[Epoch], warmup: int, turn: int) -> Timing:
    """Reduce arrivals to a Timing, behind the warm-up or, where epochs are short, by whole epochs."""
    timing = Timing(warmup_batches=warmup)
    timing.first_batch_s = epochs[0].ends[0] - epochs[0].begin if epochs[0].ends else None
    timing.epoch_s = [epoch.end - epoch.begin for epoch in epochs if epoch.complete]
    timing.epoch_samples = next((sum(epoch.counts) for epoch in epochs if epoch.complete), None)
    timing.whole_epochs = _short(epochs, warmup)
    if timing.whole_epochs:
        _sum_whole_epochs(timing, epochs)
    else:
        _sum_steady_parts(timing, epochs, warmup, turn)
    timing.step_s = max(0.0, timing.seconds - sum(timing.waits_s))
    return timing


def _short(epochs: list[Epoch], warmup: int) -> bool:
    """Tell whether epochs are too short to have a steady part: at their end queues drain, too fast."""
    complete = [epoch for epoch in epochs if epoch.complete and epoch.ends]
    if complete:
        return len(complete[0].ends) <= SHORT_EPOCH * warmup
    return not any(len(epoch.ends) > warmup for epoch in epochs)


def _sum_whole_epochs(timing: Timing, epochs: list[Epoch]) -> None:
    """Sum up epochs from start to end; the first is cold, so it counts only where there is no other."""
    whole = [epoch for epoch in epochs if epoch.complete] or epochs
    whole = whole[1:] or whole
    timing.samples = sum(sum(epoch.counts) for epoch in whole)
    timing.batches = sum(len(epoch.counts) for epoch in whole)
    timing.seconds = sum(epoch.end - epoch.begin for epoch in whole)
    timing.blocks = [sum(epoch.counts) / (epoch.end - epoch.begin) for epoch in whole]
    timing.waits_s = [wait for epoch in whole for wait in epoch.waits]


def _sum_steady_parts(timing: Timing, epochs: list[Epoch], warmup: int, turn: int) -> None:
    """Sum up what comes behind each epoch's warm-up."""
    durations: list[float] = []
    counts: list[int] = []
    for epoch in epochs:
        before = [epoch.begin, *epoch.ends[:-1]]
        durations += [end - start for start, end in zip(before[warmup:], epoch.ends[warmup:], strict=True)]
        counts += epoch.counts[warmup:]
        timing.waits_s += epoch.waits[warmup:]
    timing.seconds, timing.batches, timing.samples = sum(durations), len(durations), sum(counts)
    timing.blocks = block_rates(durations, counts, turn)


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
