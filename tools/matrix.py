"""Build mbperf for pairs of Python and torch, run the operators' tests for each, print one table.

    python tools/matrix.py 3.12:2.13.0 3.11:2.15.0

Each pair gets its own copy of the working tree, virtual environment and log below build/matrix; the
environment is removed afterwards, as torch with CUDA takes 5 GB of disk. Exits 1 where a pair fails, 3 where
none fails but one cannot be had here: no such Python, too little disk, or pip has no such torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "matrix"
# The operators' tests that another torch or Python may fail: the kernels include neither.
TESTS = (
    "test_cross_entropy_samples*.py", "test_cross_entropy_contract*.py", "test_cross_entropy_drop_in*.py",
    "test_cross_entropy_dispatch*.py", "test_cross_entropy_autograd*.py", "test_linear*.py",
    "test_kl_div*.py", "test_token_log_probs*.py", "test_collate*.py", "test_gather*.py",
)  # fmt: skip
# Both operators from C++ and from Python, against torch: what meets its interfaces soonest.
QUICK_TESTS = ("test_cross_entropy_contract*.py", "test_collate.py", "test_gather.py")
DISK_GB = 9  # pip's download, what it unpacks, and the build
INSTALL_S = 900  # a network that takes longer for 3 GB is none
COMPILER_CACHE = "/usr/lib/ccache"  # where Debian's ccache stands in for every compiler
PACKAGES = f".venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"  # of a checkout
BUILD_NEEDS = ("numpy", "setuptools", "wheel", "ninja", "pybind11")
TEST_NEEDS = ("click", "pytest", "pytest-timeout", "hypothesis", "expecttest", "psutil")


@dataclass
class Outcome:
    """The outcome of one pair: how far it came, and the result of its tests."""

    python: str
    torch: str
    stage: str = "not begun"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def absent(self) -> bool:
        """Return whether this machine lacks the Python or the torch: mbperf was not tried."""
        return self.stage in ("no environment", "does not install")

    @property
    def good(self) -> bool:
        """Return whether the tests ran and none failed."""
        return self.stage == "tested" and self.passed > 0 and self.failed == 0

    def row(self) -> str:
        """Return the pair's line of the table."""
        counts = f"{self.passed} | {self.failed} | {self.skipped}"
        return f"| {self.python} | {self.torch} | {self.stage} | {counts} | {self.seconds / 60:.1f} |"


class Failed(Exception):
    """A command failed; the log says why."""


def interpreter(version: str) -> str:
    """Return the path of a Python of this version: from PATH, or newest of those that pyenv has."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found
    prefixes = sorted(
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*")
    )
    if prefixes:
        return str(prefixes[-1] / "bin" / "python")
    raise Failed(f"no Python {version} on PATH or in pyenv")


def copy_of_working_tree(folder: Path) -> None:
    """Copy what git tracks, or would: the working tree's own build must not be mixed with another torch's."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def constraints_without_torch(file: Path) -> Path:
    """Write constraints.txt without its torch, and return the file."""
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("torch==")))
    return file


def date_headers_as_here(packages: Path) -> None:
    """Give torch's headers the times that they have in this environment.

    Of two headers of one text and one time gcc leaves out the second (#pragma once), so that a compiler cache
    would see another text after every installation.
    """
    here = Path(sysconfig.get_path("purelib"))
    for header in (here / "torch" / "include").rglob("*.h"):
        twin = packages / header.relative_to(here)
        if twin.exists():
            shutil.copystat(header, twin)


class Pair:
    """One Python and one torch, in a folder of their own."""

    def __init__(self, python: str, torch: str, cuda: bool, tests: tuple[str, ...]):
        self.outcome = Outcome(python, torch)
        self.tests = tests
        self.folder = BUILT / f"python{python}-torch{torch}"
        self.source, self.venv = self.folder / "source", self.folder / "venv"
        self.log = self.folder / "log.txt"
        # With a cache, a pair compiles only what none before it has: no kernel includes Python or torch.
        self.environment = {
            "CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **os.environ,
            "MBPERF_CUDA": "auto" if cuda else "0",
            "PATH": os.pathsep.join([COMPILER_CACHE, os.environ.get("PATH", "")]),
        }  # fmt: skip

    def run(
        self, *command: str, may_fail: bool = False, limit_s: float | None = None, **variables: str
    ) -> None:
        """Run a command in the copy, with more variables; what it prints goes to the log."""
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            environment = {**self.environment, **variables}
            settings = {"cwd": self.source, "env": environment, "stdout": log, "stderr": log}
            try:
                done = subprocess.run(command, check=False, timeout=limit_s, **settings)
            except subprocess.TimeoutExpired as late:
                raise Failed(f"{' '.join(command[:6])} ... took more than {limit_s:.0f} s") from late
        if done.returncode and not may_fail:
            raise Failed(f"{' '.join(command[:6])} ... exited {done.returncode}; see {self.log}")

    def prepare(self) -> str:
        """Make the copy, and the environment unless it was kept; return the environment's Python."""
        shutil.rmtree(self.source, ignore_errors=True)
        self.source.mkdir(parents=True)
        self.log.unlink(missing_ok=True)
        copy_of_working_tree(self.source)
        if not self.venv.exists():
            python = interpreter(self.outcome.python)
            if (free := shutil.disk_usage(BUILT).free / 1e9) < DISK_GB:
                raise Failed(f"{free:.0f} GB of disk are free, {DISK_GB} are needed")
            self.run(python, "-m", "venv", str(self.venv))
        return str(self.venv / "bin" / "python")

    def install(self, python: str) -> None:
        """Install torch and what building and testing need, versions as in constraints.txt."""
        constraints = constraints_without_torch(self.folder / "constraints.txt")
        wanted = (f"torch=={self.outcome.torch}", *BUILD_NEEDS, *TEST_NEEDS)
        command = (python, "-m", "pip", "install", "-q", "--no-compile", "-c", str(constraints), *wanted)
        self.run(*command, limit_s=INSTALL_S)

    def build(self, python: str) -> None:
        """Build mbperf against the torch of the environment.

        Torch is imported by the path that it has in a checkout, with this Python: what includes torch has
        that path in the text that a compiler cache compares.
        """
        [packages] = (self.venv / "lib").glob("python*/site-packages")
        link = self.source / PACKAGES
        link.parent.mkdir(parents=True)
        link.symlink_to(packages)
        date_headers_as_here(packages)
        command = (python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
        self.run(*command, PYTHONPATH=str(link))

    def test(self, python: str) -> None:
        """Run the operators' tests and count them."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        files = sorted({str(file) for glob in self.tests for file in (self.source / "tests").rglob(glob)})
        self.run(python, "-m", "pytest", "-q", f"--junitxml={report}", *files, may_fail=True)
        if not report.exists():
            raise Failed(f"pytest did not start; see {self.log}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        self.outcome.failed = count["failures"] + count["errors"]
        self.outcome.skipped = count["skipped"]
        self.outcome.passed = count["tests"] - self.outcome.failed - self.outcome.skipped

    def try_out(self, keep: bool) -> Outcome:
        """Go through all stages, as far as they succeed."""
        began = time.perf_counter()
        try:
            self.outcome.stage = "no environment"
            python = self.prepare()
            self.outcome.stage = "does not install"
            self.install(python)
            self.outcome.stage = "does not build"
            self.build(python)
            self.outcome.stage = "not tested"
            self.test(python)
            self.outcome.stage = "tested"
        except Failed as error:
            click.echo(f"{self.outcome.python} with torch {self.outcome.torch}: {error}", err=True)
        finally:
            if not keep:
                shutil.rmtree(self.venv, ignore_errors=True)
        self.outcome.seconds = time.perf_counter() - began
        return self.outcome


def parsed(pair: str) -> tuple[str, str]:
    """Return Python and torch of a pair written PYTHON:TORCH."""
    python, colon, torch = pair.partition(":")
    if not (python and colon and torch):
        raise click.BadParameter(f"expected PYTHON:TORCH, as in 3.12:2.13.0, got {pair!r}")
    return python, torch


@click.command(help=__doc__)
@click.argument("pairs", nargs=-1, required=True, metavar="PYTHON:TORCH...")
@click.option("--cuda", is_flag=True, help="Build the CUDA kernels too, where a toolkit is found.")
@click.option("--keep", is_flag=True, help="Keep the environments, for the next time.")
@click.option("--quick", is_flag=True, help="Test only the contract of cross_entropy, collate and gather.")
def main(pairs: tuple[str, ...], cuda: bool, keep: bool, quick: bool) -> None:
    """Try the pairs one after the other."""
    tests = QUICK_TESTS if quick else TESTS
    outcomes = [Pair(*pair, cuda, tests).try_out(keep) for pair in map(parsed, pairs)]
    click.echo("| Python | torch | stage | passed | failed | skipped | minutes |")
    click.echo("|---|---|---|--:|--:|--:|--:|")
    for outcome in outcomes:
        click.echo(outcome.row())
    if not all(outcome.good or outcome.absent for outcome in outcomes):
        sys.exit(1)
    sys.exit(3 if any(outcome.absent for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
