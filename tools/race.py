"""Race cross_entropy against F.cross_entropy of the torch that is installed, and print a table.

    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592 python tools/race.py

With these settings freed memory stays with the process: neither side pays for fresh pages. Both sides run in
every round, in one process; a ratio is the median over rounds with its 99 % interval.
"""

import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import click
import torch

from mbperf.measure import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

SHAPES = ((64, 10), (50_000, 10), (2_000, 100), (8_192, 257), (4_096, 1_000), (512, 32_000), (7, 151_665))


@click.command(help=__doc__)
def main() -> None:
    """Measure every shape, without a gradient and with one."""
    from cases import FORWARD_BACKWARD, NO_GRAD, CrossEntropyCase
    from sweep_cross_entropy import LONG_LOOK, Draw, ratio

    if "mmap_max=0" not in os.environ.get("GLIBC_TUNABLES", ""):
        raise click.ClickException("fresh pages would be timed; set GLIBC_TUNABLES as --help says")
    when = datetime.now(timezone.utc).date()
    click.echo(f"torch {torch.__version__}, {machine.name()}, {torch.get_num_threads()} threads, {when}\n")
    click.echo("| float32 | forward | forward and backward |\n|---|--:|--:|")
    for shape in SHAPES:
        cells = [ratio(Draw(0, CrossEntropyCase(shape, "", step), "contiguous", False), LONG_LOOK)
                 for step in (NO_GRAD, FORWARD_BACKWARD)]  # fmt: skip
        words = (f"{cell.ratio:.2f}x [{cell.low:.2f}, {cell.high:.2f}]" for cell in cells)
        click.echo(f"| {'x'.join(map(str, shape))} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
