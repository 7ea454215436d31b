"""A revision beside the working tree: check it out, build it, and leave nothing of it behind."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mbperf.against.processes import ended
from mbperf.doctor import software

BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
BUILT_FROM = ("csrc", "setup.py")  # what the extension depends on beside the environment
BUILT = ("_C*.so", "_build_info.json")  # below mbperf/
COMPLAINT = re.compile(r"\berror\b|^mbperf: ", re.IGNORECASE | re.MULTILINE)


class RevisionError(RuntimeError):
    """A revision that cannot be measured; the message names it and says why."""


def commit_of(tree: Path, revision: str) -> str:
    """Return the commit that a revision names in the repository of a tree.

    Raises:
        RevisionError: there is no repository, or no such revision.
    """
    if not (tree / ".git").exists():
        raise RevisionError(f"--against {revision}: {tree} is no git checkout")
    found = git(tree, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise RevisionError(f"--against {revision}: git knows no such revision in {tree}")
    return found.stdout.strip()


def described(tree: Path) -> str:
    """Return a tree's commit and its subject, and whether it was changed since."""
    changed = git(tree, "status", "--porcelain", "--untracked-files=no").stdout.strip()
    commit = git(tree, "log", "-1", "--format=%h %s").stdout.strip()
    return commit + (", with changes" if changed else "")


def git(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a tree."""
    return subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True, check=False)


@contextmanager
def checked_out(tree: Path, commit: str) -> Iterator[Path]:
    """Check a commit out in a worktree of its own, which is gone when the block is left."""
    folder = Path(tempfile.mkdtemp(prefix="mbperf-against-")).resolve()
    try:
        added = git(tree, "worktree", "add", "--detach", str(folder / "tree"), commit)
        if added.returncode:
            raise RevisionError(f"{commit[:12]} cannot be checked out: {added.stderr.strip()}")
        yield folder / "tree"
    finally:
        with undisturbed():
            shutil.rmtree(folder, ignore_errors=True)
            git(tree, "worktree", "prune")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C interrupt the clearing up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(tree: Path, other: Path, commit: str, say: Callable[[str], None]) -> None:
    """Give both trees a built extension.

    Args:
        tree: the working tree.
        other: the revision's tree.
        commit: the revision's.
        say: told what is done before it is done, as a build takes minutes.

    Raises:
        RevisionError: one of them does not build.
    """
    if is_stale(tree):
        say("building the extension of the working tree")
        build(tree, "the working tree")
    if same_sources(tree, commit):
        say("the extension has the same sources in both trees: copying it")
        for pattern in BUILT:
            for file in (tree / "mbperf").glob(pattern):
                shutil.copy2(file, other / "mbperf" / file.name)
        return
    say(f"building the extension of {commit[:12]}")
    build(other, commit[:12])


def is_stale(tree: Path) -> bool:
    """Whether a tree's extension is not built, or is older than its sources."""
    record = tree / "mbperf" / "_build_info.json"
    return not record.exists() or bool(software.newer(software.sources(False, tree / "csrc"), record))


def same_sources(tree: Path, commit: str) -> bool:
    """Whether a tree, as it stands, has the sources of the extension that a commit has."""
    differ = git(tree, "diff", "--quiet", commit, "--", *BUILT_FROM).returncode != 0
    new = git(tree, "ls-files", "--others", "--exclude-standard", "--", *BUILT_FROM).stdout
    return not differ and not new.strip()


def build(tree: Path, name: str) -> None:
    """Build a tree's extension beside its sources, with the interpreter that runs and as the user would.

    Raises:
        RevisionError: it does not build; the message has the compiler's first error.
    """
    process = subprocess.Popen(
        BUILD,
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with ended(process):
        said, _ = process.communicate()
        code = process.returncode
    if code:
        raise RevisionError(f"{name} does not build: {first_complaint(said)}")


def first_complaint(said: str) -> str:
    """Return the first line of a build's output that is an error, or its last line.

    >>> first_complaint("compiling\\na.cpp:3:1: error: expected ';'\\nninja: build stopped")
    "a.cpp:3:1: error: expected ';'"
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if COMPLAINT.search(line)), lines[-1] if lines else "no output")
