"""The command `mbperf doctor`."""

import sys
from collections import Counter

import click

from mbperf.doctor.display import as_json, show
from mbperf.doctor.examination import examine, wrong


@click.command()
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--paths", is_flag=True, help="Race the kernels that serve each shape instead; some 30 s.")
def doctor(json_wanted: bool, paths: bool) -> None:
    """Say what this machine and installation offer, what is wrong, and its remedy.

    Exits with 1 where something is wrong; with --paths, where another instruction set, or another path of the
    chosen one, is over 5 % faster.
    """
    if paths:
        sys.exit(1 if _race_paths() else 0)
    findings = examine()
    if json_wanted:
        click.echo(as_json(findings))
    else:
        show(findings)
    sys.exit(1 if wrong(findings) else 0)


def _race_paths() -> int:
    """Print the comparison of every shape as it is known, and return how many choices are not the fastest."""
    from mbperf.doctor.paths import comparisons
    from mbperf.extension import _C

    verdicts: Counter[str] = Counter()
    for comparison in comparisons(_C):
        click.echo(str(comparison))
        verdicts[comparison.verdict] += 1
    click.echo(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return verdicts["SLOWER"]
