"""From paired times to a ratio with its interval and a verdict.

Every round times all contenders, so d = ln t_base - ln t_x is free of what both shared: clock, drift, load.
The ratio is exp(median d); its interval is the sign test's (order statistics, no distribution assumed).
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from mbperf.require import require

CONFIDENCE = 0.99
# With fewer the sign test has no 99 % interval: 2 * 0.5**8 = 0.8 %.
LEAST_ROUNDS = 8
# Differences below 1 % are of no use to anyone and within what memory layout alone can do.
MARGIN = 0.01


class Verdict(str, Enum):
    """What a ratio says about its contender."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    CANNOT_TELL = "CANNOT TELL"


@dataclass(frozen=True)
class Ratio:
    """How many times faster than its base a contender is, with the bounds of its interval."""

    ratio: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Width of the interval relative to the ratio; infinite with too few rounds."""
        return (self.high - self.low) / self.ratio

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def paired_ratio(base_s: Sequence[float], x_s: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Return t_base / t_x from times paired by round; above 1, x is faster.

    Args:
        base_s: seconds of the base, one per round.
        x_s: seconds of the contender in the same rounds.
        confidence: of the interval; below 8 rounds 0.99 cannot be had and the bounds are 0 and infinity.

    Returns:
        Ratio, dimensionless.

    Raises:
        ValueError: no rounds, or unequally many.

    Source: sign test; `scipy.stats.quantile_test`.

    >>> paired_ratio([2.0] * 9, [1.0] * 9)
    Ratio(ratio=2.0, low=2.0, high=2.0)
    """
    if len(base_s) != len(x_s) or not base_s:
        raise ValueError(f"paired_ratio: expected equally many rounds, got {len(base_s)} and {len(x_s)}")
    logs = [math.log(base / x) for base, x in zip(base_s, x_s, strict=True)]
    low, high = _median_interval(logs, confidence)
    return Ratio(math.exp(statistics.median(logs)), low, high)


def _median_interval(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    ranks = _median_ranks(len(logs), confidence)
    if ranks is None:
        return 0.0, math.inf
    ordered = sorted(logs)
    return math.exp(ordered[ranks[0]]), math.exp(ordered[ranks[1]])


@cache
def _median_ranks(n: int, confidence: float) -> tuple[int, int] | None:
    """Which of `n` ordered values bound the median; asked of scipy once, as it takes a millisecond."""
    test = require("scipy.stats").quantile_test(range(n), q=0.0, p=0.5)
    interval = test.confidence_interval(confidence_level=confidence)
    if math.isnan(interval.low) or math.isnan(interval.high):
        return None
    return int(interval.low), int(interval.high)


def across_processes(ratios: Sequence[Ratio]) -> Ratio:
    """Combine one ratio per fresh process: the median, and the hull of the intervals.

    Rounds of one process share its memory layout, so pooling them would claim too much.

    >>> across_processes([Ratio(1.0, 0.9, 1.1), Ratio(1.2, 1.1, 1.3)]).high
    1.3
    """
    middle = math.exp(statistics.median(math.log(r.ratio) for r in ratios))
    return Ratio(middle, min(r.low for r in ratios), max(r.high for r in ratios))


def verdict(ratio: Ratio, reach: float, margin: float = MARGIN) -> Verdict:
    """Judge a ratio: FASTER or SLOWER beyond `reach` and `margin`, SAME within the margin, else CANNOT TELL.

    Args:
        ratio: what was measured.
        reach: of the A/A control in the same rounds, see `reach`.
        margin: differences below it are of no use.

    >>> verdict(Ratio(1.03, 1.02, 1.04), 1.01).value, verdict(Ratio(1.03, 1.02, 1.04), 1.05).value
    ('FASTER', 'CANNOT TELL')
    """
    if ratio.low > reach and ratio.ratio >= 1 + margin:
        return Verdict.FASTER
    if ratio.high < 1 / reach and ratio.ratio <= 1 / (1 + margin):
        return Verdict.SLOWER
    if max(reach, ratio.high, 1 / max(ratio.low, 1e-9)) <= 1 + margin:
        return Verdict.SAME
    return Verdict.CANNOT_TELL


def reach(control: Ratio | None) -> float:
    """Return how large a difference has to be before its group can tell it: the far end of the A/A interval.

    Identical contenders differ by 1 % through the addresses of their inputs alone. Where the operation seems
    up to 5 % faster than itself, 5 % means nothing, while 10x still does. Without a control nothing does.

    >>> reach(Ratio(1.0, 0.99, 1.02)), reach(None)
    (1.02, inf)
    """
    if control is None or control.low <= 0:
        return math.inf
    return max(control.high, 1 / control.low)


def is_clean(control: Ratio, margin: float = MARGIN) -> bool:
    """Whether an A/A control found what it must find: no difference, to within `margin`.

    >>> is_clean(Ratio(1.002, 0.995, 1.01)), is_clean(Ratio(1.004, 1.001, 1.01))
    (True, False)
    """
    return not control.excludes(1.0) and abs(math.log(control.ratio)) <= math.log1p(margin)


def geometric_mean(
    samples: Sequence[tuple[Sequence[float], Sequence[float]]],
    confidence: float = CONFIDENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Ratio:
    """Return the geometric mean of the groups' ratios, its interval by a bootstrap over rounds.

    Args:
        samples: (base seconds, contender seconds) of each group.
        confidence: of the interval.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        Ratio, dimensionless.

    Raises:
        ValueError: no groups.

    >>> round(geometric_mean([([2.0] * 8, [1.0] * 8), ([8.0] * 8, [1.0] * 8)]).ratio, 6)
    4.0
    """
    if not samples:
        raise ValueError("geometric_mean: expected at least one group, got none")
    rng = random.Random(seed)
    logs = [[math.log(b / x) for b, x in zip(base, contender, strict=True)] for base, contender in samples]
    middle = statistics.fmean(statistics.median(group) for group in logs)
    means = sorted(
        statistics.fmean(statistics.median(rng.choices(group, k=len(group))) for group in logs)
        for _ in range(resamples)
    )
    cut = int((1 - confidence) / 2 * resamples)
    return Ratio(math.exp(middle), math.exp(means[cut]), math.exp(means[-1 - cut]))
