"""`mbperf loader`: the profiler on the command line. The answer goes to stdout, progress to stderr.

Exit codes: 0 an answer, 1 the dataset cannot be made, 2 wrong usage, 3 no configuration runs, 4 an answer
under 50 % sure, 130 interrupted.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mbperf.loader.source import LoaderError, Source
from mbperf.measure.launch import is_first_rank, launched

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}


class Duration(click.ParamType):
    """A time with its unit: 5ms, 60s, 2m; a bare number is seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        number = value.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = value[len(number) :].strip() or "s"
        try:
            return float(number) * UNITS[unit]
        except (ValueError, KeyError):
            self.fail(f"expected a time such as 5ms, 60s or 2m, got {value!r}", param, ctx)


class Choices(click.ParamType):
    """Values separated by commas, each converted by `convert_one`."""

    name = "LIST"

    def __init__(self, convert_one: Any, what: str):
        self.convert_one = convert_one
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        """Return the list."""
        if isinstance(value, list):
            return value
        try:
            return [self.convert_one(part.strip()) for part in value.split(",")]
        except (ValueError, KeyError):
            self.fail(f"expected {self.what}, got {value!r}", param, ctx)


def count(text: str) -> int:
    """Return a number that is not negative."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """Return a number above zero."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


TRUTH = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
CONTEXTS = {"default": None, "fork": "fork", "spawn": "spawn", "forkserver": "forkserver"}
COLLATES = {"user": "user", "torch": "torch", "mbperf": "mbperf"}


@click.command()
@click.argument("subject", required=False, metavar="PACKAGE.MODULE:DATASET")
@click.option(
    "--demo", type=click.Choice(["lesson", "images", "tokens", "slow-disk"]), help="Profile a demo dataset."
)
@click.option(
    "--batch-size", type=Choices(positive, "numbers such as 64 or 64,128"), help="One, or several to try."
)
@click.option(
    "--workers", type=Choices(count, "numbers such as 0,1,2,4"), help="Values of num_workers to try."
)
@click.option("--prefetch", type=Choices(positive, "numbers such as 2,4"), default="2,4", show_default=True,
              help="Values of prefetch_factor to try.")  # fmt: skip
@click.option("--pin-memory", type=Choices(TRUTH.__getitem__, "yes, no or yes,no"), help="Values to try.")
@click.option("--contexts", type=Choices(CONTEXTS.__getitem__, "a list of default, fork, spawn, forkserver"),
              default="default", show_default=True, help="Start methods to try.")  # fmt: skip
@click.option("--in-order", type=Choices(TRUTH.__getitem__, "yes, no or yes,no"), default="yes,no",
              show_default=True, help="Whether batches keep the sampler's order.")  # fmt: skip
@click.option("--collates", type=Choices(COLLATES.__getitem__, "a list of torch, mbperf"),
              help="Collate functions to try beside your own.")  # fmt: skip
@click.option("--collate-fn", metavar="PACKAGE.MODULE:FUNCTION", help="Your own collate_fn.")
@click.option("--worker-init-fn", metavar="PACKAGE.MODULE:FUNCTION", help="Your own worker_init_fn.")
@click.option(
    "--shuffle/--no-shuffle", default=None, help="Sample order; default shuffled for map-style datasets."
)
@click.option("--drop-last", is_flag=True, help="Leave out the last, smaller batch.")
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument for a dataset factory (JSON or text).",
)
@click.option("--step-time", type=Duration(),
              help="How long your step takes with a batch, e.g. 5ms; trials sleep meanwhile, as a step does "
              "that waits for an accelerator.")  # fmt: skip
@click.option("--step", metavar="PACKAGE.MODULE:FUNCTION",
              help="Your own step, called with each batch; computing competes with workers.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=1), default=None, metavar="N",
              help="Load in N training processes of this machine at once, each the share that "
              "DistributedSampler gives it, and recommend workers per rank; under torchrun in its "
              "ranks.")  # fmt: skip
@click.option("--budget", type=Duration(), default="60s", show_default=True, help="Time for everything.")
@click.option("--tolerance", type=float, default=3.0, show_default=True, metavar="PERCENT",
              help="A gain below this, or within noise, is no reason to leave a simpler one.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of trial order and random states.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--save", is_flag=True, help="Write the JSON and the picture under results/<machine>/loader/.")
@click.option(
    "--picture", type=click.Path(dir_okay=False), help="Write throughput over workers to this file."
)
@click.pass_context
def loader(ctx: click.Context, subject: str | None, demo: str | None, **options: Any) -> None:
    """Find the DataLoader settings for a dataset: which num_workers, and how sure.

    PACKAGE.MODULE:DATASET names a map-style or iterable Dataset, a ready DataLoader, or a function that
    returns one. With --ranks, and under torchrun, it is told its rank as in training (RANK, WORLD_SIZE,
    torch.distributed.get_rank()): a stream has to split itself by that.

    Exit codes: 0 an answer, 1 the dataset cannot be made, 2 wrong usage, 3 no configuration runs, 4 an answer
    under 50 % sure, 130 interrupted.
    """
    if (subject is None) == (demo is None):
        raise click.UsageError("give either PACKAGE.MODULE:DATASET or --demo")
    if options["budget"] < 3 or options["tolerance"] < 0:
        raise click.UsageError("--budget must be at least 3s, --tolerance not negative")
    if launched() and options["ranks"] not in (None, int(os.environ["WORLD_SIZE"])):
        raise click.UsageError(
            f"--ranks {options['ranks']}, but torchrun has started {os.environ['WORLD_SIZE']}; leave it out"
        )
    try:
        with terminated_like_ctrl_c():
            if not is_first_rank():
                follow_first_rank(subject, demo, options)
                return
            profile = answer(subject, demo, options)
    except KeyboardInterrupt:  # while torch was being imported; later the profiler answers with what it has
        click.echo("No answer: interrupted before anything was tried.", err=True)
        ctx.exit(130)
    if options["as_json"]:
        click.echo(json.dumps(profile.as_dict()))
    else:
        show_on_stdout(profile)
    for path in written(profile, options):
        click.echo(f"wrote {path}", err=True)
    ctx.exit(profile.exit_code)


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, as `timeout` and schedulers send it, end the profile with the answer so far, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def answer(subject: str | None, demo: str | None, options: dict[str, Any]) -> Any:
    """Run the profiler with progress on stderr."""
    from rich.console import Console

    from mbperf.loader.output.progress import Progress
    from mbperf.loader.processes.ranks import RanksRunner
    from mbperf.loader.profiler import profile_source, runner_of
    from mbperf.loader.search.space import Space

    space = Space(
        options["workers"],
        options["batch_size"] or [None],
        options["prefetch"],
        options["pin_memory"],
        options["contexts"],
        options["in_order"],
        options["collates"],
    )
    with contextlib.ExitStack() as stack:
        source = demo_source(demo, stack) if demo else named_source(subject or "", options)
        progress = stack.enter_context(Progress(Console(stderr=True), options["budget"]))
        try:
            return profile_source(
                source,
                space,
                options["step_time"],
                options["budget"],
                options["tolerance"] / 100,
                options["seed"],
                progress,
                options["batch_size"] is not None,
                RanksRunner.in_world if launched() else runner_of(options["ranks"] or 1),
            )
        except LoaderError as error:
            raise click.ClickException(str(error)) from error


def follow_first_rank(subject: str | None, demo: str | None, options: dict[str, Any]) -> None:
    """Take part as one of torchrun's other ranks, which print nothing."""
    from mbperf.loader.processes.ranks import follow
    from mbperf.loader.profiler import ready_s

    with contextlib.ExitStack() as stack:
        source = demo_source(demo, stack) if demo else named_source(subject or "", options)
        follow(source, ready_s(options["budget"]), 2 * options["budget"])


def named_source(subject: str, options: dict[str, Any]) -> Source:
    """Return the source of an import path; modules of the working directory can be named."""
    sys.path.insert(0, os.getcwd())
    fixed = {name: options[name] for name in ("collate_fn", "worker_init_fn", "shuffle", "drop_last", "step")}
    return Source(path=subject, arguments=dict(map(argument, options["arguments"])), fixed=fixed)


def argument(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; the value is JSON where it is valid JSON, else text."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise click.UsageError(f"--arg: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def demo_source(demo: str, stack: contextlib.ExitStack) -> Source:
    """Return the source of a demo dataset; what it writes goes with the command."""
    arguments = {}
    if demo == "images":
        arguments["folder"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="mbperf-demo-"))
    return Source(path=f"mbperf.loader.demos:{demo.replace('-', '_')}", arguments=arguments)


def show_on_stdout(profile: Any) -> None:
    """Print the profile."""
    from rich.console import Console

    from mbperf.loader.output.display import show

    show(profile, Console(highlight=False))


def written(profile: Any, options: dict[str, Any]) -> list[Path]:
    """Write what was asked for and return the paths."""
    from mbperf.loader.output.picture import draw

    paths = []
    if options["save"]:
        from mbperf.measure import machine

        paths.append(profile.save(Path("results") / machine.name() / "loader"))
        if profile.configurations:
            paths.append(draw(profile, paths[0].with_suffix(".png")))
    if options["picture"] and profile.configurations:
        paths.append(draw(profile, options["picture"]))
    return paths
