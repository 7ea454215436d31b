"""The example of docs/distributed.md, in the processes that it starts."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs/train_sharded.py"


def run(*command: str, limit_s: float = 60.0) -> str:
    """Return what a command prints; its whole session ends with it, in time or not."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, _ = process.communicate(timeout=limit_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    return out


def test_the_example_learns_the_same_on_both_ranks():
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    out = run(sys.executable, str(EXAMPLE))
    losses = {
        (int(r), int(s)): float(loss)
        for r, s, loss in re.findall(r"rank (\d), step (\d+): loss (\d+\.\d{4})", out)
    }
    assert losses[0, 0] > 3
    assert losses[0, 39] == losses[1, 39] < 0.5
