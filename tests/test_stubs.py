"""`mypy --strict` accepts a user's program of every public name, and finds what is wrong in one."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mbperf

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "test_typing.py"

MISTAKES = """
import torch
from mbperf import Collate, cross_entropy, linear_cross_entropy

x = torch.zeros(2, 3)
cross_entropy(x)
linear_cross_entropy(x, x, x, return_lse=True).backward()
Collate(pad=object())
"""


def mypy(*programs: Path, folder: Path) -> list[str]:
    """Lines of mypy about programs, run where a user is: mbperf is a library, followed in silence."""
    pytest.importorskip("mypy")
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "--config-file="]
    run = subprocess.run(
        [sys.executable, *command, f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", *programs],
        cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not run.stderr
    return run.stdout.splitlines()


def test_the_program_uses_every_public_name():
    tree = ast.parse(PROGRAM.read_text())
    [imported] = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "mbperf"]
    assert sorted(alias.name for alias in imported.names) == sorted(mbperf.__all__)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(mbperf.__all__) <= used


def test_mypy_strict_accepts_the_program_and_finds_mistakes(tmp_path):
    mistakes = tmp_path / "mistakes.py"
    mistakes.write_text(MISTAKES)
    said = mypy(PROGRAM, mistakes, folder=tmp_path)
    of_mistakes = [line for line in said if line.startswith(mistakes.name)]
    assert of_mistakes == said
    assert {line.split(":")[1] for line in of_mistakes if ": error: " in line} == {"6", "7", "8"}
