"""The probability that a configuration is truly within a margin of the best of all that were measured.

Taking each measurement at its word overstates the best of many: the largest of eight equal rates measured to
3 % looks 4 % better than it is. So the true log values are drawn from a common normal distribution, whose
width the measurements tell (a hierarchical model: Gelman et al., Bayesian Data Analysis, section 5.4).
"""

import math
import random
from collections.abc import Sequence

DRAWS = 2000
CONTENDING = (
    4.0  # standard errors: a candidate that much below the best is no rival; it would widen the prior
)
# Widths of the true log values, evenly spaced, and the middle of the half-Cauchy prior on them. A
# prior nearer to zero would take two rivals measured to 15 % for equal. With this one, simulated, said and
# right agree to 6 points where rivals differ; equal ones measured to 6 % are said to be right with 86 %.
WIDTHS = tuple(0.003 + 0.01 * k for k in range(40))
USUAL_WIDTH = 0.2


def within_margin(
    logs: Sequence[float], errors: Sequence[float], chosen: int, margin: float, seed: int = 0
) -> float:
    """Return the probability that `chosen` is at least 1 - margin times the best.

    Args:
        logs: logarithm of each configuration's value.
        errors: its standard error.
        chosen: position of the one in question.
        margin: relative, 0.05 for 5 %.
        seed: of the draws.

    Returns:
        A share of draws, between 0 and 1.

    >>> within_margin([0.0, 0.001, 0.002], [0.01, 0.01, 0.01], 0, 0.05)
    1.0
    """
    rivals = contenders(logs, errors, chosen)
    values, spreads = [logs[k] for k in rivals], [errors[k] for k in rivals]
    place, draw = rivals.index(chosen), random.Random(seed)
    weights = [width_weight(values, spreads, width) for width in WIDTHS]
    hits = 0
    for width in draw.choices(WIDTHS, weights, k=DRAWS):
        true = true_values(values, spreads, width, draw)
        hits += true[place] >= math.log1p(-margin) + max(true)
    return hits / DRAWS


def contenders(logs: Sequence[float], errors: Sequence[float], chosen: int) -> list[int]:
    """Return the positions of the chosen one and of all that may be as good as the best."""
    best = max(range(len(logs)), key=logs.__getitem__)

    def rivals(k: int) -> bool:
        return logs[best] - logs[k] <= CONTENDING * math.hypot(errors[k], errors[best])

    return [k for k in range(len(logs)) if k == chosen or rivals(k)]


def centre(values: Sequence[float], spreads: Sequence[float], width: float) -> tuple[float, float]:
    """Return the weighted mean of the measured log values and its variance, if the true ones have `width`."""
    precisions = [1 / (spread**2 + width**2) for spread in spreads]
    total = sum(precisions)
    return sum(p * value for p, value in zip(precisions, values, strict=True)) / total, 1 / total


def width_weight(values: Sequence[float], spreads: Sequence[float], width: float) -> float:
    """Return the posterior weight of a width: prior times likelihood, the centre integrated out."""
    middle, variance = centre(values, spreads, width)
    log_weight = 0.5 * math.log(variance) - math.log1p((width / USUAL_WIDTH) ** 2)
    for value, spread in zip(values, spreads, strict=True):
        total = spread**2 + width**2
        log_weight -= 0.5 * (math.log(total) + (value - middle) ** 2 / total)
    return math.exp(log_weight)


def true_values(
    values: Sequence[float], spreads: Sequence[float], width: float, draw: random.Random
) -> list[float]:
    """Return one draw of the true log values, given their width."""
    middle, variance = centre(values, spreads, width)
    middle = draw.gauss(middle, math.sqrt(variance))
    true = []
    for value, spread in zip(values, spreads, strict=True):
        shrink = width**2 / (width**2 + spread**2)
        true.append(draw.gauss(middle + shrink * (value - middle), spread * math.sqrt(shrink)))
    return true
