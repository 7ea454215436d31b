"""Pictures of one machine's runs over time: what the subject won, as means over what all of them measured.

A mean over another set of groups is another quantity, and so is a ratio on another state of the heap. So each
line is drawn over the groups that all of its runs have in the same state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbperf.measure.rows import mean_label, reference
from mbperf.measure.statistics import NORMAL, Ratio
from mbperf.report import record
from mbperf.report.plots import label_log
from mbperf.require import require

Run = Mapping[str, Any]
# A line goes back as far as the runs share this much of the newest one's groups.
LEAST_SHARE = 0.5
UNKNOWN, ANY = "unknown", ""  # state of the heap: of runs from before it was named; of groups without one


@dataclass(frozen=True)
class Line:
    """The means of one label, oldest first: the place of the run, and the ratio there."""

    label: str
    base: str
    points: list[tuple[int, Ratio]]
    groups: int
    newest_groups: int
    earlier: int

    def words(self) -> str:
        """Return the label with what it is a mean of."""
        of = f"{self.groups} group{'s' * (self.groups > 1)}"
        left_out = f", {self.newest_groups - self.groups} more are newer" * (self.newest_groups > self.groups)
        broken = f"\n  earlier runs left out, other groups or heap: {self.earlier}" * (self.earlier > 0)
        return f"{self.label} / {self.base}\n  {of}{left_out}{broken}"


def lines(records: Sequence[Run]) -> list[Line]:
    """Return, for each label of the newest run ("op device dtype pass"), the means over shared groups.

    Args:
        records: complete runs of one machine, oldest first.

    Returns:
        Lines; a run that shares too little with the newest one, and what is older, is in none of them.
    """
    by_run = [_groups(run) for run in records]
    found = []
    for label, newest in by_run[-1].items() if by_run else ():
        its = [(place, run[label]) for place, run in enumerate(by_run) if label in run]
        shared = set(newest)
        shown: list[tuple[int, Mapping[str, Mapping[str, Ratio]]]] = []
        for place, groups in reversed(its):
            common = {key for key in shared if _ratio_of(groups, newest, key)}
            if len(common) < LEAST_SHARE * len(newest):
                break
            shared, shown = common, [(place, groups), *shown]
        means = [
            (place, mean([_ratio_of(groups, newest, key) for key in sorted(shared)]))
            for place, groups in shown
        ]
        found.append(Line(*label, means, len(shared), len(newest), earlier=len(its) - len(shown)))
    return found


def mean(ratios: Sequence[Any]) -> Ratio:
    """Return the geometric mean of ratios with its interval, by the width of theirs; none if one has none.

    >>> found = mean([Ratio(2.0, 1.9, 2.1), Ratio(8.0, 7.6, 8.4)])
    >>> round(found.ratio, 6), round(found.low, 1), round(found.high, 1)
    (4.0, 3.9, 4.1)
    """
    middle = sum(one.log for one in ratios) / len(ratios)
    known = all(one.low > 0 and math.isfinite(one.high) for one in ratios)
    reach = known * NORMAL * math.sqrt(sum(one.log_variance for one in ratios)) / len(ratios)
    return Ratio(*(math.exp(middle + step) for step in (0.0, -reach, reach)))


def _groups(run: Run) -> dict[tuple[str, str], dict[str, dict[str, Ratio]]]:
    """(label, base) -> group -> state of the heap -> ratio; groups with options repeat a shape."""
    found: dict[tuple[str, str], dict[str, dict[str, Ratio]]] = {}
    for row in record.subjects(dict(run)):
        base, facts = reference(row), row["facts"]
        if base is None or facts.get("options"):
            continue
        label = mean_label(row["op"], facts)
        states = {row.get("heap", UNKNOWN): row["ratios"]}
        if other := row.get("other_heap"):
            states[other["heap"]] = other["ratios"]
        ratios = {state: its[base] for state, its in states.items() if base in its}
        found.setdefault((label, base), {})[row["case"]] = {
            state: Ratio(one["ratio"], one["low"], math.inf if one["high"] is None else one["high"])
            for state, one in ratios.items()
        }
    return found


def _ratio_of(
    groups: Mapping[str, Mapping[str, Ratio]], newest: Mapping[str, Mapping[str, Ratio]], case: str
) -> Ratio | None:
    """The ratio of a group in the state that the newest run shows first, or None."""
    states, wanted = groups.get(case, {}), next(iter(newest[case]))
    if wanted == ANY or ANY in states:
        known = [state for state in states if (state == UNKNOWN) == (wanted == UNKNOWN)]
        return states[known[0]] if known else None
    return states.get(wanted)


def picture(records: Sequence[Run]) -> Any:
    """Draw the geometric means of one machine's complete runs, oldest first.

    Args:
        records: complete runs, oldest first.

    Returns:
        Figure, or None without a group in the newest run.
    """
    found = lines(records)
    if not found:
        return None
    figure = require("matplotlib.figure").Figure(
        figsize=(max(8.0, 4.5 + 0.8 * len(records)), max(4.0, 0.45 * len(found) + 1)), layout="constrained"
    )
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    colors = require("matplotlib").colormaps["tab20"].colors
    for index, line in enumerate(found):
        shift = 0.03 * (index - len(found) / 2)  # so that intervals do not hide each other
        places, ratios = [place + shift for place, _ in line.points], [ratio for _, ratio in line.points]
        axes.errorbar(
            places,
            [one.ratio for one in ratios],
            yerr=[[one.ratio - one.low for one in ratios], [one.high - one.ratio for one in ratios]],
            marker="o",
            markersize=4,
            capsize=2,
            color=colors[(2 * index + index // 10) % 20],
            label=line.words(),
        )
    axes.set_xticks(range(len(records)), map(_tick, records), fontsize=7)
    axes.set(yscale="log")
    axes.set_ylabel("times faster: geometric mean over\nthe groups that a line's runs share", fontsize=8)
    axes.set_xlim(-0.5, len(records) - 0.5)
    label_log(axes.yaxis, "x")
    axes.tick_params(axis="y", which="both", labelsize=7)
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    return figure


def _tick(run: Run) -> str:
    """When a run was, and of which commit, or at what time outside of a repository."""
    day, time = run["datetime"].split("T") if "T" in run["datetime"] else (run["datetime"], "")
    return f"{day}\n{record.commit(run) or time[:5]}"
