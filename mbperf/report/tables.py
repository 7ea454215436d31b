"""Tables for the terminal: one row a group, what it won against each base, how near memory's limit it is."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mbperf.measure.rows import ROOF, mean_label, reference
from mbperf.require import require

WIDE = 110  # columns from which intervals are written out
LEAST_CASE = 16
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
        means: geometric means, "op device dtype pass" -> base -> ratio.
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
        for table in _table(op, mine, saved, means, width):
            console.print(table)
    notes = _notes(rows)
    if notes:
        console.print(notes)
    return out.getvalue()


def _table(
    op: str, rows: Sequence[Row], saved: Mapping[str, Row], means: Mapping[str, Mapping[str, Row]], width: int
) -> list[Any]:
    """The tables of an operation: one row a group, and below it the bases that have no column there."""
    wide = width >= WIDE
    titles, cells = _other_columns(rows, saved)
    bases = _that_fit(columns(rows), rows, wide, width - LEAST_CASE - sum(map(_widest, cells.values())))
    table = _empty_table(op, "case", [*(f"x {base}" for base in bases), *titles])
    for place, row in enumerate(rows):
        case = row["case"] + f", {row.get('heap')} heap" * bool(row.get("heap"))
        mine = [cells[title][place + 1] for title in titles]
        table.add_row(case, *(ratio(row["ratios"].get(base), wide) for base in bases), *mine)
        if other := row.get("other_heap"):
            its = (ratio(other["ratios"].get(base), wide) for base in bases)
            table.add_row(f"  {other['heap']} heap", *its)
    for label, found in means_of(rows, means).items():
        if any(base in found for base in bases):
            table.add_row(label, *(ratio(found.get(base), wide) for base in bases), style="bold")
    return [table, *_rest(op, rows, bases)]


def _empty_table(title: str, first: str, titles: Sequence[str]) -> Any:
    table = require("rich.table").Table(
        box=require("rich.box").SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=title,
        title_justify="left",
    )
    table.add_column(first, overflow="fold", min_width=LEAST_CASE)
    for one in titles:
        words = one in ("verdict", "against")
        table.add_column(one, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _other_columns(rows: Sequence[Row], saved: Mapping[str, Row]) -> tuple[list[str], dict[str, list[str]]]:
    """The columns behind the ratios, each as its title and its cells; none that would be empty."""
    cells = {
        "GB/s": [bandwidth(row) for row in rows],
        "roof": [share(row) for row in rows],
        "A/A": [control(row) for row in rows],
        "verdict": [_in_color(judged(row)) for row in rows],
    }
    if saved:
        cells["change"] = [_change(row, saved) for row in rows]
    filled = {title: [title, *its] for title, its in cells.items() if any(its)}
    return list(filled), filled


def _in_color(verdict: str) -> str:
    return f"[{MARKS[verdict]}]{verdict}[/]" if MARKS.get(verdict) else verdict


def _widest(cells: Sequence[str]) -> int:
    """Columns of a terminal that these cells take, with the blank before them; words fold."""
    text = require("rich.text").Text
    words = cells[0] == "verdict"
    return 1 + max(
        max(map(len, plain.split()), default=0) if words else len(plain)
        for plain in (text.from_markup(cell).plain for cell in cells)
    )


def _that_fit(bases: Sequence[str], rows: Sequence[Row], wide: bool, room: int) -> list[str]:
    """The first of these bases whose columns there is room for."""
    found = []
    for base in bases:
        values = [value for row in rows for value in (row, row.get("other_heap") or row)]
        room -= _widest([f"x {base}", *(ratio(value["ratios"].get(base), wide) for value in values)])
        if room < 0:
            break
        found.append(base)
    return found


def _rest(op: str, rows: Sequence[Row], bases: Sequence[str]) -> list[Any]:
    """The ratios that have no column, a line each, with their intervals; no table where there are none."""
    lines = [
        (row["case"], base, ratio(one, wide=True), _in_color(one["verdict"]))
        for row in rows
        for base, one in row["ratios"].items()
        if base not in (*bases, ROOF)
    ]
    if not lines:
        return []
    table = _empty_table(f"{op}, against others", "case", ["against", "times faster", "verdict"])
    for line in lines:
        table.add_row(*line)
    return [table]


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the bases that get a column: each row's reference, and what a quarter of the rows have.

    >>> columns([{"ratios": {"numpy": {}, "roof": {}}}, {"ratios": {"mine_v1": {}, "numpy": {}}}])
    ['numpy', 'mine_v1']
    """
    counts = Counter(base for row in rows for base in row["ratios"] if base != ROOF)
    references = {reference(row) for row in rows}
    return [base for base, count in counts.items() if base in references or 4 * count >= len(rows)]


def means_of(rows: Sequence[Row], means: Mapping[str, Mapping[str, Row]]) -> dict[str, Mapping[str, Row]]:
    """Return the geometric means of an operation's rows, of at least two groups, by what a table calls them.

    >>> rows = [{"op": "add", "facts": {"dtype": "f32"}}]
    >>> means_of(rows, {"add f32": {"torch": {"groups": 2}}, "add f16": {"torch": {"groups": 2}}})
    {'geometric mean f32': {'torch': {'groups': 2}}}
    """
    names = {mean_label(row["op"], row["facts"]): row["op"] for row in rows}
    found: dict[str, Mapping[str, Row]] = {}
    for label, bases in means.items():
        several = {base: one for base, one in bases.items() if one.get("groups", 0) > 1}
        if several and label in names:
            found["geometric mean" + label.removeprefix(names[label])] = several
    return found


def judged(row: Row) -> str:
    """Return the verdict that stands for a row: against its reference."""
    base = reference(row)
    return str(row["ratios"][base]["verdict"]) if base else ""


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

    Or of the limit that the row's facts name. "call" stands where a call costs more than moving its bytes, so
    that memory is no limit.

    >>> share({"memory_bound": True, "ratios": {"roof": {"ratio": 1.2, "low": 1.1, "high": 1.3}}})
    '[red]120%![/]'
    """
    value = row["ratios"].get("roof")
    if value is None:
        return ""
    if "limit" in row.get("facts", {}):
        return f"{value['ratio']:.0%}"
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

    A row without one shows the change to the first common base (its reference, if it is one), in doubt.
    """
    if row.get("change"):
        return change(row["change"])
    then = saved.get(f"{row['op']} {row['case']}")
    common = [
        base
        for base in (reference(row), *row["ratios"])
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
