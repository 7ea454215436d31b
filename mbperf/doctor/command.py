"""The command `mbperf doctor`."""

import sys

import click

from mbperf.doctor.display import as_json, show
from mbperf.doctor.examination import examine, wrong


@click.command()
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object instead of text.")
def doctor(json_wanted: bool) -> None:
    """Say what this machine and installation offer, what is wrong, and its remedy.

    Exits with 1 where something is wrong.
    """
    findings = examine()
    if json_wanted:
        click.echo(as_json(findings))
    else:
        show(findings)
    sys.exit(1 if wrong(findings) else 0)
