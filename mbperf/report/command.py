"""`mbperf report`: saved runs -> tables, pictures and one page."""

from pathlib import Path
from typing import Any

import click

from mbperf.report import page, record

# As `keep_results_in` keeps runs in a checkout, and as pytest-benchmark does elsewhere.
FOLDERS = (Path("results"), Path(".benchmarks"))

MAKE_ONE = "make one with: mbperf bench, or in a folder of your own: pytest --benchmark-autosave"


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Where runs are kept; results/, or .benchmarks/ where that is not there.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write to; beside the runs by default."
)
def report(run: Path | None, results: Path | None, out: Path | None) -> None:
    """Show RUN, or the newest complete run, as index.html, table.md, rows.csv and pictures."""
    results = results or next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    try:
        found = (run, record.load(run)) if run else record.newest_complete(results)
    except record.BadRecord as error:
        raise click.ClickException(str(error)) from error
    if found is None:
        raise click.ClickException(f"no complete run under {results}; {MAKE_ONE}")
    file, saved = found
    machine = record.machine_name(saved)
    earlier = [one for _, one in record.runs(results) if _is_earlier(one, saved, machine)]
    written = page.write(saved, earlier, out or results / machine / "report")
    click.echo(f"{len(written)} files made from {file}; open {written[0]}")


def _is_earlier(one: dict[str, Any], saved: dict[str, Any], machine: str) -> bool:
    same = record.machine_name(one) == machine
    return same and bool(one["mbperf"]["complete"]) and str(one["datetime"]) <= str(saved["datetime"])
