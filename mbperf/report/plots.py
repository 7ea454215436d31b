"""Pictures of a run: bandwidth over size, speed-ups with intervals, batch x classes, rounds.

Every function takes saved figures and returns a matplotlib Figure, or None where the run has nothing for it.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mbperf.measure.rows import ROOF, reference
from mbperf.report.tables import digits, in_doubt
from mbperf.require import require

Row = Mapping[str, Any]
PASSES = {"no_grad": "#4c78a8", "forward": "#72b7b2", "fwd+bwd": "#e45756"}
CONTENDERS = {
    "fused": "#e45756",
    "naive": "#b0b0b0",
    "torch": "#4c78a8",
    "roof": "#222222",
    "again": "#f2a6a7",
}
OTHER = "#54a24b"
# Contenders with names of their own, in the order of their group.
FURTHER = (OTHER, "#b279a2", "#eeca3b", "#9d755d", "#f58518", "#72b7b2")
NARROW, WIDE = (6.4, 4.0), (8.0, 4.5)


def _colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each contender: its own, or the next of those for other names."""
    others = itertools.cycle(FURTHER)
    return {name: CONTENDERS.get(name) or next(others) for name in dict.fromkeys(names)}


def _figure(size: tuple[float, float] = WIDE) -> tuple[Any, Any]:
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_log(axis: Any, unit: str = "") -> None:
    """Label a logarithmic axis in plain numbers: powers of ten, and between them where there is room."""

    def between(value: float, _: Any) -> str:
        low, high = axis.get_view_interval()
        room = high / low < 6 or (high / low < 100 and f"{value:e}"[0] in "25")
        return f"{value:,.10g}{unit}" if room else ""

    axis.set_major_formatter(lambda value, _: f"{value:,.10g}{unit}")
    axis.set_minor_formatter(between)


def bandwidth(rows: Sequence[Row], op: str) -> Any:
    """Draw GB/s over the bytes moved, one panel a pass; the measured memory limit is dashed.

    Args:
        rows: all rows of a run.
        op: the operation to draw.

    Returns:
        Figure, or None without bandwidths.
    """
    mine = [row for row in rows if row["op"] == op and "bandwidth_bytes_per_s" in row and _plain(row)]
    passes = list(dict.fromkeys(row["facts"].get("pass", "") for row in mine))
    if not mine:
        return None
    figure = require("matplotlib.figure").Figure(figsize=(3.4 * len(passes) + 2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    subjects = [row for row in mine if row["contender"] == row["subject"]]
    names = [row["subject"] for row in subjects] + [base for row in subjects if (base := reference(row))]
    colors = _colors([*names, ROOF])
    for panel, step in zip(panels, passes, strict=True):
        _bandwidth_panel(panel, [row for row in mine if row["facts"].get("pass", "") == step], step, colors)
    panels[0].set_ylabel("GB/s")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right upper")
    figure.suptitle(f"{op}: bytes that must move, over time", fontsize=11, x=0.01, ha="left")
    return figure


def _bandwidth_panel(panel: Any, rows: Sequence[Row], title: str, colors: Mapping[str, str]) -> None:
    for name, color in colors.items():
        mine = [row for row in rows if row["contender"] == name]
        if mine:
            _bandwidth_line(panel, name, sorted(mine, key=_bytes), color)
    panel.set(xscale="log", yscale="log", xlabel="bytes read and written", title=title)
    panel.spines[["top", "right"]].set_visible(False)
    label_log(panel.yaxis)


def _bandwidth_line(panel: Any, name: str, rows: Sequence[Row], color: str) -> None:
    rate = [row["bandwidth_bytes_per_s"] / 1e9 for row in rows]
    below = [r - row["bandwidth_low_bytes_per_s"] / 1e9 for r, row in zip(rate, rows, strict=True)]
    above = [row["bandwidth_high_bytes_per_s"] / 1e9 - r for r, row in zip(rate, rows, strict=True)]
    # Shapes of one size differ, so only the roof, which knows no shapes, is a line.
    style = "--" if name == "roof" else ""
    panel.errorbar(
        [_bytes(row) for row in rows],
        rate,
        yerr=[below, above],
        fmt=style + ("." if name == "roof" else "o"),
        markersize=5,
        elinewidth=1,
        linewidth=1,
        color=color,
        label=name,
    )


def forest(subjects: Sequence[Row]) -> Any:
    """Draw each group's ratio to its reference with its interval; the band is what the A/A controls showed.

    Args:
        subjects: the rows being proved.

    Returns:
        Figure, or None where no group has a base.
    """
    mine = [(row, base) for row in reversed(subjects) if (base := reference(row))]
    # One base in one picture, unless hardly a group has the same.
    base, count = Counter(base for _, base in mine).most_common(1)[0] if mine else ("", 0)
    if 2 * count > len(mine):
        mine = [(row, its) for row, its in mine if its == base]
    if not mine:
        return None
    one_base = len({its for _, its in mine}) == 1
    figure, axes = _figure((8.0, 0.8 + 0.24 * len(mine)))
    controls = [row["control"] for row, _ in mine if row["control"]]
    if controls:
        low = min(one["ratio"] for one in controls)
        high = max(one["ratio"] for one in controls)
        axes.axvspan(low, high, color="#dddddd", zorder=0, label="A/A controls, all groups")
    for place, (row, its) in enumerate(mine):
        _forest_row(axes, place, row, its)
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel=f"times faster than {base if one_base else 'its base'} (99 % interval; hollow: cannot tell)",
        ylim=(-0.7, len(mine) - 0.3),
    )
    labels = [f"{row['op']} {row['case']}" + f" / {its}" * (not one_base) for row, its in mine]
    axes.set_yticks(range(len(mine)), labels, fontsize=8)
    label_log(axes.xaxis, "x")
    figure.legend(frameon=False, fontsize=8, loc="outside lower right")
    return figure


def _forest_row(axes: Any, place: int, row: Row, base: str) -> None:
    ratio = row["ratios"][base]
    color = PASSES.get(row["facts"].get("pass", ""), OTHER)
    high = ratio["ratio"] if ratio["high"] is None else ratio["high"]
    axes.plot([ratio["low"] or ratio["ratio"], high], [place, place], color=color, linewidth=2)
    face = "white" if in_doubt(ratio) else color
    axes.plot(ratio["ratio"], place, "o", color=color, markerfacecolor=face, markersize=5)
    axes.annotate(
        f"{digits(ratio['ratio'])}x",
        (high, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color="#555555",
    )


def heat_map(subjects: Sequence[Row], base: str = "torch") -> Any:
    """Draw batch x classes, coloured by the ratio to `base`: forward+backward, float32.

    Returns:
        Figure, or None where no row has N and C.
    """
    mine = [
        row
        for row in subjects
        if base in row["ratios"] and {"N", "C"} <= {*row["facts"]} and _plain(row) and _is_main(row)
    ]
    if not mine:
        return None
    rows = sorted({row["facts"]["N"] for row in mine})
    columns = sorted({row["facts"]["C"] for row in mine})
    figure, axes = _figure(NARROW)
    cells = [[float("nan")] * len(columns) for _ in rows]
    for row in mine:
        cells[rows.index(row["facts"]["N"])][columns.index(row["facts"]["C"])] = row["ratios"][base]["ratio"]
    norm = require("matplotlib.colors").LogNorm(vmin=1, vmax=max(max(map(_finite, line)) for line in cells))
    image = axes.imshow(cells, norm=norm, cmap="YlOrRd", aspect="auto", origin="lower")
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if value == value:
                # Dark cells need light words.
                light = norm(max(value, 1)) > 0.65
                axes.text(
                    x,
                    y,
                    f"{digits(value)}x",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="w" if light else "k",
                )
    axes.set_xticks(range(len(columns)), [f"{c:,}" for c in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{n:,}" for n in rows], fontsize=8)
    axes.set(xlabel="classes", ylabel="rows", title=f"times faster than {base}, forward + backward, float32")
    bar = figure.colorbar(image)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    bar.ax.yaxis.set_minor_formatter(lambda value, _: "")
    return figure


def _finite(value: float) -> float:
    return value if value == value else 1.0


def trace(benchmarks: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the time of every contender of one group, round by round: drift and bursts are shared.

    Args:
        benchmarks: the saved entries of one group, with their samples.

    Returns:
        Figure, or None where samples were not saved.
    """
    mine = [
        one for one in benchmarks if one["extra_info"]["contender"] != "null" and one["stats"].get("data")
    ]
    if not mine:
        return None
    figure, axes = _figure()
    colors = _colors(one["extra_info"]["contender"] for one in mine)
    edges = _process_edges(mine[0]["extra_info"]["rounds"])
    for one in mine:
        name, samples = one["extra_info"]["contender"], one["stats"]["data"]
        # Who left early has the first rounds of each process.
        starts = zip([0, *edges], one["extra_info"]["rounds"], strict=True)
        axes.plot(
            [start + place for start, count in starts for place in range(1, count + 1)],
            [s * 1e6 for s in samples],
            color=colors[name],
            linewidth=0.8,
            marker=".",
            markersize=4,
            label=name,
        )
    for edge in edges:
        axes.axvline(edge + 0.5, color="#bbbbbb", linewidth=0.8, linestyle=":")
    row = mine[0]["extra_info"]
    axes.set(
        yscale="log", xlabel="round", ylabel="us per call", title=f"{row['op']} {row['case']}, round by round"
    )
    label_log(axes.yaxis)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _process_edges(rounds: Sequence[int]) -> list[int]:
    """After which rounds another fresh process begins."""
    return [sum(rounds[:i]) for i in range(1, len(rounds))]


def _bytes(row: Row) -> int:
    return int(row["read_bytes"] + row["written_bytes"])


def _plain(row: Row) -> bool:
    """Whether the row is a plain call: options of their own would put two points at one size."""
    return not row["facts"].get("options") and row["facts"].get("dtype", "f32") == "f32"


def _is_main(row: Row) -> bool:
    return row["facts"].get("pass") == "fwd+bwd"
