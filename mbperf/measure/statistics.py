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
from functools import cache, partial

from mbperf.require import require

CONFIDENCE = 0.99
# With fewer the sign test has no 99 % interval: 2 * 0.5**8 = 0.8 %.
LEAST_ROUNDS = 8
NORMAL = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
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

    @property
    def log(self) -> float:
        """Natural logarithm of the ratio."""
        return math.log(self.ratio)

    @property
    def log_variance(self) -> float:
        """Variance of that logarithm by the interval's width; 0 where too few rounds have none."""
        if self.low <= 0 or not math.isfinite(self.high):
            return 0.0
        return (math.log(self.high / self.low) / (2 * NORMAL)) ** 2

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


def ask_scipy_once(rounds: int) -> None:
    """Have at hand what intervals over at most so many rounds need, before children are forked.

    scipy.stats takes half a second to import: more than the rounds of a group that each child is there for.
    """
    for n in range(LEAST_ROUNDS, rounds + 1):
        _median_ranks(n, CONFIDENCE)


@dataclass(frozen=True)
class Prior:
    """How much log ratios vary between processes, and how many degrees of freedom that knowledge is worth."""

    variance: float
    freedom: float


NO_PRIOR = Prior(0.0, 0.0)
LEAST_VARIANCE = 1e-8  # of log ratios: 0.01 %, finer than any clock


def prior(groups: Sequence[Sequence[float]]) -> Prior:
    """Return what all groups of a run together say about the variance between processes.

    Three processes know their own variance badly: with 2 degrees of freedom a 99 % interval has 10 standard
    errors on each side. The less the variances of groups differ, the more all of them say about each.

    Args:
        groups: log ratios of each group, one per process.

    Source: Smyth, "Linear models and empirical Bayes methods" (2004), section 6.2.

    >>> rng = random.Random(0)
    >>> found = prior([[rng.gauss(0, 0.01) for _ in range(3)] for _ in range(200)])
    >>> 0.9e-4 < found.variance < 1.1e-4, found.freedom > 10
    (True, True)
    """
    known = [
        (max(statistics.variance(logs), LEAST_VARIANCE), len(logs) - 1) for logs in groups if len(logs) > 1
    ]
    if len(known) < 3:
        return NO_PRIOR
    special = require("scipy.special")
    e = [math.log(v) - special.digamma(d / 2) + math.log(d / 2) for v, d in known]
    middle = statistics.fmean(e)
    excess = statistics.variance(e) - statistics.fmean(special.polygamma(1, d / 2) for _, d in known)
    half = _inverse_trigamma(excess) if excess > 0 else HALF_MOST_FREEDOM
    return Prior(float(math.exp(middle + special.digamma(half) - math.log(half))), 2 * half)


HALF_MOST_FREEDOM = 50.0  # beyond, t is the normal distribution to within 3 %


def _inverse_trigamma(y: float) -> float:
    """The positive x with trigamma(x) = y, at most `HALF_MOST_FREEDOM`; trigamma falls."""
    trigamma = partial(require("scipy.special").polygamma, 1)
    least = 1e-3
    if y <= trigamma(HALF_MOST_FREEDOM):
        return HALF_MOST_FREEDOM
    if y >= trigamma(least):
        return least
    return float(require("scipy.optimize").brentq(lambda x: trigamma(x) - y, least, HALF_MOST_FREEDOM))


def variance_between(logs: Sequence[float], prior: Prior = NO_PRIOR, within: float = 0.0) -> Prior:
    """Return the variance between the processes of a group, moderated by what all groups say.

    A group that varies more than those of its kind, as one of two states does, has but its own word.

    Args:
        logs: log ratios, one per process; at least two.
        prior: of all groups.
        within: what rounds alone explain of that variance; it is no less.

    Returns:
        Variance and its degrees of freedom.
    """
    return moderated(statistics.variance(logs), len(logs) - 1, prior, within)


def moderated(its: float, own: int, prior: Prior, within: float = 0.0) -> Prior:
    """Return the variance `its`, of `own` degrees of freedom, moderated as `variance_between` says."""
    if its > prior.variance * _largest_ratio(own, prior.freedom):
        prior = NO_PRIOR
    freedom = prior.freedom + own
    variance = (prior.freedom * prior.variance + own * its) / freedom
    return Prior(max(variance, within, LEAST_VARIANCE), freedom)


@cache
def _largest_ratio(own: float, freedom: float) -> float:
    """How many times the variance of all groups may be exceeded by one that is like them; Fisher's F."""
    if freedom == 0:
        return 0.0
    return float(require("scipy.stats").f.ppf(CONFIDENCE, own, freedom))


def across_processes(
    ratios: Sequence[Ratio], prior: Prior = NO_PRIOR, confidence: float = CONFIDENCE
) -> Ratio:
    """Combine one ratio per fresh process: their geometric mean, with Student's interval for it.

    Rounds of one process share its memory layout, so pooling them would claim too much. One process has but
    its own interval.

    >>> found = across_processes([Ratio(one, 0, math.inf) for one in (1.00, 1.01, 1.02)])
    >>> round(found.ratio, 3), round(found.low, 2), round(found.high, 2)
    (1.01, 0.95, 1.07)
    """
    if len(ratios) == 1:
        return ratios[0]
    logs = [one.log for one in ratios]
    within = statistics.fmean(one.log_variance for one in ratios)
    return _student(statistics.fmean(logs), variance_between(logs, prior, within), len(logs), confidence)


def geometric_mean_across(groups: Sequence[Sequence[float]], prior: Prior | None = None) -> Ratio:
    """Return the geometric mean of groups' ratios, its interval by how the processes of each differ.

    Args:
        groups: log ratios of each group, one per process.
        prior: as `prior` finds it.
    """
    several = [logs for logs in groups if len(logs) > 1]
    found = [variance_between(logs, prior or NO_PRIOR) for logs in several]
    variance = (
        sum(one.variance / len(logs) for one, logs in zip(found, several, strict=True)) / len(several) ** 2
    )
    freedom = sum(len(logs) - 1 for logs in several)
    middle = statistics.fmean(statistics.fmean(logs) for logs in groups)
    return _student(middle, Prior(variance, freedom), 1, CONFIDENCE)


def _student(middle: float, variance: Prior, count: int, confidence: float) -> Ratio:
    reach = student(variance.freedom, confidence) * math.sqrt(variance.variance / count)
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(min(middle + reach, LARGEST_LOG)))


LARGEST_LOG = 700.0  # exp of more is no float


@cache
def student(freedom: float, confidence: float) -> float:
    """Return the bound on |t| that Student's t exceeds with probability 1 - confidence.

    >>> round(student(2, 0.99), 2)
    9.92
    """
    return float(require("scipy.stats").t.ppf((1 + confidence) / 2, freedom))


def disagree(processes: Sequence[Sequence[float]]) -> bool:
    """Whether processes differ by more than their rounds admit, and by more than anyone is indifferent to.

    Args:
        processes: log ratios of the rounds of each process.

    Source: Kruskal and Wallis; `scipy.stats.kruskal`.

    >>> disagree([[0.1, 0.11, 0.12, 0.13, 0.14], [0.5, 0.51, 0.52, 0.53, 0.54]])
    True
    """
    middles = [statistics.median(one) for one in processes]
    if len(processes) < 2 or max(middles) - min(middles) <= math.log1p(MARGIN):
        return False
    return bool(require("scipy.stats").kruskal(*processes).pvalue < 1 - CONFIDENCE)


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
