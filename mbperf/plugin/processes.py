"""Measure in a fresh process: another memory layout, another start of everything.

Layout alone can move a ratio by more than the interval of one process admits.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mbperf.measure.group import Samples
from mbperf.plugin.session import load_samples


def measure_elsewhere(invocation: pytest.Config.InvocationParams, budget_s: float) -> dict[str, Samples]:
    """Repeat a pytest run in a fresh process and return its samples by group name.

    Args:
        invocation: arguments and folder of the run to repeat.
        budget_s: seconds for all its groups together.

    Returns:
        Samples by group name; groups it did not get to are absent.

    Raises:
        RuntimeError: the process left no samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        options = [f"--mbperf-samples={file}", f"--mbperf-budget={budget_s}", "--no-summary"]
        command = [sys.executable, "-m", "pytest", *map(str, invocation.args), *options]
        done = subprocess.run(command, cwd=invocation.dir, capture_output=True, text=True)
        if not file.exists():
            tail = "\n".join(done.stdout.splitlines()[-20:])
            raise RuntimeError(f"mbperf: a fresh process measured nothing (exit {done.returncode}):\n{tail}")
        return load_samples(file)
