"""What tools/matrix.py makes of pairs that pass, fail or cannot be had here; no pair is built."""

import shutil
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

import matrix
import pytest
from click.testing import CliRunner

if not shutil.which("git") or not (matrix.ROOT / ".git").exists():
    pytest.skip("the pairs are built from what git tracks", allow_module_level=True)

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Return what the command line ends with and says, its folders being elsewhere."""
    monkeypatch.setattr(matrix, "BUILT", tmp_path)

    def call(*arguments):
        return CliRunner().invoke(matrix.main, arguments)

    return call


@pytest.mark.parametrize(
    ("stage", "passed", "failed", "status"),
    [
        ("tested", 3, 0, 0),
        ("tested", 3, 1, 1),
        ("tested", 0, 0, 1),
        ("not tested", 0, 0, 1),
        ("does not build", 0, 0, 1),
        ("does not install", 0, 0, 3),
        ("no environment", 0, 0, 3),
    ],
)
def test_only_what_cannot_be_had_is_no_failure(tried, monkeypatch, stage, passed, failed, status):
    def outcome(pair, keep):
        pair.outcome.stage, pair.outcome.passed, pair.outcome.failed = stage, passed, failed
        return pair.outcome

    monkeypatch.setattr(matrix.Pair, "try_out", outcome)
    ended = tried("3.12:2.13.0")
    assert ended.exit_code == status
    assert f"| 3.12 | 2.13.0 | {stage} | {passed} | {failed} | 0 | 0.0 |" in ended.output


def test_a_pair_that_fails_outweighs_one_that_cannot_be_had(tried, monkeypatch):
    stages = iter(["no environment", "does not build"])

    def outcome(pair, keep):
        pair.outcome.stage = next(stages)
        return pair.outcome

    monkeypatch.setattr(matrix.Pair, "try_out", outcome)
    assert tried("3.12:2.13.0", "3.13:2.13.0").exit_code == 1


def test_a_python_that_is_not_here_is_named(tried):
    ended = tried("3.99:2.13.0")
    assert ended.exit_code == 3
    assert "3.99 with torch 2.13.0: no Python 3.99 on PATH or in pyenv" in ended.output
    assert "| 3.99 | 2.13.0 | no environment |" in ended.output


def test_a_disk_without_room_is_left_alone(tried, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(9e9, 8e9, 1e9))
    ended = tried(f"{HERE}:2.13.0")
    assert ended.exit_code == 3
    assert f"1 GB of disk are free, {matrix.DISK_GB} are needed" in ended.output


def test_a_network_that_is_too_slow_counts_as_none(tried, monkeypatch, tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(matrix, "INSTALL_S", 0.2)
    monkeypatch.setattr(matrix.Pair, "prepare", lambda pair: pair.source.mkdir(parents=True) or str(slow))
    ended = tried("3.12:2.13.0")
    assert ended.exit_code == 3
    assert "took more than 0 s" in ended.output
    assert "| 3.12 | 2.13.0 | does not install |" in ended.output


def test_torch_is_found_by_the_path_of_a_checkout_whatever_the_python(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "BUILT", tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH"\n')
    python.chmod(0o755)
    for version in ("3.10", "3.13"):
        pair = matrix.Pair(version, "2.13.0", False, matrix.TESTS)
        packages = pair.venv / "lib" / f"python{version}" / "site-packages"
        packages.mkdir(parents=True)
        pair.source.mkdir()
        pair.build(str(python))
        _, path = pair.log.read_text().splitlines()
        assert Path(path).resolve() == packages
        assert Path(path) == pair.source / ".venv" / "lib" / f"python{HERE}" / "site-packages"


def test_torch_s_headers_have_the_times_that_they_have_here(tmp_path):
    header = Path("torch", "include", "torch", "library.h")
    here = Path(sysconfig.get_path("purelib")) / header
    twin, stranger = tmp_path / header, tmp_path / header.with_name("of_another_torch.h")
    twin.parent.mkdir(parents=True)
    twin.touch()
    stranger.touch()
    matrix.date_headers_as_here(tmp_path)
    assert twin.stat().st_mtime == here.stat().st_mtime
    assert stranger.stat().st_mtime > here.stat().st_mtime


@pytest.mark.parametrize("pair", ["3.12", "3.12:", ":2.13.0"])
def test_a_pair_without_a_torch_or_a_python_is_refused(tried, pair):
    ended = tried(pair)
    assert ended.exit_code == 2
    assert f"expected PYTHON:TORCH, as in 3.12:2.13.0, got {pair!r}" in " ".join(ended.output.split())
