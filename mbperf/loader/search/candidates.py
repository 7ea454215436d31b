"""Estimates from the trials of one configuration and of all: value to the consumer, error, comparisons.

Rates combine as ratios of totals: a longer trial counts for more, and one slow index in a hundred in full.
Paced trials are the measurement of what a consumer with a step gets and waits; a candidate that has none is
judged by its drained rate. The error is the larger of what blocks within trials and what repeated trials
show; the latter is pooled over candidates, because each has only a few.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mbperf.loader.records import Trial
from mbperf.loader.search.confidence import within_margin
from mbperf.loader.search.model import Consumer
from mbperf.loader.settings import COLLATES, DATASETS, Settings

UNREPEATED_ERROR = 0.03  # until any configuration has been repeated, trials are taken to differ by this
PACED_WAITS = 0.05  # a paced consumer that waits less is its own limit and tells little of the loader's rate
ERROR_FLOOR = 0.004  # two runs of the same trial on a quiet machine differ by about this much
Z95 = 1.96
# Beside a paced consumer loaders with 2 workers on 2 cores gave 0.78 to 1.01 of their drained rate.
UNPACED_ERROR = 0.12
PRIOR_DEGREES = 2  # of the prior on how much repeated trials differ


def rate_of(trials: Sequence[Trial]) -> float:
    """Return samples per second over all trials; 0 where none ran."""
    seconds = sum(t.seconds for t in trials)
    return sum(t.samples for t in trials) / seconds if seconds else 0.0


def log_rates(trials: Sequence[Trial]) -> list[float]:
    """Return the logarithm of each trial's rate."""
    return [math.log(t.rate_samples_per_s) for t in trials if t.rate_samples_per_s]


def block_error(trials: Sequence[Trial]) -> float:
    """Return the relative standard error of the rate from the blocks within trials."""
    blocks = [rate for t in trials for rate in t.blocks]
    if len(blocks) < 3:
        return UNREPEATED_ERROR
    return statistics.stdev(blocks) / statistics.fmean(blocks) / math.sqrt(len(blocks))


@dataclass
class Candidate:
    """One configuration with its trials, drained and paced."""

    settings: Settings
    trials: list[Trial] = field(default_factory=list)
    paced: list[Trial] = field(default_factory=list)

    @property
    def seen(self) -> list[Trial]:
        """The paced trials that lasted long enough to tell an idle share."""
        return [t for t in self.paced if t.idle_fraction is not None]

    @property
    def deciding(self) -> list[Trial]:
        """The trials that its value rests on: paced ones where there are any."""
        return self.seen or self.trials

    @property
    def idle_measured(self) -> float | None:
        """Share of its time that a paced consumer waited: waits over all of its time, in all paced trials."""
        seconds = sum(t.seconds for t in self.seen)
        return sum((t.idle_fraction or 0.0) * t.seconds for t in self.seen) / seconds if seconds else None

    @property
    def loader_is_the_limit(self) -> bool:
        """True when a paced consumer was seen to wait for its workers: its rate is then the loader's."""
        return self.settings.num_workers > 0 and (self.idle_measured or 0.0) > PACED_WAITS

    @property
    def sensitivity(self) -> float:
        """How much of a change of the loader's rate a paced consumer notices, between 0 and 1.

        With workers all of it while the loader is the limit, nothing while its own step is; without workers
        the share of the time that is loading.
        """
        idle = self.idle_measured or 0.0
        return min(1.0, idle / PACED_WAITS) if self.settings.num_workers else idle

    @property
    def feasible(self) -> bool:
        """True when it ran and no trial failed; a trial that was late may only have lacked time."""
        ran = any(t.rate_samples_per_s for t in self.trials)
        return ran and all(t.infeasible is None or t.cause == "timeout" for t in [*self.trials, *self.paced])

    @property
    def rate(self) -> float:
        """Samples per second over all drained trials."""
        return rate_of(self.trials)

    @property
    def first_batch_s(self) -> float | None:
        """Time to the first batch, cold: the median over trials."""
        times = [t.first_batch_s for t in self.trials if t.first_batch_s is not None]
        return statistics.median(times) if times else None

    @property
    def later_first_batch_s(self) -> float | None:
        """Time to the first batch of a later epoch; the cold one's where none was measured."""
        return statistics.median(self.later_first_batches) if self.later_first_batches else None

    @property
    def later_first_batches(self) -> list[float]:
        """Times to the first batch of a later epoch, one per trial; the cold ones where none was measured."""
        later = [t.later_first_batch_s for t in self.trials if t.later_first_batch_s is not None]
        return later or [t.first_batch_s for t in self.trials if t.first_batch_s is not None]

    @property
    def memory_bytes(self) -> int | None:
        """PSS of consumer and workers, the last measured."""
        found = [t.memory["pss_bytes"] for t in self.trials if t.memory]
        return found[-1] if found else None


class Candidates:
    """All configurations tried so far, seen by one consumer."""

    def __init__(self, consumer: Consumer):
        self.consumer = consumer
        self.by_settings: dict[Settings, Candidate] = {}

    def add(self, trial: Trial) -> Candidate:
        """Take a trial into account."""
        candidate = self.by_settings.setdefault(trial.settings, Candidate(trial.settings))
        (candidate.paced if trial.mode == "paced" else candidate.trials).append(trial)
        self.consumer.hand_over_s = self.hand_over_s()
        return candidate

    def hand_over_s(self) -> float:
        """Return what taking a finished batch from a worker costs: the shortest waits of any trial.

        In a drained trial the batches of two or more workers mostly arrive in bunches, so at least a tenth of
        them are already there. Workers that take turns evenly show it only to a paced consumer, who finds
        batches ready.
        """
        waits = [
            t.wait_p10_s
            for c in self.by_settings.values()
            if c.settings.num_workers
            for t in [*c.seen, *(c.trials if c.settings.num_workers > 1 else [])]
        ]
        return min((wait for wait in waits if wait is not None), default=0.0)

    def feasible(self) -> list[Candidate]:
        """Return the configurations that run, best value first."""
        return sorted((c for c in self.by_settings.values() if c.feasible), key=self.value, reverse=True)

    def value(self, candidate: Candidate) -> float:
        """Return the samples/s that the consumer gets: as paced trials saw, else from the drained rate."""
        return self._value(candidate, 1.0)

    def _value(self, candidate: Candidate, factor: float) -> float:
        """Return the value if the true rate, paced or drained, were `factor` times the measured one."""
        # A rate of whole epochs has their start-up in it.
        whole = any(t.whole_epochs for t in candidate.deciding)
        first = None if whole else candidate.later_first_batch_s
        if not candidate.seen:
            return self.consumer.value(candidate.settings, self.expected_rate(candidate) * factor, first)
        period = (candidate.settings.batch_size or 1) / (rate_of(candidate.seen) * factor)
        return self.consumer.value_at(
            candidate.settings, period, self.consumer.start_up_s(candidate.settings, candidate.rate, first)
        )

    def expected_rate(self, candidate: Candidate) -> float:
        """Return the loader's rate beside a paced consumer: its drained one, slowed as others' were."""
        return candidate.rate * (self.slowed_by_pacing() if candidate.settings.num_workers else 1.0)

    def slowed_by_pacing(self) -> float:
        """Return a paced loader's rate over its drained one, where a consumer was seen to wait; 1 if unknown.

        Without it a configuration that has no paced trial would always look better than those that have.
        """
        limited = [c for c in self.by_settings.values() if c.loader_is_the_limit and c.rate]
        ratios = [rate_of(c.seen) / c.rate for c in limited]
        return min(1.0, statistics.fmean(ratios)) if ratios else 1.0

    def expected_idle(self, candidate: Candidate) -> float:
        """Return the idle share to expect: as a paced consumer saw it, else from the rate to expect.

        The formula misses what a worker busy in Python makes a consumer wait at each hand-over (the worker's
        threads that pass descriptors want its interpreter lock, 5 ms at a time); a paced consumer sees it.
        """
        measured = candidate.idle_measured
        return (
            self.consumer.idle(candidate.settings, self.expected_rate(candidate))
            if measured is None
            else measured
        )

    def idle_interval(self, candidate: Candidate) -> tuple[float, float]:
        """Return the 95 % interval of the idle share to expect.

        The step is known, so 1 - idle = step x rate / batch errs by as much as the rate does.
        """
        if candidate.seen:
            spread = self.spread(self.error(candidate))
            working = 1 - self.expected_idle(candidate)
            return max(0.0, 1 - working * spread), 1 - working / spread
        unpaced = UNPACED_ERROR if candidate.settings.num_workers else 0.0
        rate, spread = self.expected_rate(candidate), self.spread(math.hypot(self.error(candidate), unpaced))
        low, high = rate * spread, rate / spread
        return self.consumer.idle(candidate.settings, low), self.consumer.idle(candidate.settings, high)

    def repeated(self) -> list[list[float]]:
        """Return the log rates of trials that were repeated, drained or paced.

        A paced consumer that hardly waits repeats itself whatever the loader does: it is no witness.
        """
        witnesses = [c.trials for c in self.by_settings.values()]
        witnesses += [c.seen for c in self.by_settings.values() if c.loader_is_the_limit]
        return [rates for trials in witnesses if len(rates := log_rates(trials)) > 1]

    def between_trials(self) -> float:
        """Return the standard deviation of repeated trials' log rates, pooled over configurations."""
        groups, degrees = self.repeated(), self.degrees()
        if not degrees:
            return UNREPEATED_ERROR
        pooled = sum((len(rates) - 1) * statistics.variance(rates) for rates in groups)
        # With few repeats the pooled value can be small by chance: a prior steadies it.
        return math.sqrt((pooled + PRIOR_DEGREES * UNREPEATED_ERROR**2 / 4) / (degrees + PRIOR_DEGREES))

    def degrees(self) -> int:
        """Return how many degrees of freedom repeated trials give."""
        return sum(len(rates) - 1 for rates in self.repeated())

    def spread(self, error: float) -> float:
        """Return the factor of a 95 % interval for a relative standard error."""
        degrees = self.degrees()
        return math.exp(error * (t95(degrees + PRIOR_DEGREES) if degrees else Z95))

    def rate_error(self, candidate: Candidate) -> float:
        """Return the relative standard error of a configuration's drained rate."""
        repeated = self.between_trials() / math.sqrt(max(1, len(log_rates(candidate.trials))))
        return max(block_error(candidate.trials), repeated, ERROR_FLOOR)

    def error(self, candidate: Candidate) -> float:
        """Return the relative standard error of the rate that `value` rests on, paced where there is one."""
        if not candidate.seen:
            return self.rate_error(candidate)
        repeated = candidate.sensitivity * self.between_trials() / math.sqrt(len(candidate.seen))
        return max(block_error(candidate.seen), repeated, ERROR_FLOOR)

    def value_error(self, candidate: Candidate) -> float:
        """Return the relative standard error of the value: small where the consumer is the limit."""
        spread = math.exp(self.error(candidate))
        low, high = self._value(candidate, 1 / spread), self._value(candidate, spread)
        return max(ERROR_FLOOR, math.log(high / low) / 2)

    def interval(self, candidate: Candidate) -> tuple[float, float]:
        """Return the 95 % interval of a configuration's drained rate in samples per second."""
        spread = self.spread(self.rate_error(candidate))
        return candidate.rate / spread, candidate.rate * spread

    def ratio(self, candidate: Candidate, base: Candidate) -> tuple[float, float, float]:
        """Return the ratio of values with its 95 % interval."""
        ratio = self.value(candidate) / max(self.value(base), 1e-12)
        spread = self.spread(math.hypot(self.value_error(candidate), self.value_error(base)))
        return ratio, ratio / spread, ratio * spread

    def beats(self, candidate: Candidate, other: Candidate, tolerance: float) -> bool:
        """Tell whether a candidate is shown to be better: by more than `tolerance` and than noise."""
        enough = (1 - tolerance) * self.value(candidate) > self.value(other)
        return enough and self.ratio(candidate, other)[1] > 1

    def recommend(self, tolerance: float) -> Candidate | None:
        """Return the simplest configuration that no other is shown to beat by more than `tolerance`."""
        allowed = [c for c in self.feasible() if self.is_worth_noticing(c, tolerance)]
        unbeaten = [c for c in allowed if not any(self.beats(other, c, tolerance) for other in allowed)]
        return min(unbeaten, key=lambda c: cost(c.settings), default=None)

    def is_worth_noticing(self, candidate: Candidate, tolerance: float) -> bool:
        """Tell whether repeated trials show a gain where a user would notice how it is had.

        `in_order=False` changes which batch comes when, and persistent workers stay: each has to beat all
        that do without it, and one lucky trial is no reason.
        """
        return all(
            min(len(candidate.deciding), len(group[0].deciding)) > 1
            and all(self.beats(candidate, c, tolerance) for c in group)
            for group in self.plainer(candidate)
        )

    def plainer(self, candidate: Candidate) -> list[list[Candidate]]:
        """Return, for each thing a user would notice of it, the candidates without, best value first."""
        others = [c for c in self.feasible() if c.settings.num_workers]
        ordered = [c for c in others if c.settings.in_order > candidate.settings.in_order]
        ending = [c for c in others if c.settings.persistent_workers < candidate.settings.persistent_workers]
        return [group for group in (ordered, ending) if group]

    def start_up_s(self, candidate: Candidate) -> float:
        """Return what beginning a later epoch costs."""
        return self.consumer.start_up_s(candidate.settings, candidate.rate, candidate.later_first_batch_s)

    def with_persistence(self, chosen: Candidate, tolerance: float) -> Settings:
        """Keep workers alive between epochs where that is shown to save more than 1 % of an epoch."""
        settings, samples = chosen.settings, self.consumer.samples
        if not settings.num_workers or settings.persistent_workers or not samples:
            return settings
        kept = replace(settings, persistent_workers=True)
        tried = self.by_settings.get(kept)
        if tried is not None and (not tried.feasible or self.beats(chosen, tried, tolerance)):
            return settings
        saved = self.start_up_saved_s(chosen, tried)
        return kept if saved > 0.01 * samples / self.value(chosen) else settings

    def start_up_saved_s(self, chosen: Candidate, kept: Candidate | None) -> float:
        """Return the lower end of the 95 % interval of the start-up that live workers save per epoch.

        0 where it has been timed only once. Untried, live workers are taken to need no start-up at all.
        """
        times = [chosen.later_first_batches, *([kept.later_first_batches] if kept else [])]
        if min(map(len, times)) < 2:
            return 0.0
        error = math.sqrt(sum(statistics.variance(found) / len(found) for found in times))
        saved = self.start_up_s(chosen) - (self.start_up_s(kept) if kept else 0.0)
        return saved - t95(sum(len(found) - 1 for found in times)) * error

    def shown_for(self, chosen: Candidate, tolerance: float) -> Candidate:
        """Return the candidate whose figures are shown: with its workers kept alive, if that was tried.

        Workers that live on have the dataset's pages mapped already, and load faster than fresh ones.
        """
        shown = self.by_settings.get(self.with_persistence(chosen, tolerance))
        return shown if shown and shown.feasible else chosen

    def confidence(self, chosen: Candidate, margin: float, seed: int = 0) -> float:
        """Return the probability that `chosen` is truly within `margin` of the best of all tried."""
        feasible = self.feasible()
        logs = [math.log(max(self.value(c), 1e-12)) for c in feasible]
        errors = [self.value_error(c) for c in feasible]
        return within_margin(logs, errors, feasible.index(chosen), margin, seed)


def t95(degrees: int) -> float:
    """Return Student's 97.5 % quantile (Cornish-Fisher expansion; Abramowitz and Stegun 26.7.5).

    >>> round(t95(4), 1), round(t95(30), 2)
    (2.7, 2.04)
    """
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def cost(settings: Settings) -> tuple:
    """Return how far a configuration is from the simplest, most important first.

    Workers come first, then what the user would notice (order, processes that stay, another collate function
    or dataset), then what it takes.
    """
    return (
        settings.num_workers,
        not settings.in_order,
        settings.persistent_workers,
        COLLATES.index(settings.collate),
        DATASETS.index(settings.dataset),
        settings.prefetched_batches * (settings.batch_size or 1),
        settings.pin_memory,
        settings.multiprocessing_context is not None,
        settings.batch_size or 0,
    )
