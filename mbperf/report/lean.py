"""The saved form of a run: one row a line, what a group shares said once, no digit that means nothing.

pytest-benchmark reads it as it is; `joined` gives every row back what its group shares.
"""

import json
from collections.abc import Mapping
from typing import Any

from mbperf.measure.rows import CONTROL, NULL, ROOF

DIGITS, TIME_DIGITS = 4, 6  # significant digits of ratios and of seconds; the clock resolves fewer
# Equal in all rows of a group, or else (rounds, of who left early) a row's own.
SHARED = (
    "op",
    "case",
    "subject",
    "facts",
    "control",
    "clean_control",
    "noisy",
    "heap",
    "memory_bound",
    "read_bytes",
    "written_bytes",
    "rounds",
    "dropped_rounds",
    "inner_calls",
    "seeds",
)
TRAFFIC = ("memory_bound", "read_bytes", "written_bytes")  # of all rows but the null call's
# `joined` makes these up: the median of pytest-benchmark's statistics, and the bytes over that.
TIME, RATE = "time_s", "bandwidth_bytes_per_s"
BOUNDS = ("bandwidth_low_bytes_per_s", "bandwidth_high_bytes_per_s")  # saved as bounds of the time
TIME_BOUNDS = "time_bounds_s"
SPREADS = ("stddev", "iqr", "q1", "q3", "ld15iqr", "hd15iqr")  # the histogram's, which is read off a picture
# pytest-benchmark's `ops` is 1 / mean, which it makes up where it is missing; nothing of it reads the others.
UNREAD_STATS = ("ops", "total", "iqr_outliers", "stddev_outliers")


def lean(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as it is saved.

    Args:
        run: a record with whole rows, as pytest-benchmark makes it.

    Returns:
        A record that holds the rows' figures once, in digits that mean something; its argument is unchanged.
    """
    facts: dict[str, Any] = {}
    entries = [_lean_entry(entry, facts) for entry in run["benchmarks"]]
    return {**run, "benchmarks": entries, "mbperf": {**_rounded(run["mbperf"]), "groups": facts}}


def read_later(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run without the rows that only it looks at: the null call's, and the control's.

    The ratio of the control is a fact of its group. Where samples are saved the rows stay: theirs are drawn.
    """
    return {**run, "benchmarks": [entry for entry in run["benchmarks"] if not _is_unread(entry)]}


def _is_unread(entry: Mapping[str, Any]) -> bool:
    return entry["extra_info"].get("contender") in (CONTROL, NULL) and "data" not in entry["stats"]


def _lean_entry(entry: Mapping[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    row = entry["extra_info"]
    if "contender" not in row:
        return dict(entry)
    kept = {key: value for key, value in entry.items() if key != "options"}
    its = facts.setdefault(entry["group"], {})
    its |= {key: _rounded(row[key]) for key in SHARED if key in row and key not in its}
    read = _read_of_subject(row) if row["contender"] == row["subject"] else _read_of_other(row)
    shared = {key for key in SHARED if key in row and _rounded(row[key]) == its[key]}
    own = {key: value for key, value in read.items() if key not in (*shared, TIME, RATE, *BOUNDS)}
    return {**kept, "extra_info": _rounded(own), "stats": _lean_stats(entry["stats"])}


def _lean_stats(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value, DIGITS if key in SPREADS else TIME_DIGITS)
        for key, value in stats.items()
        if key not in UNREAD_STATS
    }


def _read_of_subject(row: Mapping[str, Any]) -> dict[str, Any]:
    """All of it; a change holds the figure that it is not about only among `bases`."""
    read = {**row, **_time_bounds(row)}
    if changed := row.get("change"):
        others = {base: one for base, one in changed["bases"].items() if base != changed["against"]}
        read["change"] = {**changed, "bases": others}
    return read


def _read_of_other(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a row that is not the subject's: its ratios only where it is a rung of the ladder."""
    ratios = row["ratios"] if "phase_time_s" in row else {}
    unread = ["other_heap", *["page_faults"] * (row["contender"] in (CONTROL, NULL, ROOF))]
    read = {key: value for key, value in row.items() if key not in unread}
    bounds = {} if row["contender"] == CONTROL else _time_bounds(row)
    return {**read, "ratios": _without_processes(ratios), **bounds}


def _time_bounds(row: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds of GB/s as those of the seconds that they come from."""
    if not {*BOUNDS} <= row.keys():
        return {}
    moved = row["read_bytes"] + row["written_bytes"]
    return {TIME_BOUNDS: sorted(moved / row[bound] for bound in BOUNDS)}


def _without_processes(ratios: Mapping[str, Any]) -> dict[str, Any]:
    return {base: {k: v for k, v in one.items() if k != "processes"} for base, one in ratios.items()}


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    """Round the floats in nested values; times and their bounds keep the digits of a time.

    Bounds in fewer digits than their median could lie on one side of it: on a GPU they are as near.

    >>> _rounded({"time_s": 1.23456789, "ratios": [{"low": 1.23456789}], "rounds": 123456})
    {'time_s': 1.23457, 'ratios': [{'low': 1.235}], 'rounds': 123456}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {
            key: _rounded(one, TIME_DIGITS if key.endswith(("time_s", TIME_BOUNDS)) else digits)
            for key, one in value.items()
        }
    return [_rounded(one, digits) for one in value] if isinstance(value, list | tuple) else value


def joined(run: dict[str, Any]) -> dict[str, Any]:
    """Give every row of a saved run what its group shares, in place; return the run.

    >>> entry = {"group": "add 1", "extra_info": {"contender": "mine"}}
    >>> joined({"benchmarks": [entry], "mbperf": {"groups": {"add 1": {"op": "add"}}}})["benchmarks"]
    [{'group': 'add 1', 'extra_info': {'op': 'add', 'contender': 'mine'}}]
    """
    groups = run["mbperf"].get("groups", {})
    for entry in run["benchmarks"]:
        if "contender" in entry.get("extra_info", {}):
            entry["extra_info"] = _whole(groups.get(entry.get("group"), {}), entry)
    return run


def _whole(shared: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    own = entry["extra_info"]
    if own["contender"] == NULL:
        shared = {key: value for key, value in shared.items() if key not in TRAFFIC}
    row = {**shared, **own}
    if "median" in entry.get("stats", {}):
        row.setdefault(TIME, entry["stats"]["median"])
    if "read_bytes" in row and RATE not in row and isinstance(row.get(TIME), float):
        moved = row["read_bytes"] + row["written_bytes"]
        row[RATE] = moved / row[TIME]
        if TIME_BOUNDS in row:
            low_s, high_s = row.pop(TIME_BOUNDS)
            row |= dict(zip(BOUNDS, (moved / high_s, moved / low_s), strict=True))
    return row


def text(run: Mapping[str, Any]) -> str:
    """Return a run as JSON in which every row, and every group's facts, stand on a line of their own.

    >>> print(text({"version": "5", "benchmarks": [{"name": "a"}, {"name": "b"}]}), end="")
    {
    "version":"5",
    "benchmarks":[
    {"name":"a"},
    {"name":"b"}]
    }
    """
    return "{\n" + ",\n".join(f"{_line(key)}:{_lines(key, value)}" for key, value in run.items()) + "\n}\n"


def _lines(key: str, value: Any) -> str:
    if key == "benchmarks":
        return "[\n" + ",\n".join(map(_line, value)) + "]"
    if key in ("mbperf", "groups"):
        return "{\n" + ",\n".join(f"{_line(k)}:{_lines(k, v)}" for k, v in value.items()) + "}"
    return _line(value)


def _line(value: Any) -> str:
    # What JSON has no form for is said in words without its address.
    return json.dumps(
        value, separators=(",", ":"), ensure_ascii=False, default=lambda one: type(one).__name__
    )
