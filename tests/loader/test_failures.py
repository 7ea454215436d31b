"""Every way a configuration can fail is a reported row within its time, and nothing is left behind."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import subjects
import torch
from retrying import retried
from single_trials import born_here, nothing_left_behind, run, trial  # noqa: F401  the fixture is used

from mbperf.loader.processes import causes
from mbperf.loader.processes.forkserver import import_object
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.settings import Settings
from mbperf.loader.source import LoaderError, source_of

pytestmark = pytest.mark.timed


def test_a_killed_worker_is_a_row():
    answer = trial(born_here(subjects.KilledWorker(), shuffle=False), 2)
    assert answer["cause"] == "killed"
    assert "a worker died" in answer["infeasible"]


def test_a_killed_worker_is_out_of_memory_where_the_kernel_counted_one(monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr("mbperf.loader.processes.runner.oom_kills", lambda: next(counts))
    answer = trial(born_here(subjects.KilledWorker(), shuffle=False), 2)
    assert answer["cause"] == "out_of_memory"
    assert "the kernel ran out of memory" in answer["infeasible"]


def test_a_bus_error_in_a_worker_names_shared_memory():
    answer = trial(born_here(subjects.BusError(), shuffle=False), 2)
    assert answer["cause"] == "shared_memory"
    assert "/dev/shm" in answer["infeasible"]


def test_a_full_dev_shm_is_named():
    """A real one: a small tmpfs mounted over /dev/shm, in a mount namespace of the trial's own."""
    code = """
import subprocess, sys
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.source import Source
from mbperf.loader.settings import Settings
from mbperf.loader.search import limits
import subjects
settings = Settings(batch_size=8).with_workers(2)
print(limits.foreseen(settings, 8 * 3 * 2**20, 1))
with TrialRunner(Source(live=subjects.Large(), fixed={})) as runner:
    print(runner.run({"job": "trial", "settings": settings.as_dict(), "seconds": 0.1, "seed": 0}, 20.0))
"""
    out = in_namespace(code, "mount -t tmpfs -o size=16m tmpfs /dev/shm")
    assert "needs up to" in out
    assert "'cause': 'shared_memory'" in out


def in_namespace(code, prepare):
    """Run Python code in a mount namespace of its own, or skip where that is not permitted."""
    tests = str(Path(__file__).parent)
    script = f"{prepare} || exit 77; PYTHONPATH={tests} exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_descriptor_limit_is_named():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        answer = trial(born_here(subjects.ManyTensors()), 2, prefetch_factor=4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answer["cause"] == "descriptors"
    assert "ulimit -n" in answer["infeasible"]


def test_an_unpicklable_dataset_runs_under_fork_and_not_under_spawn():
    source = source_of(subjects.Unpicklable(), {})
    assert "does not pickle" in source.warning
    with TrialRunner(source) as runner:
        assert "infeasible" not in run(runner, Settings(batch_size=16).with_workers(1))
        answer = run(runner, Settings(batch_size=16, multiprocessing_context="spawn").with_workers(1))
    assert answer["cause"] == "pickling"


def test_a_fork_of_a_process_that_had_openmp_threads_does_not_wait_for_them():
    class Parallel(subjects.Base):
        def access(self, index):
            torch.ones(1 << 17).exp_()

    Parallel().access(0)
    assert torch.get_num_threads() > 1
    assert "infeasible" not in trial(born_here(Parallel(64)), 0, limit_s=10.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_getitem_names_the_index(workers):
    """In order, index 77 is in the first batch behind the warm-up, however slow the trial is."""
    answer = trial(born_here(subjects.Raises(), shuffle=False), workers)
    assert answer == {"infeasible": "dataset[77] raises ValueError: broken sample", "cause": "exception"}


def test_an_empty_epoch_is_one_clear_error():
    answer = trial(born_here(subjects.Base(5), drop_last=True), 0)
    assert "yields no batch" in answer["infeasible"]


@retried
def test_a_dataset_shorter_than_a_batch_is_timed():
    answer = trial(born_here(subjects.Sleeps(5)), 0)
    assert answer["samples"] % 5 == 0
    assert answer["whole_epochs"]
    assert answer["samples"] / answer["seconds"] == pytest.approx(1 / 0.0021, rel=0.2)


@pytest.mark.parametrize(
    "dataset", [subjects.Counting(), subjects.Counting(64), subjects.Sharded(), subjects.Endless()]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_and_endless_datasets_are_timed(dataset, workers):
    answer = trial(born_here(dataset, shuffle=False), workers)
    assert answer["samples"] > 0
    assert "infeasible" not in answer


def test_a_dataset_that_cannot_be_made_is_an_error_in_words():
    with pytest.raises(LoaderError, match=r"FileNotFoundError: no such data \(subjects.py:\d+\)"):
        TrialRunner(source_of("subjects:failing_factory", {})).__enter__()


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("subjects", ValueError, "expected package.module:dataset, got 'subjects'"),
        ("subjects:nothing", AttributeError, "nothing"),
        ("no.such.module:x", ModuleNotFoundError, "No module named 'no'"),
    ],
)
def test_bad_import_paths_are_errors_in_words(path, error, words):
    with pytest.raises(error, match=words):
        import_object(path)


def test_causes_of_known_messages():
    cases = {
        "Too many open files": "descriptors",
        "received 0 items of ancdata": "descriptors",
        "DataLoader worker (pid 7) is killed by signal: Bus error. Out of shared memory": "shared_memory",
        "DataLoader worker (pid 7) is killed by signal: Killed. ": "killed",
        "DataLoader worker (pid(s) 7) exited unexpectedly": "killed",
        "Can't pickle <function <lambda>>": "pickling",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory": "out_of_memory",
        "index 3 is out of bounds": "exception",
    }
    for words, cause in cases.items():
        assert causes.of_exception(RuntimeError(words))[0] == cause
