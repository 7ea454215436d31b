"""What the terminal shows after pytest-benchmark's table."""

from typing import Any

from mbperf.plugin import gate
from mbperf.plugin.session import Session, geometric_means
from mbperf.report import ladder, record
from mbperf.report.tables import headline


def show(reporter: Any, run: Session, baseline: dict[str, Any] | None, failures: list[str]) -> None:
    """Write ratios, shares of the roof, verdicts and what failed.

    Args:
        reporter: pytest's terminal reporter.
        run: what was measured.
        baseline: the saved run to show changes against, or None.
        failures: messages of the gate.
    """
    for group in run.groups:
        if reason := run.not_measured(group):
            reporter.write_line(f"{group.name}: not measured here: {reason}")
    rows = [run.rows[g.name][g.subject] for g in run.groups if g.subject in run.rows.get(g.name, {})]
    if not rows:
        return
    reporter.ensure_newline()
    reporter.section("mbperf: ratios inside this run, 99 % intervals", sep="-")
    text = headline(
        rows,
        record.saved_rows(baseline),
        geometric_means(run),
        width=reporter._tw.fullwidth,
        color=reporter.hasmarkup,
    )
    reporter.write(text)
    every = [row for rows_of_group in run.rows.values() for row in rows_of_group.values()]
    reporter.write(ladder.terminal(every, reporter._tw.fullwidth))
    missed = failures or [message for row in rows for message in gate.missed_floors(row)]
    for message in missed:
        reporter.write_line(message, red=True)
