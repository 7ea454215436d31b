"""When a run fails: a floor surely missed, or a ratio surely worse than the saved run's, twice.

Floors are judged on the interval's bound, widened by what the A/A control found, so noise alone fails
nothing; a dirty control vetoes the comparison with the saved run.
The third gate, instruction counts, is `make counters`.
"""

from typing import Any

from mbperf.measure.figures import figures, from_plain
from mbperf.measure.group import Group
from mbperf.measure.statistics import reach
from mbperf.plugin.session import Session
from mbperf.report import record

EXIT_FLOOR, EXIT_SLOWER = 11, 12
MOST_LOSS = 0.05


def judge(run: Session, baseline: dict[str, Any] | None) -> tuple[int, list[str]]:
    """Judge a run.

    Args:
        run: whose groups have been measured; groups that look slower are measured once more.
        baseline: the saved run of the same kind of machine, or None.

    Returns:
        Exit code (0 if all is well) and a message for each failure.
    """
    missed = [message for group in run.groups for message in missed_floors(_subject_row(run, group))]
    if missed:
        return EXIT_FLOOR, missed
    saved = record.saved_rows(baseline)
    slower = [message for group in run.groups for message in _confirmed_losses(run, group, saved)]
    return (EXIT_SLOWER, slower) if slower else (0, [])


def missed_floors(row: dict[str, Any] | None) -> list[str]:
    """Return a message per floor that even the better bound misses, by more than the A/A control was off.

    >>> ratio, control = {"ratio": 1.5, "low": 1.4, "high": 1.6}, {"ratio": 1.0, "low": 0.99, "high": 1.01}
    >>> row = {"control": control, "ratios": {"torch": ratio}, "op": "add", "case": "1"}
    >>> missed_floors(row | {"floors": {"torch": 2.0}})
    ['add 1: 1.50x torch [1.40, 1.60], the floor is 2x']
    """
    if row is None:
        return []
    doubt = reach(from_plain(row["control"]))
    return [
        f"{row['op']} {row['case']}: {_words(row['ratios'][base], base)}, the floor is {floor:g}x"
        for base, floor in row.get("floors", {}).items()
        if (ratio := from_plain(row["ratios"].get(base))) and ratio.high * doubt < floor
    ]


def losses(row: dict[str, Any] | None, saved: dict[str, Any] | None) -> list[str]:
    """Return a message per base against which the subject lost more than 5 % since the saved run.

    The intervals must not overlap, and both runs' A/A controls must be clean.
    """
    if row is None or saved is None or not (row["clean_control"] and saved["clean_control"]):
        return []
    return [
        f"{row['op']} {row['case']}: {_words(now, base)}, saved run {_words(saved['ratios'][base], base)}"
        for base, now in row["ratios"].items()
        if base in saved["ratios"] and _lost(now, saved["ratios"][base])
    ]


def change(now: dict[str, Any], then: dict[str, Any]) -> float:
    """Return the relative change of a ratio since the saved run."""
    return now["ratio"] / then["ratio"] - 1


def _lost(now: dict[str, Any], then: dict[str, Any]) -> bool:
    apart = now["high"] is not None and now["high"] < then["low"]
    return apart and change(now, then) < -MOST_LOSS


def _confirmed_losses(run: Session, group: Group, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Losses that a second measurement of the group finds again; the second one's messages."""
    then = saved.get(group.name)
    if not losses(_subject_row(run, group), then):
        return []
    again = figures(group, run.measure_again(group), run.priors)
    return losses(again.get(group.subject), then)


def _subject_row(run: Session, group: Group) -> dict[str, Any] | None:
    return run.rows.get(group.name, {}).get(group.subject)


def _words(ratio: dict[str, Any], base: str) -> str:
    high = "inf" if ratio["high"] is None else f"{ratio['high']:.2f}"
    return f"{ratio['ratio']:.2f}x {base} [{ratio['low']:.2f}, {high}]"
