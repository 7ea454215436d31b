"""What the trials of one configuration say: rates of drained trials, rates and idle shares of paced ones.

Rates combine as ratios of totals: a longer trial counts for more, and one slow index in a hundred in full.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from mbperf.loader.records import Trial
from mbperf.loader.settings import Settings

UNREPEATED_ERROR = 0.03  # until any configuration has been repeated, trials are taken to differ by this
PACED_WAITS = 0.05  # a paced consumer that waits less is its own limit and tells little of the loader's rate


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
class Arm:
    """One configuration with its trials, drained and paced."""

    settings: Settings
    trials: list[Trial] = field(default_factory=list)
    paced: list[Trial] = field(default_factory=list)

    @property
    def seen(self) -> list[Trial]:
        """The paced trials that lasted long enough to tell an idle share."""
        return [t for t in self.paced if t.idle_fraction is not None]

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
        """True when it ran and no trial of it failed; one that came late may have lacked time alone."""
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
        times = [t.later_first_batch_s for t in self.trials if t.later_first_batch_s is not None]
        return statistics.median(times) if times else self.first_batch_s

    @property
    def memory_bytes(self) -> int | None:
        """PSS of consumer and workers, the last measured."""
        found = [t.memory["pss_bytes"] for t in self.trials if t.memory]
        return found[-1] if found else None
