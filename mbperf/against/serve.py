"""Run as a script: collect the bench groups of one tree and serve them, each in a fork of its own.

    python serve.py FD TREE [pytest's arguments]

The tree may be older than this file, so nothing of mbperf is imported here but what the tree itself holds.
Messages over the pipe FD are pairs, answers ("ok", value) or ("error", words).
"""

import contextlib
import gc
import io
import itertools
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Longer than the threads of an OpenMP pool spin after their last work (300,000 pauses, a few ms), so that
# those of the other processes sleep before the clock starts; without a pool it is enough to fill the caches.
WARM_S, WARM_ALONE_S = 0.006, 0.001
# Of the calls of one round, each 0.5 ms or one call; the scheduler's slices are 3 ms.
PARTS = 9
MOMENT_S = 0.1  # a few rounds
SETS = 3  # of inputs, as many as contenders: which of them serves is dealt afresh in every round


class Collected:
    """A pytest plugin that keeps what was collected, and the last line of what could not be."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.errors: list[str] = []

    def pytest_collection_finish(self, session: Any) -> None:
        """Keep the tests."""
        self.items = list(session.items)

    def pytest_collectreport(self, report: Any) -> None:
        """Keep why a file could not be collected."""
        if report.failed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")


def plugin_of(tree: Path) -> str:
    """Return the module of a tree's own pytest plugin, as its pyproject.toml names it."""
    found = re.search(
        r'entry-points\.pytest11\]\s*mbperf\s*=\s*"([\w.]+)"', (tree / "pyproject.toml").read_text()
    )
    if not found:
        raise RuntimeError("its pyproject.toml names no pytest plugin: it has no benchmarks to compare")
    return found[1]


def collect(tree: Path, selection: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the groups that a selection names in a tree, by name, and what could not be collected."""
    import pytest

    paths = [arg for arg in selection if not arg.startswith("-") and "bench" in arg.split("/")[0]]
    kept = [arg for arg in selection if arg not in paths or (tree / arg.partition("::")[0]).exists()]
    if paths and not set(paths) & set(kept):
        return {}, []
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
        "1"  # entry points are the installed tree's, not this one's
    )
    plugins = ["-p", "benchmark", "-p", plugin_of(tree), "-p", "no:cacheprovider"]
    quiet = ["--collect-only", "-q", "-s", "--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
    caught, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main([*plugins, *quiet, *([] if paths else ["bench"]), *kept], plugins=[caught])
    if not caught.items and not caught.errors and code not in (0, 5):  # 5: nothing was selected
        raise RuntimeError(said.getvalue().strip().splitlines()[-1])
    groups = {group.name: group for item in caught.items for group in groups_of(item)}
    return groups, caught.errors


def groups_of(item: Any) -> Iterator[Any]:
    """Yield the group of a collected test: its parameter is a row, which knows its group."""
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        group = getattr(value, "group", None)
        if hasattr(group, "make_inputs") and hasattr(group, "contenders"):
            yield group


def why_not(group: Any) -> str:
    """Return why a group is not compared, or an empty string."""
    if getattr(group, "measured_by", None):
        return "it is measured in its own way, not in rounds"
    if getattr(group, "cold", False):
        return "it is cold: its calls have to evict the caches between them"
    return ""


def serve(pipe: Connection, kind: str, group: Any) -> None:
    """In a child: check a group, or make its inputs and call its subject as often as is asked."""
    import torch

    if getattr(group, "threads", None):
        torch.set_num_threads(group.threads)
    if kind == "check":
        pipe.send(("ok", sys.modules[type(group).__module__].check(group, group.subject) or ""))
        return
    calls = [bound(group, number) for number in range(sets_of(group))]
    pipe.send(("ok", [shapes(inputs) for _, inputs in calls]))
    timer = getattr(group, "timer", None) or timed
    while (message := pipe.recv()) != ("close", ""):
        number, n = message
        call, _ = calls[number]
        seconds = timer(call, n) if n else warm(call)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        pipe.send(("ok", (seconds, switches)))


def sets_of(group: Any) -> int:
    """Return how many input sets to make: fewer where the group says that they are dear."""
    asked = getattr(group, "input_sets", None)
    return SETS if asked is None else max(1, min(SETS, asked))


def bound(group: Any, number: int) -> tuple[Callable[[], Any], Any]:
    """Return the call of a group's subject on new inputs, and these."""
    import torch

    torch.manual_seed(number)
    inputs = group.make_inputs()
    subject = group.contenders[group.subject]
    return (lambda: subject(*inputs)), inputs


def shapes(value: Any) -> list[str]:
    """Return the shapes and dtypes of all tensors in nested containers: equal work has equal ones."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [shape for one in value for shape in shapes(one)]
    return [f"{tuple(value.shape)} {value.dtype}"] if hasattr(value, "dtype") else []


def timed(call: Callable[[], Any], n: int) -> float:
    """Return the seconds of `n` calls, by the median of parts: a part that lost its processor does not count.

    What a call returns is freed before the next one.
    """
    parts = min(PARTS, n)
    each = -(-n // parts)
    return n * statistics.median(_part(call, each) for _ in range(parts)) / each


def _part(call: Callable[[], Any], n: int) -> float:
    repeat = itertools.repeat(None, n)
    start = time.perf_counter()
    for _ in repeat:
        call()
    return time.perf_counter() - start


def warm(call: Callable[[], Any]) -> float:
    """Make at least one call, and more until the processes that had their turn before are quiet."""
    import torch

    go_where_the_others_go()
    enough_s = WARM_S if torch.get_num_threads() > 1 else WARM_ALONE_S
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < enough_s:
        call()
    return time.perf_counter() - start


def go_where_the_others_go() -> None:
    """Move to the processor of this moment, the same for all processes; from there the scheduler is free.

    A process that only waits wakes where it slept. Beside a neighbour on one of two processors that made
    identical trees differ by up to 30 % for as long as they lived.
    """
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(time.monotonic() / MOMENT_S) % len(processors)]})
        os.sched_setaffinity(0, processors)


def in_child(pipe: Connection, kind: str, group: Any) -> None:
    """Serve a group in a fork, which leaves nothing of it behind here; say how it died, if it did."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            serve(pipe, kind, group)
            code = 0
        except (EOFError, BrokenPipeError):
            code = 0  # the parent has gone, and asks nothing any more
        except BaseException as error:
            pipe.send(("error", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        pipe.send(("error", f"its process {how}"))


def refuse_threads() -> None:
    """Raise if this process has started threads: OpenMP hangs in the fork of one whose pool was running."""
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1 and not _gone_after_a_fork(tasks):
        raise RuntimeError("its bench files start a thread, or compute, while they are imported")


def _gone_after_a_fork(tasks: Path) -> bool:
    """Whether these are OpenBLAS's, which it starts when numpy is imported and ends at every fork."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.05)  # a thread that was joined may show a moment longer
    return len(list(tasks.iterdir())) == 1


def main(fd: str, folder: str, *selection: str) -> None:
    """Collect, then serve until the pipe ends."""
    pipe, tree = Connection(int(fd)), Path(folder)
    os.chdir(tree)
    sys.path[0] = str(tree)  # was the folder of this script
    try:
        import torch

        import mbperf

        if tree not in Path(mbperf.__file__).parents:
            raise RuntimeError(f"mbperf came from {mbperf.__file__}")
        groups, errors = collect(tree, [*selection])
        refuse_threads()
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        return
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "errors": errors}
    pipe.send(("ok", {"groups": {name: why_not(group) for name, group in groups.items()}, **facts}))
    gc.collect()
    gc.freeze()
    gc.disable()  # in the children: no collection inside a round
    with contextlib.suppress(EOFError):
        while True:
            kind, name = pipe.recv()
            in_child(pipe, kind, groups[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
