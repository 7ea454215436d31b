"""Tables for the terminal: one row a group, what it won against each base, how near memory's limit it is."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mbperf.require import require

WIDE = 110  # columns from which intervals are written out
MOST_SHARE = 1.05
MARKS = {"FASTER": "green", "SLOWER": "red", "SAME": "", "CANNOT TELL": "yellow"}
Row = Mapping[str, Any]


def headline(
    rows: Sequence[Row],
    saved: Mapping[str, Row],
    means: Mapping[str, Mapping[str, Row]],
    width: int = 80,
    color: bool = False,
) -> str:
    """Return the headline table of a run, one per operation, as text for a terminal.

    Args:
        rows: the subjects' figures, as in `extra_info`.
        saved: group name -> the same row of the saved run; empty without one.
        means: geometric means, "op dtype pass" -> base -> ratio.
        width: columns of the terminal; 80 suffice.
        color: with ANSI colours.

    Returns:
        Text that ends in a newline.
    """
    out = io.StringIO()
    console = require("rich.console").Console(
        file=out, width=width, force_terminal=color, no_color=not color, highlight=False
    )
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        console.print(_table(op, mine, saved, means, width >= WIDE))
    notes = _notes(rows)
    if notes:
        console.print(notes)
    return out.getvalue()


def _table(
    op: str, rows: Sequence[Row], saved: Mapping[str, Row], means: Mapping[str, Mapping[str, Row]], wide: bool
) -> Any:
    table = require("rich.table").Table(
        box=require("rich.box").SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=op,
        title_justify="left",
    )
    table.add_column("case", overflow="fold", min_width=16)
    titles = ["x naive", "x torch", "GB/s", "roof", "A/A"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    if saved:
        table.add_column("change", justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row, wide)
        table.add_row(*cells, *([_change(row, saved)] if saved else []))
    for label, bases in means.items():
        if label.split()[0] == op and any(base in bases for base in ("naive", "torch")):
            name = "geometric mean " + " ".join(label.split()[1:])
            table.add_row(name, *(ratio(bases.get(base), wide) for base in ("naive", "torch")), style="bold")
    return table


def _cells(row: Row, wide: bool) -> list[str]:
    ratios = row["ratios"]
    verdict = judged(row)
    other = row.get("other_heap", {"heap": "", "ratios": {}})
    return [
        in_lines(row["case"] + f", {row.get('heap')} heap" * bool(row.get("heap")), other["heap"]),
        in_lines(ratio(ratios.get("naive"), wide), ratio(other["ratios"].get("naive"), wide)),
        in_lines(ratio(ratios.get("torch"), wide), ratio(other["ratios"].get("torch"), wide)),
        bandwidth(row),
        share(row),
        control(row),
        f"[{MARKS[verdict]}]{verdict}[/]" if MARKS.get(verdict) else verdict,
    ]


def in_lines(first: str, second: str) -> str:
    """Return a cell whose second line is of the heap that suits torch less."""
    return f"{first}\n{second}" if second else first


def judged(row: Row) -> str:
    """Return the verdict that stands for a row: against torch, or the first base where torch is none."""
    ratios = {base: one for base, one in row["ratios"].items() if base != "roof"}
    if not ratios:
        return ""
    return str(ratios.get("torch", next(iter(ratios.values())))["verdict"])


def ratio(value: Row | None, wide: bool = False) -> str:
    """Return a ratio in words, three digits, with its interval where there is room, else "?" where in doubt.

    >>> ratio({"ratio": 8.214, "low": 8.1, "high": 8.3}), ratio({"ratio": 8.2, "low": 8.1, "high": 8.3}, True)
    ('8.21x', '8.20x [8.10, 8.30]')
    """
    if value is None:
        return ""
    if not wide:
        return f"{digits(value['ratio'])}x" + "?" * in_doubt(value)
    if value["high"] is None:  # five rounds cannot bound a median at 99 %
        return f"{digits(value['ratio'])}x (too few rounds)"
    # rich reads [..] as markup unless it starts with a digit or a blank, which these always do.
    return f"{digits(value['ratio'])}x [{digits(value['low'])}, {digits(value['high'])}]"


def in_doubt(value: Row) -> bool:
    """Whether a ratio was judged CANNOT TELL; geometric means are not judged."""
    return value.get("verdict") == "CANNOT TELL"


def digits(value: float) -> str:
    """Return three significant digits without an exponent.

    >>> digits(0.5), digits(12.34), digits(1234.5)
    ('0.50', '12.3', '1234')
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def bandwidth(row: Row) -> str:
    """Return GB/s, or nothing where bytes say nothing."""
    rate = row.get("bandwidth_bytes_per_s")
    return "" if rate is None else digits(rate / 1e9)


def share(row: Row) -> str:
    """Return the share of the memory limit; above 105 % it is an error and marked as one.

    "call" stands where a call costs more than moving its bytes, so that memory is no limit.

    >>> share({"memory_bound": True, "ratios": {"roof": {"ratio": 1.2, "low": 1.1, "high": 1.3}}})
    '[red]120%![/]'
    """
    value = row["ratios"].get("roof")
    if value is None:
        return ""
    if not row["memory_bound"]:
        return "call"
    return f"[red]{value['ratio']:.0%}![/]" if value["low"] > MOST_SHARE else f"{value['ratio']:.0%}"


def control(row: Row) -> str:
    """Return how far the A/A control was off, with what that is worth.

    "!" if it was surely off, "?" if too few or too noisy rounds could not show it clean, "~" if so many were
    disturbed that none was dropped.

    >>> found = {"ratio": 1.02, "low": 0.98, "high": 1.06}
    >>> control({"control": found, "clean_control": False, "noisy": False})
    '+2.0%?'
    """
    if row["control"] is None:
        return ""
    mark = "!" if is_off(row) else "" if row["clean_control"] else "?"
    return f"{row['control']['ratio'] - 1:+.1%}{mark}" + "~" * row["noisy"]


def is_off(row: Row) -> bool:
    """Whether the A/A control found a difference where there is none: its interval excludes 1."""
    found = row["control"]
    return found is not None and (found["low"] > 1 or (found["high"] is not None and found["high"] < 1))


def _change(row: Row, saved: Mapping[str, Row]) -> str:
    """Change of the ratio since the saved run, with its verdict unless that is SAME ("?": CANNOT TELL).

    A row without one shows the change to the first common base (torch, if it is one), in doubt.
    """
    if row.get("change"):
        return change(row["change"])
    then = saved.get(f"{row['op']} {row['case']}")
    common = [
        base
        for base in ("torch", *row["ratios"])
        if then and base in row["ratios"] and base in then["ratios"]
    ]
    if not then or not common:
        return "new"
    before, now = then["ratios"][common[0]], row["ratios"][common[0]]
    doubt = "?" * (in_doubt(before) or in_doubt(now))
    return f"{now['ratio'] / before['ratio'] - 1:+.1%}{doubt}"


def change(found: Row) -> str:
    """Return a change since the compared run in words.

    >>> change({"ratio": 0.95, "verdict": "WORSE"}), change({"ratio": 1.001, "verdict": "SAME"})
    ('-5.0% WORSE', '+0.1%')
    """
    if found["ratio"] is None:
        return "?"
    words = {"SAME": "", "CANNOT TELL": "?"}
    return f"{found['ratio'] - 1:+.1%}" + words.get(found["verdict"], f" {found['verdict']}")


def _notes(rows: Sequence[Row]) -> str:
    off = sum(map(is_off, rows))
    unsure = sum(not row["clean_control"] for row in rows) - off
    noisy = sum(row["noisy"] for row in rows)
    differ = sum(row.get("processes_disagree", False) for row in rows)
    notes = {
        f"{differ} of {len(rows)} groups had processes that disagree: their intervals are as wide.": differ,
        f"{off} of {len(rows)} A/A controls were off (!): differences of that size mean nothing there.": off,
        f"{unsure} of {len(rows)} could not be judged (?): too few rounds, or too noisy ones.": unsure,
        f"{noisy} of {len(rows)} groups were noisy (~): no undisturbed rounds to prefer.": noisy,
    }
    return "\n".join(text for text, there in notes.items() if there)
