"""What changed since a saved run, with an interval that allows for processes and for runs.

d = ln ratio now - ln ratio then, of our time against the reference's (torch's, if there) and against the
memory limit's. Its variance is that between the processes of both runs, moderated by all groups, times what
the groups together show of differences between runs: most groups of two runs have not changed, so the middle
of |d| / standard error is known (an empirical null: Efron, "Large-scale simultaneous hypothesis testing",
2004).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbperf.measure.rows import ROOF, reference
from mbperf.measure.statistics import MARGIN, Prior, Ratio, moderated, prior, student

Row = Mapping[str, Any]
BETTER, WORSE, SAME, CANNOT_TELL = "BETTER", "WORSE", "SAME", "CANNOT TELL"
# Of a thousand rows that did not change, one may be called changed: the promise is one in a hundred, and the
# rest is for what this model of the machine leaves out.
CONFIDENCE = 0.999
SAME_WITHIN = 0.05  # a row whose interval lies within 5 % is the same
# Fewer groups do not tell how runs differ: 1 % of standard deviation is then assumed.
LEAST_GROUPS, RUN_SD = 8, 0.01
MIDDLE_OF_NORMAL = statistics.NormalDist().inv_cdf(0.75)  # median of |z|


@dataclass(frozen=True)
class Difference:
    """Of one group against one base: the change of ln ratio and its standard error, of processes alone."""

    group: str
    base: str
    log: float
    error: float
    freedom: float


def changes(now: Mapping[str, Row], then: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Return what changed in each row that both runs have.

    Args:
        now: group name -> figures of its subject.
        then: the same of the saved run.

    Returns:
        Group name -> `ratio` (above 1 is better), `low`, `high` and `verdict` of the figure with the
        narrower interval; which it is (`against`); and `bases` with all of them. A row without what an
        interval needs has null bounds and CANNOT TELL.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for base in dict.fromkeys([*filter(None, map(reference, now.values())), ROOF]):
        differences = list(_differences(now, then, base))
        excess = between_runs(differences)
        for one in differences:
            found.setdefault(one.group, {})[base] = _judged(one, excess)
    return {group: _of_row(found.get(group, {}), now[group], then[group]) for group in now if group in then}


def findings(now: Mapping[str, Row]) -> list[str]:
    """Return a line for each row that became worse."""
    return [
        f"{name}: WORSE than the compared run: {change['ratio']:.3f} [{change['low']:.3f}, "
        f"{change['high']:.3f}] of its ratio against {change['against']}"
        for name, row in now.items()
        if (change := row.get("change")) and change["verdict"] == WORSE
    ]


def between_runs(differences: Sequence[Difference]) -> tuple[float, float]:
    """Return by how much runs differ beyond their processes: a factor on errors, and a variance to add."""
    if len(differences) < LEAST_GROUPS:
        return 1.0, RUN_SD**2
    middle = statistics.median(abs(one.log) / one.error for one in differences)
    return max(1.0, middle / MIDDLE_OF_NORMAL), 0.0


def _differences(now: Mapping[str, Row], then: Mapping[str, Row], base: str) -> Iterable[Difference]:
    pairs = {
        name: (mine, its)
        for name in now
        if name in then
        and base in (reference(now[name]), ROOF)
        and (mine := _logs(now[name], base, now[name].get("heap")))
        and (its := _logs(then[name], base, now[name].get("heap")))
    }
    known = prior([logs for pair in pairs.values() for logs in pair])
    for name, (mine, its) in pairs.items():
        yield _difference(name, base, mine, its, known)


def _difference(
    name: str, base: str, now: Sequence[float], then: Sequence[float], known: Prior
) -> Difference:
    own = len(now) + len(then) - 2
    squares = sum((len(logs) - 1) * statistics.variance(logs) for logs in (now, then))
    variance = moderated(squares / own, own, known)
    error = math.sqrt(variance.variance * (1 / len(now) + 1 / len(then)))
    return Difference(name, base, statistics.fmean(now) - statistics.fmean(then), error, variance.freedom)


def _logs(row: Row, base: str, state: str | None) -> list[float]:
    """ln ratio of each process, in a state of the heap; empty where a record does not hold at least two."""
    rows = [row, row.get("other_heap") or {}]
    ratios: Mapping[str, Row] = next((one["ratios"] for one in rows if one and one.get("heap") == state), {})
    processes = ratios.get(base, {}).get("processes", [])
    return [math.log(one) for one in processes] if len(processes) > 1 else []


def _judged(one: Difference, excess: tuple[float, float]) -> dict[str, Any]:
    factor, more = excess
    reach = student(one.freedom, CONFIDENCE) * math.sqrt((factor * one.error) ** 2 + more)
    found = Ratio(*(math.exp(log) for log in (one.log, one.log - reach, min(one.log + reach, 700.0))))
    return {"ratio": found.ratio, "low": found.low, "high": found.high, "verdict": _verdict(found)}


def _verdict(found: Ratio) -> str:
    if found.low > 1 + MARGIN:
        return BETTER
    if found.high < 1 / (1 + MARGIN):
        return WORSE
    if found.low >= 1 / (1 + SAME_WITHIN) and found.high <= 1 + SAME_WITHIN:
        return SAME
    return CANNOT_TELL


def _of_row(bases: Mapping[str, Row], now: Row, then: Row) -> dict[str, Any]:
    if bases:
        base = min(bases, key=lambda one: bases[one]["high"] / bases[one]["low"])
        return {**bases[base], "against": base, "bases": dict(bases)}
    for base in filter(None, (reference(now), ROOF)):
        if base in now["ratios"] and base in then["ratios"]:
            ratio = now["ratios"][base]["ratio"] / then["ratios"][base]["ratio"]
            return _unknown(ratio, base)
    return _unknown(None, None)


def _unknown(ratio: float | None, base: str | None) -> dict[str, Any]:
    return {"ratio": ratio, "low": None, "high": None, "verdict": CANNOT_TELL, "against": base, "bases": {}}
