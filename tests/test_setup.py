"""`make setup` says in one line what a machine lacks, and does nothing the second time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "make", "find", "sort", "mkdir", "touch", "rm", "tail", "cp", "chmod", "cat")

# `-m venv` makes a copy of this script, `-m pip` writes down what it was asked; the rest is true Python.
INTERPRETER = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; echo "$* ${MBPERF_SANITIZE:-}" >> pip.log; exit ${PIP_STATUS:-0} ;;
  *) exec %s "$@" ;;
esac
"""


class Workshop:
    """A copy of the build files, and a PATH that holds only what is put on it."""

    def __init__(self, folder: Path):
        self.folder = folder / "checkout"
        self.path = folder / "bin"
        self.plants = folder / "plants"
        for made in (self.folder / "csrc", self.path, self.plants):
            made.mkdir(parents=True)
        for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
            shutil.copy2(ROOT / name, self.folder)
        (self.folder / "csrc" / "one.cpp").touch()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))
        self.add("python3", INTERPRETER % sys.executable)
        self.add("g++", "#!/bin/sh\n")
        self.plant(torch="")

    def add(self, tool: str, text: str) -> None:
        (self.path / tool).write_text(text)
        (self.path / tool).chmod(0o755)

    def plant(self, **modules: str) -> None:
        """Put modules in front of the true ones; `sitecustomize` runs at the start of every interpreter."""
        for name, text in modules.items():
            (self.plants / f"{name}.py").write_text(text)

    def make(self, verb: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": str(self.path), "PYTHONPATH": str(self.plants), "HOME": os.environ.get("HOME", "/")}
        settings = {"capture_output": True, "text": True, "check": False, "timeout": 60, "cwd": self.folder}
        return subprocess.run([str(self.path / "make"), verb], env={**clean, **environment}, **settings)

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.make("setup", **environment)

    def complaint(self, **environment: str) -> str:
        """Run `make setup`, which must fail with one line of ours, and return that line."""
        run = self.setup(**environment)
        assert run.returncode == 2, run.stdout + run.stderr
        assert not (self.folder / ".venv" / ".installed").exists()
        [line] = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("mbperf: ")]
        return line

    def pip_calls(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def test_no_python(workshop):
    (workshop.path / "python3").unlink()
    assert "no python3; install Python 3.10 or later" in workshop.complaint()


def test_old_python(workshop):
    workshop.plant(sitecustomize="import sys; sys.version_info = (3, 9, 18)")
    assert "python3 is older than 3.10; install a later one" in workshop.complaint()


def test_no_venv_module(workshop):
    workshop.plant(sitecustomize="import sys; sys.modules['ensurepip'] = None")
    assert "no venv module; install it, e.g. apt-get install python3-venv" in workshop.complaint()


def test_no_python_headers(workshop):
    workshop.plant(sitecustomize="import sysconfig; sysconfig.get_path = lambda name: '/nowhere'")
    assert "no C headers; install them, e.g. apt-get install python3-dev" in workshop.complaint()


def test_no_compiler(workshop):
    (workshop.path / "g++").unlink()
    assert "no C++ compiler (g++); install one, e.g. apt-get install g++" in workshop.complaint()


def test_another_compiler_by_name(workshop):
    (workshop.path / "g++").unlink()
    assert "no C++ compiler (clang++)" in workshop.complaint(CXX="clang++")


def test_full_disk(workshop):
    workshop.plant(
        sitecustomize="import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 9)"
    )
    assert "less than 4 GB free on this disk; free some" in workshop.complaint()
    assert not workshop.pip_calls()


def test_pip_that_fails(workshop):
    assert "pip failed (above): no network, a full disk, or no torch" in workshop.complaint(PIP_STATUS="1")


def test_torch_that_does_not_import_is_quoted(workshop):
    workshop.plant(torch="raise ImportError('libgomp.so.1: cannot open shared object file')")
    line = workshop.complaint()
    assert (
        "torch does not import (ImportError: libgomp.so.1: cannot open shared object file); install" in line
    )


def test_second_setup_does_nothing(workshop):
    assert workshop.setup().returncode == 0
    calls = workshop.pip_calls()
    assert len(calls) == 2
    again = workshop.setup()
    assert again.returncode == 0
    assert again.stdout + again.stderr == ""
    assert workshop.pip_calls() == calls


@pytest.mark.parametrize("name", ["csrc/one.cpp", "setup.py"])
def test_changed_source_rebuilds_and_installs_nothing_else(workshop, name):
    workshop.setup()
    later = (workshop.folder / ".venv" / ".built").stat().st_mtime + 10
    os.utime(workshop.folder / name, (later, later))
    before = workshop.pip_calls()
    assert workshop.setup().returncode == 0
    [rebuild] = workshop.pip_calls()[len(before) :]
    assert "--no-build-isolation -e" in rebuild


def test_build_that_fails_is_tried_again(workshop):
    workshop.setup()
    (workshop.folder / ".venv" / ".built").unlink()
    failed = workshop.setup(PIP_STATUS="1")
    assert failed.returncode == 2
    assert "mbperf: the extension does not build; the compiler says why" in failed.stdout
    before = workshop.pip_calls()
    assert workshop.setup().returncode == 0
    assert len(workshop.pip_calls()) == len(before) + 1


def test_interrupted_install_starts_afresh(workshop):
    half_made = workshop.folder / ".venv" / "lib" / "half-made"
    half_made.parent.mkdir(parents=True)
    half_made.touch()
    (workshop.folder / ".venv" / ".unfinished").touch()
    run = workshop.setup()
    assert run.returncode == 0, run.stderr
    assert "mbperf: the last install was interrupted; making .venv again" in run.stdout
    assert not half_made.exists()
    assert not (workshop.folder / ".venv" / ".unfinished").exists()


def test_environment_made_by_hand_is_kept(workshop):
    own = workshop.folder / ".venv" / "mine"
    own.parent.mkdir()
    own.touch()
    assert workshop.setup().returncode == 0
    assert own.exists()


def test_sanitize_builds_the_ordinary_extension_without_sanitizers(workshop):
    workshop.make("sanitize")
    assert len(workshop.pip_calls()) == 2
    assert not [call for call in workshop.pip_calls() if "address" in call]


def test_interpreter_that_is_gone(workshop):
    workshop.setup()
    interpreter = workshop.folder / ".venv" / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to("/nowhere/python3.10")
    run = workshop.setup()
    assert run.returncode == 2
    assert ".venv/bin/python does not start (Python upgraded?); run: make clean setup" in run.stdout
