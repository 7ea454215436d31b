"""What the trials of all configurations say together: value to the consumer, its error, comparisons.

Paced trials are the measurement of what a consumer with a step gets and waits; a configuration that has none
is judged by its drained rate. The error is the larger of what blocks within trials and what repeated trials
show; the latter is pooled over configurations, because each has only a few.
"""

import math
import statistics
from dataclasses import replace

from mbperf.loader.arm import UNREPEATED_ERROR, Arm, block_error, log_rates, rate_of
from mbperf.loader.confidence import within_margin
from mbperf.loader.model import Consumer
from mbperf.loader.records import Trial
from mbperf.loader.settings import Settings

ERROR_FLOOR = 0.004  # two runs of the same trial on a quiet machine differ by about this much
Z95 = 1.96
# Beside a paced consumer loaders with 2 workers on 2 cores gave 0.78 to 1.01 of their drained rate.
UNPACED_ERROR = 0.12
PRIOR_DEGREES = 2  # of the prior on how much repeated trials differ


class Arms:
    """All configurations tried so far, seen by one consumer."""

    def __init__(self, consumer: Consumer):
        self.consumer = consumer
        self.by_settings: dict[Settings, Arm] = {}

    def add(self, trial: Trial) -> Arm:
        """Take a trial into account."""
        arm = self.by_settings.setdefault(trial.settings, Arm(trial.settings))
        (arm.paced if trial.mode == "paced" else arm.trials).append(trial)
        self.consumer.hand_over_s = self.hand_over_s()
        return arm

    def hand_over_s(self) -> float:
        """Return what taking a finished batch from a worker costs: the shortest waits of any trial.

        Drained, the batches of two or more workers mostly arrive in bunches, so a tenth of them are already
        there; workers that take turns evenly show it only to a paced consumer, who finds batches ready.
        """
        waits = [
            t.wait_p10_s
            for arm in self.by_settings.values()
            if arm.settings.num_workers
            for t in [*arm.seen, *(arm.trials if arm.settings.num_workers > 1 else [])]
        ]
        return min((wait for wait in waits if wait is not None), default=0.0)

    def feasible(self) -> list[Arm]:
        """Return the configurations that run, best value first."""
        return sorted(
            (arm for arm in self.by_settings.values() if arm.feasible), key=self.value, reverse=True
        )

    def value(self, arm: Arm) -> float:
        """Return the samples/s that the consumer gets: as paced trials saw, else from the drained rate."""
        return self._value(arm, 1.0)

    def _value(self, arm: Arm, factor: float) -> float:
        """Return the value if the true rate, paced or drained, were `factor` times the measured one."""
        # A rate of whole epochs has their start-up in it.
        whole = any(t.whole_epochs for t in arm.seen or arm.trials)
        first = None if whole else arm.later_first_batch_s
        if not arm.seen:
            return self.consumer.value(arm.settings, self.expected_rate(arm) * factor, first)
        period = (arm.settings.batch_size or 1) / (rate_of(arm.seen) * factor)
        return self.consumer.value_at(
            arm.settings, period, self.consumer.start_up_s(arm.settings, arm.rate, first)
        )

    def expected_rate(self, arm: Arm) -> float:
        """Return the loader's rate beside a paced consumer: its drained one, slowed as others' were."""
        return arm.rate * (self.slowed_by_pacing() if arm.settings.num_workers else 1.0)

    def slowed_by_pacing(self) -> float:
        """Return a paced loader's rate over its drained one, where a consumer was seen to wait; 1 if unknown.

        Without it a configuration that no consumer was paced on would always look better than those seen.
        """
        ratios = [
            rate_of(arm.seen) / arm.rate
            for arm in self.by_settings.values()
            if arm.loader_is_the_limit and arm.rate
        ]
        return min(1.0, statistics.fmean(ratios)) if ratios else 1.0

    def expected_idle(self, arm: Arm) -> float:
        """Return the idle share to expect: as a paced consumer saw it, else from the rate to expect.

        The formula misses what a worker busy in Python makes a consumer wait at each hand-over (the worker's
        threads that pass descriptors want its interpreter lock, 5 ms at a time); a paced consumer sees it.
        """
        measured = arm.idle_measured
        return self.consumer.idle(arm.settings, self.expected_rate(arm)) if measured is None else measured

    def idle_interval(self, arm: Arm) -> tuple[float, float]:
        """Return the 95 % interval of the idle share to expect.

        The step is known, so 1 - idle = step x rate / batch errs by as much as the rate does.
        """
        if arm.seen:
            spread = self.spread(self.error(arm))
            working = 1 - self.expected_idle(arm)
            return max(0.0, 1 - working * spread), 1 - working / spread
        unpaced = UNPACED_ERROR if arm.settings.num_workers else 0.0
        rate, spread = self.expected_rate(arm), self.spread(math.hypot(self.error(arm), unpaced))
        low, high = rate * spread, rate / spread
        return self.consumer.idle(arm.settings, low), self.consumer.idle(arm.settings, high)

    def repeated(self) -> list[list[float]]:
        """Return the log rates of trials that were repeated, drained or paced.

        A paced consumer that hardly waits repeats itself whatever the loader does: it is no witness.
        """
        witnesses = [arm.trials for arm in self.by_settings.values()]
        witnesses += [arm.seen for arm in self.by_settings.values() if arm.loader_is_the_limit]
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

    def rate_error(self, arm: Arm) -> float:
        """Return the relative standard error of a configuration's drained rate."""
        repeated = self.between_trials() / math.sqrt(max(1, len(log_rates(arm.trials))))
        return max(block_error(arm.trials), repeated, ERROR_FLOOR)

    def error(self, arm: Arm) -> float:
        """Return the relative standard error of the rate that `value` rests on, paced where there is one."""
        if not arm.seen:
            return self.rate_error(arm)
        repeated = arm.sensitivity * self.between_trials() / math.sqrt(len(arm.seen))
        return max(block_error(arm.seen), repeated, ERROR_FLOOR)

    def value_error(self, arm: Arm) -> float:
        """Return the relative standard error of the value: small where the consumer is the limit."""
        spread = math.exp(self.error(arm))
        low, high = self._value(arm, 1 / spread), self._value(arm, spread)
        return max(ERROR_FLOOR, math.log(high / low) / 2)

    def interval(self, arm: Arm) -> tuple[float, float]:
        """Return the 95 % interval of a configuration's drained rate in samples per second."""
        spread = self.spread(self.rate_error(arm))
        return arm.rate / spread, arm.rate * spread

    def ratio(self, arm: Arm, base: Arm) -> tuple[float, float, float]:
        """Return the ratio of values with its 95 % interval."""
        ratio = self.value(arm) / max(self.value(base), 1e-12)
        spread = self.spread(math.hypot(self.value_error(arm), self.value_error(base)))
        return ratio, ratio / spread, ratio * spread

    def within(self, tolerance: float) -> list[Arm]:
        """Return the configurations whose value is within `tolerance` of the best, best first."""
        arms = self.feasible()
        return [arm for arm in arms if self.value(arm) >= (1 - tolerance) * self.value(arms[0])]

    def recommend(self, tolerance: float) -> Arm | None:
        """Return the cheapest configuration within tolerance of the best.

        Giving up the sampler's order harms reproducibility, so a gain that noise explains is no reason to.
        """
        chosen = min(self.within(tolerance), key=lambda arm: cost(arm.settings), default=None)
        if chosen is None or chosen.settings.in_order:
            return chosen
        ordered = self.by_settings.get(replace(chosen.settings, in_order=True))
        if ordered is None or not ordered.feasible:
            return chosen
        ratio, _, high = self.ratio(ordered, chosen)
        return ordered if high >= 1 and ratio >= 1 - 2 * tolerance else chosen

    def start_up_s(self, arm: Arm) -> float:
        """Return what beginning a later epoch costs."""
        return self.consumer.start_up_s(arm.settings, arm.rate, arm.later_first_batch_s)

    def with_persistence(self, chosen: Arm) -> Settings:
        """Keep workers alive between epochs where that saves over 1 % of an epoch (as tried, or at best)."""
        settings, samples = chosen.settings, self.consumer.samples
        if not settings.num_workers or settings.persistent_workers or not samples:
            return settings
        kept = replace(settings, persistent_workers=True)
        tried = self.by_settings.get(kept)
        saved = self.start_up_s(chosen) - (self.start_up_s(tried) if tried and tried.feasible else 0.0)
        return kept if saved > 0.01 * samples / self.value(chosen) else settings

    def shown_for(self, chosen: Arm) -> Arm:
        """Return the arm whose figures go with a recommendation: with its workers kept alive, if tried so.

        Those of later epochs have the dataset's pages mapped already, and load faster than fresh ones.
        """
        shown = self.by_settings.get(self.with_persistence(chosen))
        return shown if shown and shown.feasible else chosen

    def confidence(self, chosen: Arm, margin: float, seed: int = 0) -> float:
        """Return the probability that `chosen` is truly within `margin` of the best of all tried."""
        arms = self.feasible()
        logs = [math.log(max(self.value(arm), 1e-12)) for arm in arms]
        return within_margin(logs, [self.value_error(arm) for arm in arms], arms.index(chosen), margin, seed)


def t95(degrees: int) -> float:
    """Return Student's 97.5 % quantile (Cornish-Fisher expansion; Abramowitz and Stegun 26.7.5).

    >>> round(t95(4), 1), round(t95(30), 2)
    (2.7, 2.04)
    """
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def cost(settings: Settings) -> tuple:
    """Return what makes a configuration dear, most important first: workers, memory in flight, departures."""
    return (
        settings.num_workers,
        settings.prefetched_batches * (settings.batch_size or 1),
        not settings.in_order,
        settings.pin_memory,
        settings.multiprocessing_context is not None,
        settings.collate == "mbperf",
        settings.dataset != "user",
        settings.persistent_workers,
        settings.batch_size or 0,
    )
