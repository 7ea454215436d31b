"""From samples to the figures of each row: ratios with intervals, GB/s, share of the roof, verdict.

These dictionaries are what a run leaves in pytest-benchmark's `extra_info`; results/README.md lists the keys.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mbperf.measure.group import Group, Samples
from mbperf.measure.rows import CONTROL, NULL, ROOF
from mbperf.measure.statistics import (
    CONFIDENCE,
    NO_PRIOR,
    Prior,
    Ratio,
    across_processes,
    disagree,
    is_clean,
    paired_ratio,
    reach,
    verdict,
)
from mbperf.require import require

MOST_SHARE = 1.05  # of the roof; above it the bytes are miscounted or work was skipped
# Below this a call costs more than moving its bytes (1 us against 2 us per 256 KiB in cache), so that the
# roof is no limit and a share of it means nothing.
MEMORY_BOUND_BYTES = 256 << 10


def figures(
    group: Group, processes: Sequence[Samples], priors: Mapping[str, Prior] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the figures of every contender that was timed.

    Args:
        group: what was measured.
        processes: samples of each fresh process, their heaps in one state.
        priors: for each base, how much ratios against it vary between processes of this run.

    Returns:
        Contender -> figures, in base units.

    >>> group = Group("add", "1", tuple, {"mine": max, "theirs": min}, list)
    >>> samples = Samples({"mine": [1.0] * 9, "again": [1.0] * 9, "theirs": [2.0] * 9}, 1, 0, False, 0)
    >>> figures(group, [samples])["mine"]["ratios"]["theirs"]["ratio"]
    2.0
    """
    names = [name for name in group.lineup() if all(name in s.seconds for s in processes)]
    priors = priors or {}
    control = None
    if {CONTROL, group.subject} <= {*names}:
        control = across_processes(
            _ratios_of(processes, CONTROL, group.subject), priors.get(CONTROL, NO_PRIOR)
        )
    clean = control is not None and is_clean(control)
    return {name: _row(group, processes, name, names, control, clean, priors) for name in names}


def _row(
    group: Group,
    processes: Sequence[Samples],
    name: str,
    names: Sequence[str],
    control: Ratio | None,
    clean: bool,
    priors: Mapping[str, Prior],
) -> dict[str, Any]:
    pooled = [s for one in processes for s in one.seconds[name]]
    row: dict[str, Any] = {
        "op": group.op,
        "case": group.case,
        "contender": name,
        "subject": group.subject,
        "facts": dict(group.facts),
        "time_s": time_s(processes, name),
        "ratios": _ratios(group, processes, name, names, reach(control), priors),
        "page_faults": _page_faults(processes, name),
        "control": None if control is None else _plain(control),
        "clean_control": clean,
        "noisy": any(one.noisy for one in processes),
        "rounds": [len(one.seconds[name]) for one in processes],
        "dropped_rounds": [one.dropped_rounds for one in processes],
        "inner_calls": [one.inner_calls for one in processes],
        "seeds": [one.seed for one in processes],
    }
    if name == group.subject:
        row["floors"] = dict(group.floors)
        row["processes_disagree"] = _disagree(group, processes, names)
    if clocks := sorted(clock for one in processes for clock in one.sm_clock_mhz):
        row["sm_clock_hz"] = {"low": clocks[0] * 1e6, "median": statistics.median(clocks) * 1e6,
                              "high": clocks[-1] * 1e6}  # fmt: skip
    if group.traffic and name != NULL:
        row |= _bandwidth(group, pooled)
    return row


def _page_faults(processes: Sequence[Samples], name: str) -> float | None:
    """Pages that the system hands out to one call: torch's time swings with them."""
    seen = [one.page_faults[name] for one in processes if name in one.page_faults]
    return statistics.median(seen) if seen else None


def _ratios(
    group: Group,
    processes: Sequence[Samples],
    name: str,
    names: Sequence[str],
    reach: float,
    priors: Mapping[str, Prior],
) -> dict[str, Any]:
    """Against every base; against the roof it is the share of the memory limit that was reached."""
    result = {}
    for base in [*group.bases, ROOF]:
        if base in names and base != name and name != NULL:
            each = _ratios_of(processes, base, name)
            ratio = across_processes(each, priors.get(base, NO_PRIOR))
            result[base] = _plain(ratio) | {
                "verdict": verdict(ratio, reach).value,
                "processes": [float(f"{one.ratio:.6g}") for one in each],
            }
    return result


def _ratios_of(processes: Sequence[Samples], base: str, name: str) -> list[Ratio]:
    return [paired_ratio(*paired_seconds(one, base, name)) for one in processes]


def paired_seconds(samples: Samples, base: str, name: str) -> tuple[list[float], list[float]]:
    """Return the seconds of the rounds in which both took part: who left early has the first ones."""
    both = min(len(samples.seconds[base]), len(samples.seconds[name]))
    return samples.seconds[base][:both], samples.seconds[name][:both]


def process_ratios(group: Group, processes: Sequence[Samples]) -> dict[str, list[Ratio]]:
    """Return the subject's ratio in each process against each base, the control and the roof among them."""
    bases = [
        base
        for base in (CONTROL, *group.bases, ROOF)
        if processes and all({base, group.subject} <= one.seconds.keys() for one in processes)
    ]
    return {base: _ratios_of(processes, base, group.subject) for base in bases}


def time_s(processes: Sequence[Samples], name: str) -> float:
    """Return the median seconds per call over all rounds of all processes; infinite for who was not timed."""
    pooled = [s for one in processes for s in one.seconds.get(name, [])]
    return statistics.median(pooled) if pooled else math.inf


def _disagree(group: Group, processes: Sequence[Samples], names: Sequence[str]) -> bool:
    """Whether the processes differ, in a ratio of the subject, by more than their rounds do."""
    bases = [base for base in (*group.bases, ROOF) if base in names]
    logs = ([_round_logs(one, base, group.subject) for one in processes] for base in bases)
    return any(map(disagree, logs))


def _round_logs(samples: Samples, base: str, name: str) -> list[float]:
    pairs = zip(*paired_seconds(samples, base, name), strict=True)
    return [math.log(base_s / s) for base_s, s in pairs]


def from_plain(saved: Mapping[str, Any] | None) -> Ratio | None:
    """Return a ratio as it was before `_plain`.

    >>> from_plain({"ratio": 2.0, "low": 1.0, "high": None})
    Ratio(ratio=2.0, low=1.0, high=inf)
    """
    if saved is None:
        return None
    return Ratio(saved["ratio"], saved["low"], math.inf if saved["high"] is None else saved["high"])


def _plain(ratio: Ratio) -> dict[str, float | None]:
    """Values for JSON, which has no infinity."""
    high = ratio.high if math.isfinite(ratio.high) else None
    return {"ratio": ratio.ratio, "low": ratio.low, "high": high}


def _bandwidth(group: Group, pooled: Sequence[float]) -> dict[str, Any]:
    traffic = group.traffic
    assert traffic is not None
    low_s, high_s = _median_bootstrap(pooled)
    return {
        "memory_bound": traffic.total_bytes >= MEMORY_BOUND_BYTES,
        "read_bytes": traffic.read_bytes,
        "written_bytes": traffic.written_bytes,
        "bandwidth_bytes_per_s": traffic.total_bytes / statistics.median(pooled),
        "bandwidth_low_bytes_per_s": traffic.total_bytes / high_s,
        "bandwidth_high_bytes_per_s": traffic.total_bytes / low_s,
    }


def _median_bootstrap(values: Sequence[float], resamples: int = 400) -> tuple[float, float]:
    numpy = require("numpy")
    drawn = numpy.random.default_rng(0).choice(numpy.asarray(values), (resamples, len(values)))
    medians = numpy.sort(numpy.median(drawn, axis=1))
    cut = int((1 - CONFIDENCE) / 2 * resamples)
    return float(medians[cut]), float(medians[-1 - cut])


def over_roof(row: dict[str, Any]) -> bool:
    """Whether a row is above the roof by more than 5 % and what its A/A control was off, surely.

    Bytes are then miscounted, or work was skipped.

    >>> row = {"control": {"ratio": 1.0, "low": 0.99, "high": 1.01}, "memory_bound": True}
    >>> over_roof(row | {"ratios": {"roof": {"ratio": 1.2, "low": 1.1, "high": 1.3}}})
    True
    """
    share = row["ratios"].get(ROOF)
    if share is None or not row.get("memory_bound"):
        return False
    return bool(share["low"] > MOST_SHARE * reach(from_plain(row["control"])))
