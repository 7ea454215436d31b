"""Findings as text for people, in colour where rich and a terminal are, and as JSON for machines."""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from mbperf import extras
from mbperf.doctor.examination import wrong
from mbperf.doctor.finding import Finding

MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one JSON object."""
    return json.dumps({"wrong": len(wrong(findings)), "findings": [asdict(f) for f in findings]}, indent=2)


def show(findings: Sequence[Finding]) -> None:
    """Print the findings, and a last line that counts what is wrong."""
    if sys.stdout.isatty() and extras.is_installed("rich"):
        show_rich(findings)
    else:
        print(as_text(findings))


def as_text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines of plain text."""
    lines = [line for finding in findings for line in finding_lines(finding)]
    return "\n".join([*lines, verdict(findings)])


def finding_lines(finding: Finding) -> list[str]:
    """Return one finding as a line, and its remedy as a second one."""
    lines = [f"{MARKS[finding.state]:<7}{finding.subject:<17}{finding.fact}"]
    if finding.remedy:
        lines.append(textwrap.indent(f"remedy: {finding.remedy}", " " * 24))
    return lines


def show_rich(findings: Sequence[Finding]) -> None:
    """Print the findings as a table that folds to the width of the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        state = Text(MARKS[finding.state], style=STYLES[finding.state])
        table.add_row(state, finding.subject, Text(finding.fact))
        if finding.remedy:
            table.add_row("", "", Text(f"remedy: {finding.remedy}", style="bold"))
    console = Console()
    console.print(table)
    console.print(Text(verdict(findings), style="bold"))


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line: what is wrong, or that nothing is."""
    subjects = [finding.subject for finding in wrong(findings)]
    if not subjects:
        return "Nothing is wrong."
    return f"{len(subjects)} wrong: {', '.join(subjects)}."
