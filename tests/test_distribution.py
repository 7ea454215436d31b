"""The contents of the sdist: all that git tracks, but for what serves the checkout alone."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Records of runs, and the files of git, CI and editors.
CHECKOUT_ONLY = ("results/", "notebooks/", ".")
GENERATED = {"PKG-INFO", "setup.cfg"}


def in_git() -> set[str]:
    """Names of the files that git tracks, or would after `git add`."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("no git checkout to compare with")
    return {name for name in run.stdout.splitlines() if (ROOT / name).is_file()}


def in_sdist(folder: Path, root: Path = ROOT) -> set[str]:
    """Names of the files in an sdist of this checkout, or of a copy."""
    command = ["-q", "egg_info", f"--egg-base={folder}", "sdist", f"--dist-dir={folder}"]
    subprocess.run([sys.executable, "setup.py", *command], cwd=root, check=True, timeout=120)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        return {member.name.partition("/")[2] for member in packed if member.isfile()}


def test_the_sdist_holds_what_git_tracks(tmp_path):
    tracked, packed = in_git(), in_sdist(tmp_path)
    expected = {name for name in tracked if not name.startswith(CHECKOUT_ONLY)}
    packed = {name for name in packed - GENERATED if ".egg-info/" not in name}
    assert packed - expected == set()
    assert expected - packed == set()
    assert any(name.endswith(".cu") for name in packed)
    assert any(name.endswith("-inl.h") for name in packed)


@pytest.mark.parametrize("kept", [".hypothesis/examples/0a/1b", ".pytest_cache/v/cache/nodeids"])
def test_the_sdist_leaves_out_what_tools_keep_beside_the_tests(tmp_path, kept):
    """A test that is started in another folder makes them there."""
    copy = tmp_path / "copy"
    for name in in_git():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for folder in ("tests", "tests/ops", "bench"):
        (copy / folder / kept).parent.mkdir(parents=True)
        (copy / folder / kept).touch()
    packed = in_sdist(tmp_path, copy)
    assert "tests/ops/test_gather.py" in packed
    assert [name for name in packed if kept in name] == []
