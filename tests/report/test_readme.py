"""README and CONTRIBUTING keep their word: code runs, commands exist, rooms and links are there."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import readme
import torch
from torch.utils.data import DataLoader, TensorDataset

from mbperf import build_info, cli, extras

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
[REQUIRES] = re.findall(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of one language, of all pages."""
    return [
        text for page in PAGES for kind, text in FENCE.findall((ROOT / page).read_text()) if kind == language
    ]


def commands() -> list[str]:
    """Return the command lines shown, without their comments."""
    lines = (line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return sorted({line for line in lines if line})


def test_only_checked_languages_are_shown():
    """A block in another language would escape the tests below."""
    kinds = {kind for page in PAGES for kind, _ in FENCE.findall((ROOT / page).read_text())}
    assert kinds == {"sh", "python"}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block):
    """With what a reader has already: a model, a dataset and DataLoader."""
    model = torch.nn.Linear(784, 10)
    dataset = TensorDataset(torch.rand(128, 784), torch.randint(10, (128,)))
    exec(compile(block, "README.md", "exec"), {"model": model, "dataset": dataset, "DataLoader": DataLoader})
    assert model.weight.grad is not None


@pytest.mark.parametrize("command", commands())
def test_command_exists(command):
    words = shlex.split(command)
    check = {"make": check_make, "mbperf": check_mbperf, "pytest": check_pytest, "pip": check_pip}[words[0]]
    check(words[1:])


def check_make(arguments: list[str]) -> None:
    [verb] = arguments
    subprocess.run(["make", "-n", verb], cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert re.search(rf"^\.PHONY:.*\b{verb}\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check_mbperf(arguments: list[str]) -> None:
    """Parse the arguments with the true command; running it is the business of other tests."""
    name, *rest = arguments
    command = cli.main.get_command(cli.main.make_context("mbperf", [name, *rest]), name)
    assert command is not None
    command.make_context(name, rest)


def check_pytest(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def check_pip(arguments: list[str]) -> None:
    # torch is the reader's own: it is there before these.
    needed = [one for one in ast.literal_eval(REQUIRES) if not one.startswith("torch")]
    published = ("mbperf-*.whl", "--no-build-isolation mbperf-*.tar.gz", " ".join(needed))
    assert f"pip {' '.join(arguments)}" in {build_info.REBUILD, *(f"pip install {it}" for it in published)}


def test_extras_and_options_named_in_the_text_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r'"mbperf\[(\w+)\]"', text)
    assert named
    assert set(named) <= set(extras.EXTRAS)


def test_rooms_of_the_table_exist():
    _, _, section = (ROOT / "README.md").read_text().partition("\n## Where things are\n")
    rooms = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", section, re.MULTILINE)
    folders = [folder for cell in rooms for folder in re.findall(r"`(.*?)`", cell)]
    assert len(folders) >= 8
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_figures_stand_only_where_a_run_writes_them():
    """Speed is claimed by the blocks that are rewritten from a saved run, nowhere else."""
    rest = (ROOT / "README.md").read_text()
    for name in readme.BLOCKS:
        marks = re.escape(readme.BEGIN.format(name)), re.escape(readme.END.format(name))
        rest, found = re.subn(rf"{marks[0]}\n.*?{marks[1]}", "", rest, flags=re.DOTALL)
        assert found == 1, name
    assert not re.findall(r"\d+(?:\.\d+)?\s*(?:x|×|times)\b|GB/s", rest)
