"""docs/extending.md is followed step by step on a copy of the tree, and what it names is looked up."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()
FOLLOWED = ("A contender", "A benchmark of an operator")

STEP = re.compile(r"^\d+\. `([^`]+)`: ", re.MULTILINE)
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?:\(\.\.\.\))?`")
FILE = re.compile(r"`([\w.]+(?:/[\w.]+)+)`")


@dataclass
class Step:
    """A numbered step: the file it begins with, and all it says."""

    file: str
    text: str

    @property
    def words(self) -> str:
        """The text after the file, without blocks."""
        return BLOCK.sub("", STEP.sub("", self.text))

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of each block, without the indentation of the list."""
        return [
            (language, "".join(line[3:] or "\n" for line in text.splitlines(keepends=True)))
            for language, text in BLOCK.findall(self.text)
        ]


def sections(page: str) -> dict[str, str]:
    """Texts by heading."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def steps(section: str) -> list[Step]:
    """The numbered steps of a section; a paragraph without indentation ends one."""
    begins = [found.start() for found in STEP.finditer(section)]
    texts = [section[a:b] for a, b in zip(begins, [*begins[1:], None], strict=True)]
    return [Step(STEP.match(text)[1], re.split(r"\n\n(?=\S)", text)[0] + "\n") for text in texts]


def follow(step: Step, tree: Path) -> None:
    """Make the changes of a step in a tree."""
    file = tree / step.file
    for language, block in step.blocks:
        if language == "python":
            assert not file.exists(), f"{step.file} is there already"
            file.write_text(block)
            continue
        lines = [(line[:1].strip(), line[1:]) for line in block.splitlines(keepends=True)]
        old = "".join(text or "\n" for sign, text in lines if sign != "+")
        new = "".join(text or "\n" for sign, text in lines if sign != "-")
        text = file.read_text()
        assert text.count(old) == 1, f"{step.file} does not hold once:\n{old}"
        file.write_text(text.replace(old, new))


@pytest.fixture
def tree(tmp_path):
    """A copy of what the page changes and of what its commands need."""
    for folder in ("bench", "mbperf"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for extension in (ROOT / "mbperf").glob("*.so"):
        (tmp_path / "mbperf" / extension.name).symlink_to(extension)
    return tmp_path


def checked(tree: Path, *files: str) -> str:
    """Check the rows that the page adds and run its doctest, no clock; return what pytest says."""
    options = ["-v", "-k", "indexed or logsumexp", "--doctest-modules", "--benchmark-disable"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_who_follows_the_page_has_a_contender_and_a_benchmark(tree):
    for name in FOLLOWED:
        for step in steps(sections(PAGE)[name]):
            follow(step, tree)
    said = checked(tree, "bench/bench_gather.py", "bench/bench_logsumexp.py", "mbperf/measure/traffic.py")
    passed = re.findall(r"::(\S+) PASSED", said)
    assert sum(name.endswith("-indexed]") for name in passed) == 3
    for row in ("fused", "again", "torch", "roof", "null"):
        assert f"test_logsumexp[512x1000-{row}]" in passed
    assert "mbperf.measure.traffic.logsumexp_traffic" in passed


def test_a_change_that_does_not_fit_the_file_is_refused(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\ny = 2\n")
    step = "1. `one.py`: change it.\n\n   ```diff\n    x = 1\n   -y = {}\n   +y = 4\n   ```\n"
    [wrong], [right] = steps(step.format(3)), steps(step.format(2))
    with pytest.raises(AssertionError, match=r"one\.py does not hold once"):
        follow(wrong, tmp_path)
    follow(right, tmp_path)
    assert (tmp_path / "one.py").read_text() == "x = 1\ny = 4\n"


def missing(page: str) -> list[str]:
    """Files that the page names and the tree lacks; names in its steps that no file of the section has."""
    lost = []
    for section in sections(page).values():
        here = steps(section)
        files = {step.file for step in here} | set(FILE.findall(BLOCK.sub("", section)))
        made = {step.file for step in here if "python" in dict(step.blocks)}
        lost += [file for file in files - made if not (ROOT / file).exists()]
        known = "".join((ROOT / file).read_text() for file in files if (ROOT / file).is_file())
        names = {name for step in here for name in NAME.findall(step.words)}
        lost += [name for name in names if not re.search(rf"\b{name}\b", known)]
    return sorted(lost)


def test_the_page_names_what_exists():
    assert all(steps(section) for section in sections(PAGE).values())
    assert missing(PAGE) == []


def test_what_does_not_exist_is_noticed():
    page = PAGE.replace("`selected`", "`chosen`").replace("bench/in_jax.py", "bench/in_tpu.py")
    assert missing(page) == ["bench/in_tpu.py", "chosen", "require"]
