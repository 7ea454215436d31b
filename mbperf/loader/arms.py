"""What the trials of each configuration say together: rate, its error, value to the consumer, comparisons.

Rates combine as ratios of totals. The error is the larger of what blocks within trials and what repeated
trials show; the latter is pooled over configurations, because each has only a few.
"""

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mbperf.loader.model import Consumer
from mbperf.loader.records import Trial
from mbperf.loader.settings import Settings

ERROR_FLOOR = 0.004  # two runs of the same trial on a quiet machine differ by about this much
UNREPEATED_ERROR = 0.03  # until any configuration has been repeated, trials are taken to differ by this
Z95 = 1.96
DRAWS = 2000


@dataclass
class Arm:
    """One configuration with its trials, drained and paced."""

    settings: Settings
    trials: list[Trial] = field(default_factory=list)
    paced: list[Trial] = field(default_factory=list)

    @property
    def idle_measured(self) -> float | None:
        """Share of its time that a paced consumer was seen to wait: the mean over paced trials."""
        seen = [t.idle_fraction for t in self.paced if t.idle_fraction is not None]
        return statistics.fmean(seen) if seen else None

    @property
    def feasible(self) -> bool:
        """True when it ran and no trial of it failed; one that came late may have lacked time alone."""
        ran = any(t.rate_samples_per_s for t in self.trials)
        return ran and all(t.infeasible is None or t.cause == "timeout" for t in self.trials)

    @property
    def rate(self) -> float:
        """Samples per second over all trials."""
        seconds = sum(t.seconds for t in self.trials)
        return sum(t.samples for t in self.trials) / seconds if seconds else 0.0

    @property
    def first_batch_s(self) -> float | None:
        """Time to the first batch, cold: the median over trials."""
        times = [t.first_batch_s for t in self.trials if t.first_batch_s is not None]
        return statistics.median(times) if times else None

    @property
    def later_first_batch_s(self) -> float | None:
        """Time to the first batch of a later epoch; the cold one's where none was measured."""
        times = [t.later_first_batch_s for t in self.trials if t.later_first_batch_s is not None]
        return statistics.median(times) if times else self.first_batch_s

    @property
    def memory_bytes(self) -> int | None:
        """PSS of consumer and workers, the last measured."""
        found = [t.memory["pss_bytes"] for t in self.trials if t.memory]
        return found[-1] if found else None

    def log_rates(self) -> list[float]:
        """Logarithms of each trial's rate."""
        return [math.log(t.rate_samples_per_s) for t in self.trials if t.rate_samples_per_s]

    def block_error(self) -> float:
        """Relative standard error of the rate from the blocks within trials."""
        blocks = [rate for t in self.trials for rate in t.blocks]
        if len(blocks) < 3:
            return UNREPEATED_ERROR
        return statistics.stdev(blocks) / statistics.fmean(blocks) / math.sqrt(len(blocks))


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
        """Return what taking a finished batch from a worker costs: the short waits of drained trials.

        Batches of two or more workers arrive in bunches, so a tenth of them and more are already there.
        """
        waits = [
            t.wait_p10_s
            for arm in self.by_settings.values()
            if arm.settings.num_workers > 1
            for t in arm.trials
        ]
        return min((wait for wait in waits if wait is not None), default=0.0)

    def feasible(self) -> list[Arm]:
        """Return the configurations that run, best value first."""
        return sorted(
            (arm for arm in self.by_settings.values() if arm.feasible), key=self.value, reverse=True
        )

    def value(self, arm: Arm) -> float:
        """Return what the consumer gets (samples/s); what a paced trial has shown needs no model."""
        return self._value(arm, 1.0)

    def _value(self, arm: Arm, factor: float) -> float:
        """Return the value if the true rate were `factor` times the measured one."""
        return self._valuer(arm)(self._rate(arm) * factor)

    def _valuer(self, arm: Arm) -> Callable[[float], float]:
        """Return the value of a configuration as a function of its rate."""
        whole = any(t.whole_epochs for t in arm.trials)  # then the rate has the start-up in it
        first = None if whole else arm.later_first_batch_s
        return lambda rate: self.consumer.value(arm.settings, rate, first)

    def _rate(self, arm: Arm) -> float:
        """Return the rate to expect: what a paced trial has shown, else the drained one."""
        idle = arm.idle_measured
        return arm.rate if idle is None or idle >= 1 else self.consumer.rate_seen(arm.settings, idle)

    def between_trials(self) -> float:
        """Return the standard deviation of repeated trials' log rates, pooled over configurations."""
        groups = [rates for arm in self.by_settings.values() if len(rates := arm.log_rates()) > 1]
        degrees = sum(len(rates) - 1 for rates in groups)
        if not degrees:
            return UNREPEATED_ERROR
        pooled = sum((len(rates) - 1) * statistics.variance(rates) for rates in groups) / degrees
        # With few repeats the pooled value can be small by chance: a prior worth two degrees steadies it.
        return math.sqrt((pooled * degrees + 2 * UNREPEATED_ERROR**2 / 4) / (degrees + 2))

    def error(self, arm: Arm) -> float:
        """Return the relative standard error of a configuration's rate."""
        repeated = self.between_trials() / math.sqrt(max(1, len(arm.log_rates())))
        return max(arm.block_error(), repeated, ERROR_FLOOR)

    def value_error(self, arm: Arm) -> float:
        """Return the relative standard error of the value: small where the consumer is the limit."""
        spread = math.exp(self.error(arm))
        low, high = self._value(arm, 1 / spread), self._value(arm, spread)
        return max(ERROR_FLOOR, math.log(high / low) / 2)

    def interval(self, arm: Arm) -> tuple[float, float]:
        """Return the 95 % interval of a configuration's rate in samples per second."""
        spread = math.exp(Z95 * self.error(arm))
        return arm.rate / spread, arm.rate * spread

    def ratio(self, arm: Arm, base: Arm) -> tuple[float, float, float]:
        """Return the ratio of values with its 95 % interval."""
        ratio = self.value(arm) / max(self.value(base), 1e-12)
        spread = math.exp(Z95 * math.hypot(self.value_error(arm), self.value_error(base)))
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

    def confidence(self, chosen: Arm, margin: float, seed: int = 0) -> float:
        """Return the probability that `chosen` is truly within `margin` of the best of all tried."""
        arms = self.feasible()
        place = arms.index(chosen)
        known = [(self._valuer(arm), self._rate(arm), self.error(arm)) for arm in arms]
        draw = random.Random(seed)
        hits = 0
        for _ in range(DRAWS):
            values = [value(rate * math.exp(draw.gauss(0, error))) for value, rate, error in known]
            hits += values[place] >= (1 - margin) * max(values)
        return hits / DRAWS


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
