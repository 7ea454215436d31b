"""Every way a configuration can fail is a reported row within its time, and nothing is left behind."""

import contextlib
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import loader_subjects as subjects
import psutil
import pytest

from mbperf.loader import causes
from mbperf.loader.nursery import Nursery
from mbperf.loader.settings import Settings
from mbperf.loader.source import LoaderError, Source, source_of


def descriptors():
    return {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    }


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """Compare processes, descriptors, shared memory and temporary files before and after."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    fds, shared = descriptors(), set(os.listdir("/dev/shm"))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children]
    assert left == []
    assert descriptors().items() <= fds.items()  # the collector may close an earlier test's meanwhile
    ours = [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith(("torch_", "sem.mp-"))]
    assert ours == []
    assert list(folder.rglob("*")) == []
    folder.rmdir()


def born_here(dataset, **fixed):
    """Fork trials from this process: a twentieth of a second instead of seconds for importing torch."""
    return Source(live=dataset, fixed=fixed)


def trial(source, workers, limit_s=6.0, **knobs):
    settings = Settings(**({"batch_size": 16} | knobs)).with_workers(workers)
    with Nursery(source) as nursery:
        return run(nursery, settings, limit_s)


def run(nursery, settings, limit_s=6.0):
    job = {"job": "trial", "settings": settings.as_dict(), "seconds": 0.3, "seed": 3}
    return nursery.run(job, limit_s)


def test_a_killed_worker_is_a_row():
    answer = trial(born_here(subjects.KilledWorker(), shuffle=False), 2)
    assert answer["cause"] == "killed"
    assert "a worker died" in answer["infeasible"]


def test_a_killed_worker_is_out_of_memory_where_the_kernel_counted_one(monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr("mbperf.loader.nursery.oom_kills", lambda: next(counts))
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
from mbperf.loader.nursery import Nursery
from mbperf.loader.source import Source
from mbperf.loader.settings import Settings
from mbperf.loader import limits
import loader_subjects as subjects
settings = Settings(batch_size=8).with_workers(2)
print(limits.foreseen(settings, 8 * 3 * 2**20, 1))
with Nursery(Source(live=subjects.Large(), fixed={})) as nursery:
    print(nursery.run({"job": "trial", "settings": settings.as_dict(), "seconds": 0.3, "seed": 0}, 6.0))
"""
    out = in_namespace(code, "mount -t tmpfs -o size=16m tmpfs /dev/shm")
    assert "needs up to" in out
    assert "'cause': 'shared_memory'" in out


def in_namespace(code, prepare):
    """Run Python code in a mount namespace of its own, or skip where that is not permitted."""
    import subprocess
    import sys

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
    with Nursery(source) as nursery:
        assert "infeasible" not in run(nursery, Settings(batch_size=16).with_workers(1))
        answer = run(nursery, Settings(batch_size=16, multiprocessing_context="spawn").with_workers(1))
    assert answer["cause"] == "pickling"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_getitem_names_the_index(workers):
    answer = trial(born_here(subjects.Raises()), workers)
    assert answer == {"infeasible": "dataset[77] raises ValueError: broken sample", "cause": "exception"}


def test_a_hanging_getitem_ends_in_time_and_says_where():
    began = time.monotonic()
    answer = trial(born_here(subjects.Hangs(), shuffle=False), 2, limit_s=1.5)
    assert time.monotonic() - began < 4.5
    assert answer["cause"] == "timeout"
    assert "loader_subjects.py" in answer["infeasible"]
    assert "in access" in answer["infeasible"] or "in __getitem__" in answer["infeasible"]


def test_a_probe_that_hangs_names_the_index():
    with Nursery(born_here(subjects.Hangs(), shuffle=False)) as nursery:
        job = {"job": "probe", "settings": Settings().as_dict(), "seconds": 1.0, "seed": 0}
        answer = nursery.run(job, 1.0)
    assert answer["failures"][0][0] == 77
    assert "still running" in answer["failures"][0][1]


def test_a_trial_that_ignores_its_alarm_is_killed(monkeypatch):
    """Code that blocks SIGALRM stands for a hang in C."""

    class Deaf(subjects.Base):
        def access(self, index):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)

    with Nursery(born_here(Deaf())) as nursery:
        answer = run(nursery, Settings(batch_size=4), limit_s=0.5)
        assert answer["cause"] == "timeout"
        probe = {"job": "probe", "settings": Settings().as_dict(), "seconds": 1.0, "seed": 0}
        assert "was still running" in nursery.run(probe, 0.5)["infeasible"]


def test_a_trial_killed_from_outside_leaves_a_nursery_that_works():
    class Suicidal(subjects.Base):
        def access(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with Nursery(born_here(Suicidal())) as nursery:
        for _ in range(2):
            answer = run(nursery, Settings(batch_size=4))
            assert answer["cause"] in ("killed", "out_of_memory")
            assert "SIGKILL" in answer["infeasible"]


def test_the_process_that_trials_fork_from_may_die_too():
    with Nursery(born_here(subjects.Sleeps())) as nursery:
        os.kill(nursery._zygote, signal.SIGKILL)
        assert "infeasible" in run(nursery, Settings(batch_size=4))
        assert run(nursery, Settings(batch_size=4))["samples"] > 0


def test_grandchildren_are_ended_too():
    class StartsProcesses(subjects.Base):
        def access(self, index):
            import subprocess

            if index == 3:
                subprocess.Popen(["sleep", "3600"], start_new_session=True)

    with Nursery(born_here(StartsProcesses(40), shuffle=False)) as nursery:
        assert run(nursery, Settings(batch_size=4))["samples"] > 0
        assert not [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]


def test_an_empty_epoch_is_one_clear_error():
    answer = trial(born_here(subjects.Base(5), drop_last=True), 0)
    assert "yields no batch" in answer["infeasible"]


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
    with pytest.raises(LoaderError, match=r"FileNotFoundError: no such data \(loader_subjects.py:\d+\)"):
        Nursery(source_of("loader_subjects:failing_factory", {})).__enter__()


def test_bad_import_paths_are_errors_in_words():
    for path in ("loader_subjects", "loader_subjects:nothing", "no.such.module:x"):
        with pytest.raises(LoaderError, match="cannot be made"), Nursery(source_of(path, {})):
            pass


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


def test_the_users_own_semaphores_survive():
    """Forked trials inherit our named semaphore's mapping; cleaning up must not remove its file."""
    import multiprocessing

    lock = multiprocessing.get_context("spawn").Lock()
    name = Path("/dev/shm/sem." + lock._semlock.name.lstrip("/"))
    with Nursery(born_here(subjects.Hangs(), shuffle=False)) as nursery:
        run(nursery, Settings(batch_size=16).with_workers(1), limit_s=0.5)
    exists = name.exists()
    del lock
    with contextlib.suppress(FileNotFoundError):
        name.unlink()
    stop_resource_tracker()
    assert exists


def stop_resource_tracker():
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()
