"""Every way a configuration can fail is a reported row within its time, and nothing is left behind."""

import contextlib
import gc
import inspect
import multiprocessing.util
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import loader_subjects as subjects
import psutil
import pytest
import torch
from afresh import measured_afresh, with_enough_time

from mbperf.loader import causes, cleanup
from mbperf.loader.nursery import Nursery
from mbperf.loader.settings import Settings
from mbperf.loader.source import LoaderError, Source, source_of
from mbperf.loader.zygote import import_object


def descriptors():
    return {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    }


def new_shared_memory(before):
    """Return what torch or multiprocessing left; what a process elsewhere has mapped is not ours."""
    found = set()
    for _ in range(3):
        found = {n for n in set(os.listdir("/dev/shm")) - before if n.startswith(("torch_", "sem.mp-"))}
        if found:
            others = set(psutil.pids()) - {os.getpid()}
            found -= {Path(name).name for pid in others for name in cleanup.mapped_shared_memory(pid)}
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """Compare processes, descriptors, shared memory and temporary files before and after."""
    gc.collect()  # what earlier tests left to the collector goes now, not in between
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    fds, shared = descriptors(), set(os.listdir("/dev/shm"))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children]
    assert left == []
    assert descriptors().items() <= fds.items()  # what earlier tests held may be collected in between
    assert new_shared_memory(shared) == set()
    assert list(folder.rglob("*")) == []
    folder.rmdir()


def born_here(dataset, **fixed):
    """Fork trials from this process: a twentieth of a second instead of seconds for importing torch."""
    return Source(live=dataset, fixed=fixed)


def trial(source, workers, limit_s=20.0, **knobs):
    settings = Settings(**({"batch_size": 16} | knobs)).with_workers(workers)
    with Nursery(source) as nursery:
        return run(nursery, settings, limit_s)


def run(nursery, settings, limit_s=20.0):
    job = {"job": "trial", "settings": settings.as_dict(), "seconds": 0.1, "seed": 3}
    return nursery.run(job, limit_s)


def probe(nursery, limit_s):
    job = {"job": "probe", "settings": Settings().as_dict(), "seconds": 1.0, "seed": 0}
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
    print(nursery.run({"job": "trial", "settings": settings.as_dict(), "seconds": 0.1, "seed": 0}, 20.0))
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
    with Nursery(source) as nursery:
        assert "infeasible" not in run(nursery, Settings(batch_size=16).with_workers(1))
        answer = run(nursery, Settings(batch_size=16, multiprocessing_context="spawn").with_workers(1))
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
    answer = trial(born_here(subjects.Raises()), workers)
    assert answer == {"infeasible": "dataset[77] raises ValueError: broken sample", "cause": "exception"}


@pytest.mark.parametrize(("workers", "who"), [(0, "it"), (2, "a worker")])
def test_a_hanging_getitem_ends_in_time_and_says_where(workers, who):
    source, took = born_here(subjects.Hangs(), shuffle=False), {}

    def hang(limit_s):
        began = time.monotonic()
        answer = trial(source, workers, limit_s)
        took[limit_s] = time.monotonic() - began
        return answer

    answer = with_enough_time(hang, lambda answer: "in access" in answer["infeasible"])
    assert answer["cause"] == "timeout"
    line = line_of(subjects.Hangs.access, "time.sleep(3600)")
    assert answer["infeasible"].endswith(f"{who} was at loader_subjects.py:{line} in access")
    assert all(spent < limit_s + 10 for limit_s, spent in took.items())  # torch alone would wait for ever


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("number", range(2))
def test_one_hanging_worker_of_many_is_found(number):
    """The others wait for work, and their stacks say nothing of the dataset's."""
    source = born_here(subjects.HangsInWorker(number=number), shuffle=False)
    answer = with_enough_time(
        lambda limit_s: trial(source, 3, limit_s), lambda answer: "in access" in answer["infeasible"]
    )
    assert answer["infeasible"].endswith("in access")


def test_workers_that_never_get_to_work_are_still_starting():
    """What keeps these from their loop is no code of the dataset's."""

    class Hour(float):
        """A number that can be weakly referenced."""

    class NeverStarts(subjects.Base):
        def __init__(self):
            super().__init__()
            self.hour = Hour(3600)
            multiprocessing.util.register_after_fork(self.hour, time.sleep)

    def run_it(limit_s):
        return trial(born_here(NeverStarts()), 2, limit_s)

    answer = with_enough_time(run_it, lambda answer: "starting" in answer["infeasible"])
    assert answer["cause"] == "timeout"
    assert answer["infeasible"].endswith("s; a worker was still starting")


def test_what_a_killed_process_made_in_shared_memory_is_removed():
    process = subprocess.Popen(["true"])
    process.wait()
    made = [Path(f"/dev/shm/torch_{pid}_1_1") for pid in (process.pid, os.getpid())]
    for path in made:
        path.touch()
    cleanup.remove_shared_memory_of({process.pid, os.getpid()})
    existing = [path.exists() for path in made]
    made[1].unlink()
    assert existing == [False, True]  # what the living still use stays


def test_a_probe_that_hangs_names_the_index():
    with Nursery(born_here(subjects.Hangs(), shuffle=False)) as nursery:
        answer = with_enough_time(
            lambda limit_s: probe(nursery, limit_s), lambda answer: answer.get("failures", [(0,)])[0][0] == 77
        )
    assert answer["failures"][0][0] == 77
    assert "still running" in answer["failures"][0][1]


def test_a_trial_that_ignores_its_alarm_is_killed():
    """Code that blocks SIGALRM stands for a hang in C."""

    class Deaf(subjects.Base):
        def access(self, index):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)

    with Nursery(born_here(Deaf())) as nursery:
        answer = run(nursery, Settings(batch_size=4), limit_s=0.3)
        assert answer["cause"] == "timeout"
        answer = with_enough_time(
            lambda limit_s: probe(nursery, limit_s),
            lambda answer: "was still running" in answer["infeasible"],
        )
        assert "was still running" in answer["infeasible"]


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
            if index == 3 and not hasattr(self, "started"):
                self.started = True
                subprocess.Popen(["sleep", "3600"], start_new_session=True)

    with Nursery(born_here(StartsProcesses(40), shuffle=False)) as nursery:
        assert run(nursery, Settings(batch_size=4))["samples"] > 0
        assert not [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]


def test_an_empty_epoch_is_one_clear_error():
    answer = trial(born_here(subjects.Base(5), drop_last=True), 0)
    assert "yields no batch" in answer["infeasible"]


@measured_afresh
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


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("loader_subjects", ValueError, "expected package.module:dataset, got 'loader_subjects'"),
        ("loader_subjects:nothing", AttributeError, "nothing"),
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
