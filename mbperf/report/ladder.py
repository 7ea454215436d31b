"""The ladder of training loops: a table for the terminal and for README, a picture, and two rows in words.

Every function takes saved figures; a rung that the run left out keeps its place and says so.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mbperf.report.tables import digits, ratio
from mbperf.require import require

Row = Mapping[str, Any]
OP, BASE, BEST, TORCH = "training", "slices", "fused", "torch"
PHASES = {
    "data": "#e45756",
    "forward": "#4c78a8",
    "loss": "#eeca3b",
    "backward": "#72b7b2",
    "step": "#b0b0b0",
}
NOT_RUN = "not run: --mbperf-compile"


def rungs(rows: Sequence[Row]) -> dict[str, tuple[str, Row | None]]:
    """Return the rungs of a run, from the bottom up.

    Args:
        rows: all rows of a run.

    Returns:
        Contender -> its label and its row, None where it was not measured; empty without a ladder.

    >>> rungs([])
    {}
    """
    measured = {row["contender"]: row for row in rows if row["op"] == OP and "phase_time_s" in row}
    labels: Mapping[str, str] = next((row["facts"]["rungs"] for row in measured.values()), {})
    return {name: (label, measured.get(name)) for name, label in labels.items()}


def samples_per_s(row: Row) -> float:
    """Return training samples per second.

    >>> samples_per_s({"facts": {"N": 640}, "time_s": 0.5})
    1280.0
    """
    return float(row["facts"]["N"] / row["time_s"])


def shares(row: Row) -> dict[str, float]:
    """Return the share of an epoch's time that each phase has.

    >>> shares({"phase_time_s": {"data": 1.0, "loss": 3.0}})
    {'data': 0.25, 'loss': 0.75}
    """
    seconds = row["phase_time_s"]
    return {phase: value / sum(seconds.values()) for phase, value in seconds.items()}


def markdown(rows: Sequence[Row]) -> str:
    """Return the ladder as a table in Markdown, and its best rung in words; empty without a ladder."""
    ladder = rungs(rows)
    if not ladder:
        return ""
    lines = [
        f"| | samples/s | x {BASE} | " + " | ".join(PHASES) + " |",
        "|---|--:|--:|" + "--:|" * len(PHASES),
    ]
    for label, row in ladder.values():
        cells = _cells(row, wide=True) if row else [NOT_RUN, "", *[""] * len(PHASES)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *aloud(rows)])


def _cells(row: Row, wide: bool) -> list[str]:
    speed = "1" if row["contender"] == BASE else ratio(row["ratios"].get(BASE), wide)
    return [f"{samples_per_s(row):,.0f}", speed, *(f"{share:.0%}" for share in shares(row).values())]


def aloud(rows: Sequence[Row]) -> list[str]:
    """Return what the best rung pays for its batches and its loss, in a sentence; none without all rungs."""
    ladder = rungs(rows)
    best, base, torch = (ladder.get(name, ("", None))[1] for name in (BEST, BASE, TORCH))
    if best is None or base is None or torch is None:
        return []
    mine, plain, theirs = (_microseconds(row) for row in (best, base, torch))
    return [
        f"In words: a batch costs mbperf's rung {digits(mine['data'])} us of data, where views of the data "
        f"cost {digits(plain['data'])} us and torch's DataLoader {digits(theirs['data'])} us. {_least(best)}"
        "Data and forward together, as a view is first read there: "
        f"{digits(mine['data'] + mine['forward'])}, {digits(plain['data'] + plain['forward'])} and "
        f"{digits(theirs['data'] + theirs['forward'])} us. The loss "
        f"takes {digits(mine['loss'])} us, `F.cross_entropy` {digits(theirs['loss'])} us; with backward, "
        f"{digits(mine['loss'] + mine['backward'])} and "
        f"{digits(theirs['loss'] + theirs['backward'])} us."
    ]


def _least(row: Row) -> str:
    """What no shuffled batch from torch's DataLoader can do without, where it was measured."""
    if "least_data_time_s" not in row:
        return ""
    least = row["least_data_time_s"] / _batches(row) * 1e6
    return (
        "A shuffled batch has to be copied: with torch's DataLoader around a bare copy of as many rows, "
        f"data costs {digits(least)} us. "
    )


def _microseconds(row: Row) -> dict[str, float]:
    """Of each phase, per batch."""
    return {phase: seconds / _batches(row) * 1e6 for phase, seconds in row["phase_time_s"].items()}


def _batches(row: Row) -> float:
    return float(row["facts"]["N"] / row["facts"]["bs"])


def terminal(rows: Sequence[Row], width: int = 80) -> str:
    """Return the ladder as text for a terminal; empty without a ladder."""
    ladder = rungs(rows)
    if not ladder:
        return ""
    table = require("rich.table").Table(
        box=require("rich.box").SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title="ladder: an epoch, and the share of its phases",
        title_justify="left",
    )
    table.add_column("rung", overflow="fold", min_width=14)
    for title in ("samples/s", f"x {BASE}", *PHASES):
        table.add_column(title, justify="right", no_wrap=True)
    for label, row in ladder.values():
        table.add_row(label, *(_cells(row, wide=False) if row else [NOT_RUN.partition(":")[0]]))
    out = io.StringIO()
    require("rich.console").Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue()


def picture(rows: Sequence[Row]) -> Any:
    """Draw samples/s of every rung, and how its time is shared among the phases.

    Args:
        rows: all rows of a run.

    Returns:
        Figure, or None without a ladder.
    """
    ladder = rungs(rows)
    if not ladder:
        return None
    figure = require("matplotlib.figure").Figure(
        figsize=(9.0, 1.3 + 0.36 * len(ladder)), layout="constrained"
    )
    speed, parts = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for place, (_, row) in enumerate(ladder.values()):
        if row is None:
            speed.text(0, place, f" {NOT_RUN}", va="center", fontsize=8, color="#777777")
        else:
            _speed_bar(speed, place, row)
            _phase_bars(parts, place, row)
    for axes in (speed, parts):
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_yticks(range(len(ladder)), [label for label, _ in ladder.values()], fontsize=8)
    speed.set(xlabel="thousand samples/s", ylim=(len(ladder) - 0.5, -0.5))
    speed.margins(x=0.16)
    parts.set(xlabel="share of the epoch", xlim=(0, 1))
    parts.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    parts.tick_params(left=False)
    handles, labels = parts.get_legend_handles_labels()
    figure.legend(
        handles[: len(PHASES)],
        labels[: len(PHASES)],
        frameon=False,
        fontsize=8,
        ncols=len(PHASES),
        loc="outside upper right",
    )
    return figure


def _speed_bar(axes: Any, place: int, row: Row) -> None:
    thousands = samples_per_s(row) / 1e3
    axes.barh(place, thousands, color="#54a24b" if row["contender"] == BEST else "#4c78a8", height=0.7)
    axes.annotate(
        f"{thousands:.0f}",
        (thousands, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="#555555",
    )


def _phase_bars(axes: Any, place: int, row: Row) -> None:
    left = 0.0
    for phase, share in shares(row).items():
        axes.barh(place, share, left=left, color=PHASES[phase], height=0.7, label=phase)
        if share >= 0.05:  # narrower bars have no room for a number
            axes.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=7)
        left += share
