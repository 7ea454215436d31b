"""Whatever dies or is left running, the next trial works and nothing stays behind."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
import subjects
from single_trials import born_here, nothing_left_behind, run  # noqa: F401  the fixture is used

from mbperf.loader.processes import cleanup
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.settings import Settings


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


def test_a_trial_killed_from_outside_leaves_a_runner_that_works():
    class Suicidal(subjects.Base):
        def access(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with TrialRunner(born_here(Suicidal())) as runner:
        for _ in range(2):
            answer = run(runner, Settings(batch_size=4))
            assert answer["cause"] in ("killed", "out_of_memory")
            assert "SIGKILL" in answer["infeasible"]


def test_the_process_that_trials_fork_from_may_die_too():
    with TrialRunner(born_here(subjects.Sleeps())) as runner:
        os.kill(runner._server, signal.SIGKILL)
        assert "infeasible" in run(runner, Settings(batch_size=4))
        assert run(runner, Settings(batch_size=4))["samples"] > 0


def test_grandchildren_are_ended_too():
    class StartsProcesses(subjects.Base):
        def access(self, index):
            if index == 3 and not hasattr(self, "started"):
                self.started = True
                subprocess.Popen(["sleep", "3600"], start_new_session=True)

    with TrialRunner(born_here(StartsProcesses(40), shuffle=False)) as runner:
        assert run(runner, Settings(batch_size=4))["samples"] > 0
        assert not [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]


def test_the_users_own_semaphores_survive():
    """Forked trials inherit our named semaphore's mapping; cleaning up must not remove its file."""
    import multiprocessing

    lock = multiprocessing.get_context("spawn").Lock()
    name = Path("/dev/shm/sem." + lock._semlock.name.lstrip("/"))
    with TrialRunner(born_here(subjects.Hangs(), shuffle=False)) as runner:
        run(runner, Settings(batch_size=16).with_workers(1), limit_s=0.5)
    exists = name.exists()
    del lock
    with contextlib.suppress(FileNotFoundError):
        name.unlink()
    stop_resource_tracker()
    assert exists


def stop_resource_tracker():
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()
