"""A loader that hangs ends in its time, and the answer says where it stood."""

import inspect
import multiprocessing.util
import signal
import time

import pytest
import subjects
from retrying import with_enough_time
from single_trials import born_here, nothing_left_behind, probe, run, trial  # noqa: F401  the fixture is used

from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.settings import Settings

pytestmark = pytest.mark.timed


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
    assert answer["infeasible"].endswith(f"{who} was at subjects.py:{line} in access")
    assert all(spent < limit_s + 10 for limit_s, spent in took.items())  # torch alone would wait without end


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
    """No code of the dataset keeps these from their loop."""

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


def test_a_probe_that_hangs_names_the_index():
    with TrialRunner(born_here(subjects.Hangs(), shuffle=False)) as runner:
        answer = with_enough_time(
            lambda limit_s: probe(runner, limit_s), lambda answer: answer.get("failures", [(0,)])[0][0] == 77
        )
    assert answer["failures"][0][0] == 77
    assert "still running" in answer["failures"][0][1]


def test_a_trial_that_ignores_its_alarm_is_killed():
    """Code that blocks SIGALRM stands for a hang in C."""

    class Deaf(subjects.Base):
        def access(self, index):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)

    with TrialRunner(born_here(Deaf())) as runner:
        answer = run(runner, Settings(batch_size=4), limit_s=0.3)
        assert answer["cause"] == "timeout"
        answer = with_enough_time(
            lambda limit_s: probe(runner, limit_s),
            lambda answer: "was still running" in answer["infeasible"],
        )
        assert "was still running" in answer["infeasible"]
