"""Show what a race of two trees found: a row for each group, and in one line what was done for it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mbperf.require import require

Row = Mapping[str, Any]
STYLES = {"BETTER": "green", "WORSE": "bold red", "SAME": "", "CANNOT TELL": "yellow"}


def show(record: Row) -> None:
    """Print the table of a record, and what it leaves out, to standard output."""
    rich_table = require("rich.table")
    console = require("rich.console").Console(highlight=False)
    table = rich_table.Table(
        box=require("rich.box").SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=f"this: {record['this']}\nthat: {record['that']}",
        title_justify="left",
        title_style="",
    )
    table.add_column("group", overflow="fold", min_width=14)
    for name in ("this", "that", "that / this", "control"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in record["groups"]:
        if not row.get("lost"):
            table.add_row(*cells(row))
    console.print(table)
    for line in notes(record):
        console.print(line, markup=False)


def cells(row: Row) -> list[str]:
    """Return the cells of a group that was measured."""
    mark = STYLES[row["verdict"]]
    return [
        row["group"],
        duration(row.get("this_s")),
        duration(row.get("that_s")),
        interval(row),
        interval(row.get("control")).partition(" ")[2],
        f"[{mark}]{row['verdict']}[/]" if mark else row["verdict"],
    ]


def interval(value: Row | None) -> str:
    """Return a ratio with its bounds; four digits, as 1 % is what matters here.

    >>> interval({"ratio": 1.0312, "low": 1.0254, "high": 1.0371})
    '1.031 [1.025, 1.037]'
    """
    if not value or "ratio" not in value:
        return ""
    # rich reads [..] as markup unless it starts with a digit, which these always do.
    return f"{value['ratio']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def duration(seconds: float | None) -> str:
    """Return seconds in a unit that leaves three digits before the point at most.

    >>> duration(3.64e-3), duration(2.5), duration(None)
    ('3.64 ms', '2.5 s', '')
    """
    if seconds is None:
        return ""
    factor, unit = next(((f, u) for f, u in ((1e6, "us"), (1e3, "ms")) if seconds * f < 1000), (1.0, "s"))
    return f"{seconds * factor:.3g} {unit}"


def notes(record: Row) -> list[str]:
    """Return what the table does not say: groups without a verdict, and what was done."""
    rows = record["groups"]
    lines = [f"not timed: {row['group']}: {row['lost']}" for row in rows if row.get("lost")]
    for tree, errors in record["not_collected"].items():
        lines += [f"not collected in {tree}: {error}" for error in errors]
    reasons: dict[str, list[str]] = {}
    for group, reason in record["left_out"].items():
        reasons.setdefault(reason, []).append(group)
    lines += [f"not compared: {', '.join(groups)}: {reason}" for reason, groups in reasons.items()]
    return [*lines, summary(record)]


def summary(record: Row) -> str:
    """Return the last line: verdicts counted, and how they were come by."""
    rows = [row for row in record["groups"] if not row.get("lost")]
    counts = Counter(row["verdict"] for row in rows)
    told = (
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict]) or "none measured"
    )
    counts_of = sorted({row["processes"] for row in rows}) or [0]
    processes = " to ".join(map(str, dict.fromkeys((counts_of[0], counts_of[-1]))))
    heap = f", {record['heap']} heap" if record["heap"] else ""
    return (
        f"{len(rows)} groups: {told}. 99 % intervals over {processes} fresh processes of each tree and "
        f"group, {record['threads']} threads{heap}; {record['took_s']:.0f} s on {record['machine']}, "
        f"load {record['load_before']:.1f} before."
    )
