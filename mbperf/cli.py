"""The command `mbperf`: one entry for each tool, loaded only when it is called."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

import mbperf
from mbperf import extras


class Entry(NamedTuple):
    """Where a subcommand lives ("module:attribute"), the extra it needs, and its line in `mbperf --help`."""

    place: str
    extra: str
    help: str


ENTRIES = {
    "bench": Entry(
        "mbperf.cli:bench", "bench", "Run the benchmarks of a checkout and compare with the last run."
    ),
    "doctor": Entry(
        "mbperf.doctor.command:doctor", "", "Say what is wrong with this installation or machine."
    ),
    "loader": Entry(
        "mbperf.loader.command:loader", "loader", "Find the DataLoader settings for your dataset."
    ),
    "report": Entry(
        "mbperf.report.command:report", "bench", "Turn saved runs into tables, pictures and a page."
    ),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return list(ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand."""
        if cmd_name not in ENTRIES:
            return None
        module, _, attribute = ENTRIES[cmd_name].place.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ImportError as error:
            raise one_line(error, cmd_name) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in ENTRIES.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand; an extra that is missing, or a bad build, ends it with one line."""
        try:
            return super().invoke(ctx)
        except ImportError as error:
            raise one_line(error, ctx.invoked_subcommand or "") from error


def one_line(error: ImportError, command: str) -> Exception:
    """Return what to raise for a failed import: one line where its cause is known, else the error itself."""
    if str(error).startswith("mbperf: "):
        return click.ClickException(str(error).removeprefix("mbperf: "))
    module = error.name or ""
    extra = extras.extra_that_brings(module, prefer=ENTRIES[command].extra if command in ENTRIES else "")
    if extra and not extras.is_installed(module.partition(".")[0].replace("_", "-")):
        return click.ClickException(f"mbperf {command} needs {module}; run: {extras.pip_command(extra)}")
    return error


@click.group(cls=LazyGroup)
@click.version_option(package_name="mbperf")
def main() -> None:
    """The loss and the batch of a training loop at the speed of memory, measured on your machine."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--against", metavar="REV", help="Race the working tree against this git revision instead.")
@click.option("--budget", type=click.FloatRange(min=0), metavar="SECONDS", help="With --against: in all.")
@click.option(
    "--heap",
    type=click.Choice(["recycled", "fresh"]),
    help="With --against: whether large results land on used pages (the default) or on new ones.",
)
@click.option("--json", metavar="FILE", type=click.Path(dir_okay=False), help="With --against: the record.")
@click.option(
    "--fail-on-worse", is_flag=True, help="With --against: exit with 1 if a group is WORSE, or fails."
)
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def bench(against: str | None, pytest_args: tuple[str, ...], **options: Any) -> None:
    """Run the benchmarks of a checkout and compare with the last complete run.

    PYTEST_ARGS go to pytest: `mbperf bench -k collate` runs the benchmarks of collate.

    `mbperf bench --against HEAD~1 -k collate` builds that revision beside the working tree and lets processes
    of both take turns within the same rounds, which tells differences of 1 %.
    """
    if absent := extras.missing("bench"):
        command = extras.pip_command("bench")
        raise click.ClickException(f"mbperf bench needs {', '.join(absent)}; run: {command}")
    if against is not None:
        sys.exit(_bench_against(against, pytest_args, **options))
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        raise click.UsageError(f"{' and '.join(given)}: only with --against REV")
    command_line = [sys.executable, "-m", "pytest", "bench/", "--benchmark-compare", *pytest_args]
    sys.exit(subprocess.call(command_line, cwd=checkout()))


def _bench_against(
    revision: str,
    selection: tuple[str, ...],
    budget: float | None,
    heap: str | None,
    json: str | None,
    fail_on_worse: bool,
) -> int:
    from mbperf.against.command import Request, bench_against

    record = Path(json).resolve() if json else None
    request = Request(revision, selection, budget, heap or "recycled", record, fail_on_worse)
    return bench_against(checkout(), request)


def checkout() -> Path:
    """Return the folder that holds bench/: here, or where an editable install points."""
    candidates = (Path.cwd(), Path(mbperf.__file__).parents[1])
    for folder in candidates:
        if (folder / "bench").is_dir() and (folder / "mbperf").is_dir():
            return folder
    raise click.ClickException(
        "mbperf bench runs the benchmarks of a checkout, and there is no bench/ in "
        f"{' or '.join(map(str, candidates))}; clone the repository and run `make bench` in it"
    )
