"""A run as files: pictures (svg, png), tables (md, csv) and one HTML page that stands alone."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbperf.measure.rows import ROOF
from mbperf.report import history, ladder, plots, record
from mbperf.report.tables import bandwidth, change, columns, control, digits, judged, means_of, ratio
from mbperf.require import require

TEMPLATE = Path(__file__).with_name("page.html.j2")
CSV_COLUMNS = [
    "op",
    "case",
    "contender",
    "time_s",
    "bandwidth_bytes_per_s",
    "read_bytes",
    "written_bytes",
    "peak_memory_bytes",
    "clean_control",
    "noisy",
    "heap",
]
CHANGE_PARTS = ("ratio", "low", "high", "verdict", "against")
COMMANDS = {
    "smoke": "pytest bench/ --benchmark-compare --mbperf-profile=smoke",
    "default": "pytest bench/ --benchmark-compare",
    "long": "pytest bench/ --benchmark-compare --mbperf-profile=long",
}
NO_SAMPLES = (
    "The samples of the rounds were not saved, so there is no picture of them: --benchmark-save-data."
)


@dataclass(frozen=True)
class Table:
    """What is shown of one operation: bases that have a column, a line a group, means, and what is left."""

    op: str
    bases: list[str]
    rows: list[Mapping[str, Any]]
    means: Mapping[str, Mapping[str, Any]]

    def titles(self) -> list[str]:
        """Return the titles of the columns behind the case."""
        change = ["change"] * any(row.get("change") for row in self.rows)
        return [*(f"x {base}" for base in self.bases), "GB/s", "roof", "A/A", "verdict", *change]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """Return the cells of a row behind its case, without a change."""
        ratios = [ratio(row["ratios"].get(base), wide=True) for base in self.bases]
        return [*ratios, bandwidth(row), share_in_words(row), control(row), judged(row)]

    def others(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """Return group, base and ratio of what has no column."""
        return [
            (f"{row['op']} {row['case']}", base, one)
            for row in self.rows
            for base, one in row["ratios"].items()
            if base not in (*self.bases, ROOF)
        ]


def tables(run: Mapping[str, Any]) -> list[Table]:
    """Return a table for each operation of a run, in its order."""
    subjects, means = record.subjects(dict(run)), run["mbperf"]["geometric_means"]
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for row in subjects:
        by_op.setdefault(row["op"], []).append(row)
    return [Table(op, columns(rows), rows, means_of(rows, means)) for op, rows in by_op.items()]


def write(run: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write everything that can be shown of a run.

    Args:
        run: a record.
        earlier: complete runs of the same machine, oldest first, `run` among them or not.
        folder: where to; made if it is not there.

    Returns:
        The files written, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: figure for name, figure in _figures(run, earlier).items() if figure is not None}
    files = [folder / "index.html", folder / "table.md", folder / "rows.csv"]
    files[0].write_text(html(run, pictures), encoding="utf-8")
    files[1].write_text(markdown(run), encoding="utf-8")
    files[2].write_text(rows_csv(run), encoding="utf-8")
    for name, figure in pictures.items():
        files += save(figure, run, *(folder / f"{name}.{kind}" for kind in ("svg", "png")))
    return files


def save(figure: Any, run: Mapping[str, Any], *files: Path) -> Sequence[Path]:
    """Write a picture with its source below it; in an SVG's metadata too, where programs find it.

    Args:
        figure: a picture of the run.
        run: a record.
        files: where to, one file a format.

    Returns:
        The files.
    """
    figure.text(0.0, -0.02, reproduce(run), fontsize=6, color="#888888")
    for file in files:
        metadata = _timeless(file.suffix[1:]) | {"Source": source(run)}
        # The salt makes ids that matplotlib would draw by chance.
        with require("matplotlib").rc_context({"svg.hashsalt": "mbperf"}):
            figure.savefig(file, dpi=150, bbox_inches="tight", metadata=metadata)
    return files


def source(run: Mapping[str, Any]) -> str:
    """Return `reproduce` and when the run was.

    >>> facts = {"profile": "default", "hardware": {"name": "m"}}
    >>> source({"mbperf": facts, "commit_info": {"id": "0123456789ab"}, "datetime": "2026-01-02T03:04:05"})
    'pytest bench/ --benchmark-compare, commit 01234567, machine m, 2026-01-02T03:04:05'
    """
    return f"{reproduce(run)}, {run['datetime']}"


def _figures(run: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows, subjects = record.rows(dict(run)), record.subjects(dict(run))
    ops = dict.fromkeys(row["op"] for row in subjects)
    return {
        "speedup": plots.forest(subjects),
        "heat_map": plots.heat_map(subjects),
        **{f"bandwidth_{op}": plots.bandwidth(rows, op) for op in ops},
        "ladder": ladder.picture(rows),
        "rounds": plots.trace(_largest_group(run)),
        "history": history.picture(earlier),
    }


def _largest_group(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The group that moves the most bytes: its rounds are the fewest and the hardest to trust."""
    entries = [one for one in run["benchmarks"] if "contender" in one["extra_info"]]
    if not entries:
        return []
    most = max(entries, key=_bytes_moved)
    return [one for one in entries if one["group"] == most["group"]]


def _bytes_moved(entry: Mapping[str, Any]) -> int:
    row = entry["extra_info"]
    return int(row.get("read_bytes", 0) + row.get("written_bytes", 0))


def reproduce(run: Mapping[str, Any]) -> str:
    """Return in one line where a run's figures come from and how to get them again.

    >>> facts = {"profile": "default", "hardware": {"name": "m"}}
    >>> reproduce({"mbperf": facts, "commit_info": {"id": "0123456789ab"}})
    'pytest bench/ --benchmark-compare, commit 01234567, machine m'
    >>> facts["command"] = "pytest test_race.py"
    >>> reproduce({"mbperf": facts, "commit_info": {"id": "unversioned"}})
    'pytest test_race.py, machine m'
    """
    facts, commit = run["mbperf"], record.commit(run)
    command = facts.get("command", COMMANDS[facts["profile"]])
    where = f", commit {commit}" if commit else ""
    return f"{command}{where}, machine {record.machine_name(dict(run))}"


def markdown(run: Mapping[str, Any]) -> str:
    """Return the headline tables in Markdown, with their source below."""
    lines = [line for table in tables(run) for line in _markdown_table(table)]
    lines += [f"Peak memory, {name}: {sizes}.\n" for name, sizes in peak_memory(run).items()]
    return "\n".join([*lines, f"From `{reproduce(run)}`; 99 % intervals.", ""])


def _markdown_table(table: Table) -> list[str]:
    titles = table.titles()
    lines = [
        _line(["case", *titles]),
        _line(["---", *("--:" if it != "verdict" else "---" for it in titles)]),
    ]
    for row in table.rows:
        changed = [change_in_words(row)] * ("change" in titles)
        lines.append(_line([f"{row['op']} {row['case']}", *table.cells(row), *changed]))
    for name, base, one in table.others():
        lines.append(f"\n{name}: {ratio(one, wide=True)} against {base}, {one['verdict']}.")
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def change_in_words(row: Mapping[str, Any]) -> str:
    """Return the change since the compared run with its interval in per cent and what it is against.

    >>> found = {"ratio": 0.951, "low": 0.93, "high": 0.97, "verdict": "WORSE", "against": "roof"}
    >>> change_in_words({"change": found})
    '-4.9% WORSE [-7.0, -3.0] against roof'
    """
    found = row.get("change")
    if not found:
        return ""
    bounds = "" if found["low"] is None else f" [{_percent(found['low'])}, {_percent(found['high'])}]"
    return change(found) + bounds + (f" against {found['against']}" if found["against"] else "")


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def peak_memory(run: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each group where it was measured, what every contender adds to resident memory at most.

    Returns:
        "op case" -> "fused 65.6 MB, torch 197 MB".
    """
    groups: dict[str, list[str]] = {}
    for row in record.rows(dict(run)):
        if "peak_memory_bytes" in row:
            megabytes = digits(row["peak_memory_bytes"] / 1e6)
            groups.setdefault(f"{row['op']} {row['case']}", []).append(f"{row['contender']} {megabytes} MB")
    return {name: ", ".join(sizes) for name, sizes in groups.items()}


def share_in_words(row: Mapping[str, Any]) -> str:
    """Return the share of the memory limit, or of the one that the facts name, without terminal colours."""
    share = row["ratios"].get("roof")
    if share is None:
        return ""
    if "limit" in row["facts"]:
        return f"{share['ratio']:.0%} of {row['facts']['limit']}"
    return f"{share['ratio']:.0%}" if row["memory_bound"] else "call"


def rows_csv(run: Mapping[str, Any]) -> str:
    """Return every row in base units, with its ratios and what changed since the compared run."""
    rows = record.rows(dict(run))
    bases = list(dict.fromkeys(base for row in rows for base in row["ratios"]))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    parts = ("ratio", "low", "high")
    of_ratios = [f"x_{base}_{part}" for base in bases for part in parts]
    table.writerow([*CSV_COLUMNS, *of_ratios, *(f"change_{part}" for part in CHANGE_PARTS)])
    for row in rows:
        ratios = [row["ratios"].get(base, {}).get(part, "") for base in bases for part in parts]
        changed = [row.get("change", {}).get(part, "") for part in CHANGE_PARTS]
        table.writerow([*(row.get(column, "") for column in CSV_COLUMNS), *ratios, *changed])
    return out.getvalue()


def html(run: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """Return one page with the table and the pictures inside it."""
    template = (
        require("jinja2").Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    )
    facts = run["mbperf"]
    return str(
        template.render(
            run=run,
            hardware=facts["hardware"],
            software=facts["software"],
            facts=facts,
            machine=record.machine_name(dict(run)),
            reproduce=reproduce(run),
            tables=tables(run),
            memory=peak_memory(run),
            ratio=ratio,
            change_in_words=change_in_words,
            no_samples="" if "rounds" in pictures else NO_SAMPLES,
            pictures={name: _inline(figure) for name, figure in pictures.items()},
        )
    )


def _inline(figure: Any) -> Any:
    """The picture as an SVG element, without the XML head that HTML has no place for."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata=_timeless("svg"))
    text = out.getvalue()
    return require("markupsafe").Markup(text[text.index("<svg") :])


def _timeless(kind: str) -> dict[str, None]:
    """No date inside: the same record gives the same picture."""
    return {"Date": None} if kind == "svg" else {}
