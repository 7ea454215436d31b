"""Saved runs: what they must contain, which are complete, and which of them the next run is compared with.

A run is a file of pytest-benchmark with one more key, "mbperf"; results/README.md documents both.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mbperf.report.lean import joined

SCHEMA = 2
UNVERSIONED = "unversioned"  # as pytest-benchmark calls it
RUN_KEYS = {
    "schema": int,
    "complete": bool,
    "incomplete_because": str,
    "profile": str,
    "budget_s": (int, float),
    "processes": int,
    "confidence": float,
    "geometric_means": dict,
    "hardware": dict,
    "software": dict,
}
ROW_KEYS = {
    "op": str,
    "case": str,
    "contender": str,
    "subject": str,
    "facts": dict,
    "time_s": float,
    "ratios": dict,
    "clean_control": bool,
    "noisy": bool,
    "rounds": list,
    "dropped_rounds": list,
    "inner_calls": list,
    "seeds": list,
}
RATIO_KEYS = {"ratio": float, "low": float, "high": (float, type(None)), "verdict": str}


class BadRecord(ValueError):
    """A file that is not a run of this schema; the message names the file and the field."""


def load(file: Path) -> dict[str, Any]:
    """Read and validate a saved run.

    Args:
        file: a JSON file that pytest-benchmark saved under this plugin.

    Returns:
        The record, with whole rows.

    Raises:
        BadRecord: not JSON, no run of mbperf, another schema, or a field missing or of a wrong type.

    Source: results/README.md.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{file}: cannot be read as JSON: {error}") from error
    return validate(record, str(file))


def validate(record: Any, where: str) -> dict[str, Any]:
    """Return a saved run with whole rows; raise BadRecord unless it is a run of this schema."""
    if not isinstance(record, dict) or not isinstance(record.get("mbperf"), dict):
        raise BadRecord(f'{where}: has no "mbperf" object, so it is no run of mbperf')
    run = record["mbperf"]
    if run.get("schema") != SCHEMA:
        raise BadRecord(f"{where}: mbperf.schema is {run.get('schema')!r}, this version reads {SCHEMA}")
    _require(run, RUN_KEYS, f"{where}: mbperf")
    if not isinstance(record.get("benchmarks"), list):
        raise BadRecord(f'{where}: "benchmarks" is no list')
    for index, benchmark in enumerate(joined(record)["benchmarks"]):
        row = benchmark.get("extra_info", {})
        if "contender" in row:
            _require(row, ROW_KEYS, f"{where}: benchmarks[{index}].extra_info")
            for base, ratio in row["ratios"].items():
                _require(ratio, RATIO_KEYS, f"{where}: benchmarks[{index}].extra_info.ratios.{base}")
    return dict(record)


def _require(found: Any, keys: dict[str, Any], where: str) -> None:
    for key, kind in keys.items():
        if not isinstance(found, dict) or key not in found:
            raise BadRecord(f"{where}.{key} is missing")
        if not isinstance(found[key], kind):
            raise BadRecord(f"{where}.{key} is {found[key]!r}, expected {kind}")


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of every row of a run, in its order."""
    return [b["extra_info"] for b in record["benchmarks"] if "contender" in b["extra_info"]]


def subjects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that are being proved, one per group."""
    return [row for row in rows(record) if row["contender"] == row["subject"]]


def commit(record: Mapping[str, Any]) -> str:
    """Return the commit of a run in eight digits; empty for a folder that is in no repository.

    >>> commit({"commit_info": {"id": "unversioned"}})
    ''
    """
    name = str(record["commit_info"]["id"])
    return "" if name == UNVERSIONED else name[:8]


def is_of_gpu(record: dict[str, Any]) -> bool:
    """Whether everything that a run raced ran on a GPU.

    >>> is_of_gpu({"benchmarks": [{"extra_info": {"contender": "fused", "facts": {"device": "cuda"}}}]})
    True
    """
    devices = {row["facts"].get("device") for row in rows(record)}
    return devices == {"cuda"}


def machine_name(record: dict[str, Any]) -> str:
    """Return what the kind of machine is called, after its GPU where a run raced there alone."""
    run = record["mbperf"]
    if "gpu" in run and is_of_gpu(record):
        return str(run["gpu"]["machine"])
    return str(run["hardware"].get("name"))


def saved_rows(baseline: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the subject rows of a saved run by group name."""
    rows = subjects(baseline) if baseline else []
    return {f"{row['op']} {row['case']}": row for row in rows}


def runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the readable runs under a folder, oldest first; broken and foreign files are passed over."""
    found = []
    for file in folder.rglob("*.json"):
        try:
            found.append((file, load(file)))
        except BadRecord:
            continue
    yield from sorted(found, key=lambda pair: (pair[1].get("datetime", ""), pair[0]))


def newest_complete(folder: Path, machine: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete run under a folder, of one kind of machine if named.

    >>> newest_complete(Path("/no/such/folder")) is None
    True
    """
    complete = [
        (file, record)
        for file, record in runs(folder)
        if record["mbperf"]["complete"] and machine in (None, machine_name(record))
    ]
    return complete[-1] if complete else None
