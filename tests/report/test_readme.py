"""README and CONTRIBUTING keep their word: code runs, commands exist, rooms and links are there."""

import ast
import json
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


def block_of(name: str) -> str:
    """Return the text between the marks of a block of README."""
    _, _, rest = (ROOT / "README.md").read_text().partition(readme.BEGIN.format(name) + "\n")
    return rest.partition("\n" + readme.END.format(name))[0]


H100 = ROOT / "results/nvidia-h100-80gb-hbm3/Linux-CPython-3.12-64bit"
CONTENDERS = {"mbperf": "fused", "torch.compile": "compiled", "memory limit": "roof", "Liger": "liger"}


@pytest.mark.skipif(not H100.is_dir(), reason="an sdist holds no records")
def test_every_figure_of_the_gpu_block_is_in_the_record():
    """Read from the file itself, without what writes the block: every time, and none left out."""
    [file] = H100.glob("0001_03cf041*.json")
    saved = {
        (entry["group"], entry["param"]): entry["stats"]["median"] * 1e6
        for entry in json.loads(file.read_text())["benchmarks"]
    }
    in_graphs, from_host, _ = block_of("gpu").split("\n\n")
    for table, suffix in ((in_graphs, ""), (from_host, " eager")):
        head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for case, *cells in lines:
            op = next(op for op in ("gather normalised", case.split()[0]) if case.startswith(op))
            group = case.replace(op, f"{op} cuda", 1) + suffix
            for title, cell in zip(head[1:], cells, strict=True):
                name = CONTENDERS.get(title, title)
                time = saved.pop((group, name), None)
                shown = cell.partition(" (")[0].strip("*")
                assert (time is None) == (not shown), (case, title)
                if time is not None:
                    assert float(shown) == pytest.approx(time, rel=5e-3), (case, title)
    assert {name for group, name in saved} <= {"roof"}  # of eager calls


def test_the_gpu_block_says_of_what_when_and_on_which_tree():
    block, rest = block_of("gpu"), (ROOT / "README.md").read_text()
    for words in ("03cf041", "2026-11-27", "NVIDIA H100 80GB HBM3", "torch 2.11.0+cu130", "32 tests failed"):
        assert words in block
    assert "have not run on a GPU again" in rest


def test_figures_stand_only_where_a_run_writes_them():
    """Speed is claimed by the blocks that are rewritten from a saved run, nowhere else."""
    rest = (ROOT / "README.md").read_text()
    for name in (*readme.BLOCKS, *readme.GPU_BLOCKS):
        marks = re.escape(readme.BEGIN.format(name)), re.escape(readme.END.format(name))
        rest, found = re.subn(rf"{marks[0]}\n.*?{marks[1]}", "", rest, flags=re.DOTALL)
        assert found == 1, name
    assert not re.findall(r"\d+(?:\.\d+)?\s*(?:x|×|times)\b|GB/s", rest)
