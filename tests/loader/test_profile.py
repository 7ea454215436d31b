"""The profiler as a whole: answers on datasets of known cost, in its time, leaving everything as found."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import subjects
import torch
from retrying import retried, with_enough_time
from torch.utils.data import DataLoader

from mbperf.loader import LoaderError, Profile, Settings, profile
from mbperf.loader.profiler import doubt_for_lack_of_time
from mbperf.loader.records import Trial
from mbperf.loader.search.candidates import Candidates
from mbperf.loader.search.model import Consumer, Model
from mbperf.loader.search.sweep import Budget, Sweep
from mbperf.loader.trial.probe import Costs

MODEL = Model(Costs(getitem_s=0.002, batch_size=64, samples=9), cpus=2)  # 2 ms of waiting a sample
TESTS = Path(__file__).parent
pytestmark = [pytest.mark.timed, pytest.mark.filterwarnings("ignore:This DataLoader will create")]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def made_in_time(dataset, **known):
    """Profile in a fresh process; no answer where importing torch there took most of the budget."""
    try:
        return profile(dataset, **known)
    except LoaderError as error:
        if "took longer than" not in str(error):
            raise
        return Profile()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    gc.collect()  # what earlier tests left to the collector goes now, not in between
    children, fds = set(psutil.Process().children(recursive=True)), descriptors()
    yield
    assert set(psutil.Process().children(recursive=True)) == children
    assert descriptors() == fds


@retried
def test_waiting_profits_from_workers_and_everything_is_left_as_found():
    loader = DataLoader(subjects.Sleeps(2000, 0.005), batch_size=16, num_workers=1, persistent_workers=True)
    next(iter(loader))  # the user's own workers live on
    live, states = loader._iterator, (random.getstate(), torch.get_rng_state().tolist())

    def run(seconds):
        began = time.monotonic()
        answer = made_in_time(loader, workers=[0, 6], prefetch=[2], in_order=[True], budget_s=seconds)
        assert time.monotonic() - began < 1.1 * seconds
        return answer

    def told(answer):  # for the instrumented run, the last of all, there has to be time
        return answer.exit_code == 0 and "getitem_s" in answer.stages and len(answer.configurations) > 2

    answer = with_enough_time(run, told, limits_s=(10, 30))
    assert loader._iterator is live
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    loader._iterator = live = None
    assert answer.recommendation["num_workers"] == 6
    assert answer.recommendation["batch_size"] == 16
    assert answer.exit_code == 0
    assert 0.7 * 6 / 0.0055 < answer.rate_samples_per_s < 6 / 0.005
    tried = {trial.settings.num_workers for trial in answer.trials}
    assert tried == {0, 1, 6}  # the user's own 1 included
    check_report(answer)


def check_report(answer):
    """Everything LOADER.md lists is there, and JSON takes it."""
    data = json.loads(json.dumps(answer.as_dict()))
    for key in ("verdict", "recommendation", "confidence", "rate_samples_per_s", "first_batch_s", "trials"):
        assert data[key], key
    assert data["rate_interval"][0] < data["rate_samples_per_s"] < data["rate_interval"][1]
    ran = [trial for trial in data["trials"] if not trial["infeasible"]]
    assert all(trial["wait_p50_s"] <= trial["wait_p95_s"] <= trial["wait_p99_s"] for trial in ran)
    stages = data["stages"]
    assert "getitem_s" in stages
    assert 0.005 < stages["getitem_s"] < 0.015
    assert stages["collate_s"] > 0
    assert len(stages["busy_share"]) == answer.recommendation["num_workers"]
    assert stages["memory"]["uss_bytes"] <= stages["memory"]["pss_bytes"]
    assert stages["first_batch"]["total_s"] > 0
    assert len(stages["slowest"]) == 10


@retried
def test_tensors_in_memory_want_no_workers(born_here):
    """Handing a batch of four over takes ten times as long as making it, however the cores are shared."""
    answer = with_enough_time(
        lambda seconds: profile(subjects.small_tensors(), batch_size=4, budget_s=seconds, workers=[0, 1, 2]),
        lambda answer: answer.exit_code == 0 and {0, 2} <= plain_rates(answer).keys(),
        limits_s=(3, 12, 36),
    )
    assert answer.exit_code == 0, answer.confidence_words
    assert answer.recommendation["num_workers"] == 0
    rates = plain_rates(answer)
    assert rates[0] > rates[2]


def plain_rates(answer):
    """Return the rate of what DataLoader does by default, by the number of workers."""
    return {
        t.settings.num_workers: t.rate_samples_per_s
        for t in answer.trials
        if t.settings == Settings(batch_size=t.settings.batch_size).with_workers(t.settings.num_workers)
    }


@retried
def test_a_step_time_gives_an_idle_share(born_here):
    """Loading takes 66 ms a batch, a step 120: without workers a third of the time is idle, with two nothing.

    Two load a batch in 33 ms, so a machine of which others use most still does in 120; to be called compute-
    bound the consumer may wait 6 ms a step, more than a busy machine takes to hand a batch over.
    """
    answer = with_enough_time(
        lambda seconds: profile(subjects.sleeps, budget_s=seconds, workers=[0, 2], batch_size=32,
                                step_time_s=0.12, prefetch=[2], in_order=[True]),
        lambda answer: answer.idle_measured is not None,
        limits_s=(6, 18),
    )  # fmt: skip
    assert answer.recommendation["num_workers"] == 2
    assert answer.bound == "compute"
    assert answer.idle_from_rate < 0.05
    assert answer.idle_measured < 0.05
    without = next(row for row in answer.configurations if row["settings"]["num_workers"] == 0)
    assert without["idle_fraction"] == pytest.approx(0.066 / 0.186, abs=0.1)


@retried
def test_the_users_own_step_is_timed(born_here):
    answer = profile(
        subjects.Sleeps(500, 0.001), budget_s=3, workers=[0, 2], batch_size=8, step=subjects.step
    )
    assert answer.step_time_s == pytest.approx(0.004, rel=0.2)


def test_a_dataset_that_raises_is_one_clear_error(born_here):
    answer = profile(subjects.Raises(300), budget_s=8)
    assert answer.exit_code == 3
    assert answer.verdict == "Infeasible: dataset[77] raises ValueError: broken sample"
    assert answer.spent_s < 8


@retried
def test_a_dataset_that_hangs_is_one_clear_error_in_time(born_here):
    answer = profile(subjects.AlwaysHangs(), budget_s=3)
    assert answer.exit_code == 3
    assert "still running" in answer.verdict
    assert answer.spent_s < 3.3


def test_a_failing_configuration_is_a_row_and_the_sweep_goes_on(born_here):
    answer = with_enough_time(
        lambda seconds: profile(subjects.KilledWorker(2000), budget_s=seconds, workers=[0, 2], shuffle=False),
        lambda answer: answer.recommended and any(t.infeasible for t in answer.trials),
        limits_s=(4, 12, 36),
    )
    assert answer.recommendation["num_workers"] == 0
    assert {t.settings.num_workers: t.cause for t in answer.trials if t.infeasible} == {2: "killed"}


def test_an_interrupted_sweep_says_what_it_did_not_try(born_here):
    def interrupt(event, payload):
        if event == "result":
            raise KeyboardInterrupt

    answer = profile(
        subjects.Sleeps(), budget_s=20, workers=[0, 2, 8], collates=["torch"], on_event=interrupt
    )
    assert answer.interrupted
    assert len(answer.trials) == 1
    left = {0, 2, 8} - {answer.trials[0].settings.num_workers}
    assert {row["settings"]["num_workers"] for row in answer.not_tried} == left
    assert answer.confidence <= 0.3  # eight workers on what waits are predicted to be far better
    assert "no time to try 8 workers" in answer.confidence_words


@pytest.mark.parametrize("had", ["no trial", "a trial cut short"])
def test_lack_of_time_is_lack_of_confidence(had):
    untried, consumer = Settings().with_workers(6), Consumer()
    candidates = Candidates(consumer)
    answer = Profile(recommended=Settings().with_workers(2), recommendation={}, confidence=0.99)
    if had == "no trial":
        answer.not_tried = [{"label": "6 workers", "settings": untried.as_dict()}]
    else:
        candidates.add(Trial(untried, infeasible="no answer within 1 s", cause="timeout"))
    known = {"consumer": consumer, "model": MODEL, "candidates": candidates,
             "cut_short": list(candidates.by_settings)}  # fmt: skip
    doubt_for_lack_of_time(answer, type("Sweep", (), known)())
    assert answer.exit_code == 4
    assert "no time to try 6 workers, batch 64, predicted 3.00 times as fast" in answer.confidence_words


@pytest.mark.parametrize(("budget_s", "too_little"), [(4.0, True), (60.0, False)])
def test_a_late_trial_says_little_where_it_had_little_time(budget_s, too_little):
    """Of four seconds a trial gets less than three, in which a busy machine may not begin one."""
    late = {"run": lambda self, job, limit_s: {"infeasible": "no answer", "cause": "timeout"},
            "subject": {"has_step": False}}  # fmt: skip
    runner = type("Late", (), late)()
    sweep = Sweep(runner, Consumer(), Budget(budget_s), 0.03, 0, lambda event, payload: None)
    sweep.model = MODEL
    sweep.try_one(Settings().with_workers(6), 0.25)
    assert sweep.cut_short == ([Settings().with_workers(6)] if too_little else [])


def test_a_factory_of_a_subclass_given_by_path():
    answer = with_enough_time(
        lambda seconds: made_in_time("subjects:ready_loader", budget_s=seconds, workers=[0, 2]),
        lambda answer: answer.recommended is not None,
        limits_s=(5, 20, 60),
    )
    assert answer.subject["loader_class"] == "MyLoader"
    assert answer.recommendation["batch_size"] == 16
    assert any("mbperf.collate" in note for note in answer.notes)  # it would not make the same batch


@pytest.mark.parametrize("dataset", [subjects.Sharded(), subjects.Base(3)])
def test_endless_and_tiny_datasets_get_an_answer(born_here, dataset):
    def run(seconds):
        answer = profile(dataset, budget_s=seconds, workers=[0, 1])
        assert answer.spent_s < 1.1 * seconds
        return answer

    answer = retried(with_enough_time)(run, lambda answer: answer.recommended, limits_s=(3, 12))
    assert answer.recommendation is not None


def test_bad_arguments_are_named():
    for wrong in ({"budget_s": 1}, {"tolerance": 2}, {"step_time_s": -1}):
        with pytest.raises(ValueError, match=f"profile: {next(iter(wrong))}"):
            profile(subjects.Base(), **wrong)
    with pytest.raises(LoaderError, match="TypeError: profile: dataset must be"):
        profile(3)


SCRIPT = """
import sys, time, torch
from mbperf.loader import profile
class Mine(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index):
        time.sleep(0.001)
        return index
{guard}
    tell = lambda event, payload: print(event, flush=True)
    answer = profile(Mine(), budget_s=30, workers=[0, 2], on_event=tell)
    print(answer.interrupted, answer.recommendation)
"""


def script(tmp_path, guard):
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
    return subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=heed_interrupts)  # fmt: skip


def heed_interrupts():
    """Undo what a shell does to what it runs in the background: such a process would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_gives_the_best_so_far_and_leaves_nothing_running(tmp_path):
    process = script(tmp_path, 'if __name__ == "__main__":')
    lines = iter(process.stdout.readline, "")
    assert "result\n" in lines, process.stderr.read()
    session = {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    assert session
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1].startswith("True {'batch_size': 64"), err
    assert not [pid for pid in session if psutil.pid_exists(pid)]


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    process = script(tmp_path, "if True:")
    _, err = process.communicate(timeout=120)
    assert 'put the call under if __name__ == "__main__"' in err
    assert process.returncode == 1


def test_settings_are_plain_data():
    assert Settings(**Settings(num_workers=2, prefetch_factor=4).as_dict()).prefetched_batches == 8
