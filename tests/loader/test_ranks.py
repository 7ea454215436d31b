"""Several ranks at once: shares, trials in step, answers of the slowest, nothing that waits without end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import subjects
from click.testing import CliRunner
from retrying import retried, with_enough_time
from single_trials import born_here, nothing_left_behind, run  # noqa: F401  the fixture is used
from test_candidates import W, candidates_of, trial
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from mbperf.loader import profile
from mbperf.loader.command import loader
from mbperf.loader.output import ranks as of_ranks
from mbperf.loader.processes.jobs import seed_everything
from mbperf.loader.processes.ranks import RanksRunner, RemoteRunner, failed_of, slowest_trial
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.records import Profile
from mbperf.loader.search import limits
from mbperf.loader.settings import Settings
from mbperf.loader.shard import Shard
from mbperf.loader.source import LoaderError, Source
from mbperf.loader.subject import fixed_words, resolve
from mbperf.loader.trial.gate import Gate
from mbperf.loader.trial.time_loader import TrialInterrupted

pytestmark = pytest.mark.timed

LIMIT_S = 20.0


def indices_of(obj, ranks, **fixed):
    """Return the indices that each rank's loader reads."""
    found = []
    for rank in range(ranks):
        seed_everything(5)
        made = resolve(obj, shard=Shard(rank, ranks), **fixed).make(Settings(batch_size=4))
        found.append([int(index) for _, batch in made for index in batch])
    return found


class Batches(BatchSampler):
    """A user's own batches."""


SAMPLERS = {
    "default": lambda data: DataLoader(data, batch_size=4),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "own": lambda data: DataLoader(data, batch_size=4, sampler=list(range(24))),
    "batches": lambda data: DataLoader(data, batch_sampler=Batches(SequentialSampler(data), 4, False)),
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_ranks_share_the_samples_of_a_loader(make, ranks):
    each = indices_of(make(subjects.Base(24)), ranks)
    assert sorted(index for indices in each for index in indices) == list(range(24))
    assert len({len(indices) for indices in each}) == 1


def test_a_dataset_is_shared_by_a_distributed_sampler_in_another_order_each_trial():
    data = subjects.Base(24)
    each = indices_of(data, 3)
    assert sorted(index for indices in each for index in indices) == list(range(24))
    made = resolve(data, shard=Shard(2, 3)).make(Settings())
    assert type(made.sampler) is DistributedSampler
    orders = []
    for seed in (1, 2):
        seed_everything(seed)
        orders.append(list(resolve(data, shard=Shard(0, 2)).make(Settings()).sampler))
    assert orders[0] != orders[1]
    assert indices_of(data, 2, shuffle=False) == [list(range(0, 24, 2)), list(range(1, 24, 2))]


def test_a_sampler_that_knows_of_ranks_is_kept():
    class Own(DistributedSampler):
        pass

    data = subjects.Base(24)
    own = Own(data, num_replicas=2, rank=1)
    subject = resolve(DataLoader(data, sampler=own), shard=Shard(1, 2))
    assert subject.make(Settings()).sampler is own
    # One that was made for the first rank and copied to all would have all read the same.
    copied = DataLoader(data, sampler=DistributedSampler(data, 2, 0, shuffle=False))
    assert list(resolve(copied, shard=Shard(1, 2)).make(Settings()).sampler) == list(range(1, 24, 2))


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (subjects.Base(), ["sampler=DistributedSampler(dataset)"]),
        (DataLoader(subjects.Base()), ["sampler=DistributedSampler(dataset, shuffle=False)"]),
        (DataLoader(subjects.Base(), shuffle=True), ["sampler=DistributedSampler(dataset)"]),
        (DataLoader(subjects.Base(), sampler=WeightedRandomSampler([1.0], 9)), ["sampler=your_sampler"]),
        (subjects.Counting(), []),
    ],
)
def test_the_call_to_paste_shares_too(obj, words):
    assert fixed_words(resolve(obj, shard=Shard(0, 2))) == words


def test_a_sampler_that_repeats_samples_is_not_replaced():
    data = subjects.Base(24)
    sampler = RandomSampler(data, replacement=True, num_samples=10)
    each = [len(resolve(DataLoader(data, sampler=sampler), shard=Shard(r, 3)).make(Settings()).sampler)
            for r in range(3)]  # fmt: skip
    assert each == [4, 3, 3]


def new_store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(scope="module", autouse=True)
def _what_the_first_store_opens_stays():
    """A descriptor or two of torch's, once a process: no leak of the test that comes first."""
    new_store()


def take_part(where, late_s, timed_s, seen):
    """Come late to a trial of two ranks, be timed, and load on; note what happened when."""

    def batches():
        while True:
            seen["loads"] = seen.get("loads", 0) + 1
            time.sleep(0.01)
            yield seen

    with Gate(where, 2) as gate:
        time.sleep(late_s)
        gate.arrive()
        seen["began"] = time.monotonic()
        time.sleep(timed_s)
        gate.load_on(None, batches())
        seen["ended"] = time.monotonic()


def test_trials_begin_together_and_load_until_all_are_timed():
    store = new_store()
    first, second = {}, {}
    where = (store.host, store.port, "x")
    threads = [
        threading.Thread(target=take_part, args=(where, *its)) for its in ((0, 0, first), (0.3, 0.3, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert abs(first["began"] - second["began"]) < 0.2
    assert first["loads"] > 0
    assert first["ended"] - first["began"] > 0.25


class Short:
    """A loader of one batch; when its third epoch begins, the other rank has been timed."""

    def __init__(self, store):
        self.store, self.epochs = store, 0

    def __iter__(self):
        self.epochs += 1
        if self.epochs == 3:
            self.store.add("x/timed", 1)
        return iter([1])


def test_an_epoch_that_ends_is_followed_by_another():
    store = new_store()
    loader = Short(store)
    with Gate((store.host, store.port, "x"), 2) as gate:
        gate.load_on(loader, iter([]))
    assert loader.epochs == 3


def test_a_rank_that_fails_lets_the_others_through():
    store = new_store()
    where = (store.host, store.port, "x")
    with pytest.raises(ZeroDivisionError), Gate(where, 2):
        1 / 0  # noqa: B018
    with Gate(where, 2) as gate:
        gate.arrive()
        gate.load_on(None, iter([]))


def test_the_alarm_of_a_trial_ends_its_waiting():
    store = new_store()

    def ring(number, frame):
        raise TrialInterrupted("over")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with Gate((store.host, store.port, "x"), 2) as gate:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TrialInterrupted):
                gate.arrive()
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            gate.load_on([1], iter([1]))  # what was timed before stands
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class SlowInRankOne(subjects.Base):
    """Samples wait, in rank 1 four times as long; says which rank it is by environment and torch."""

    def access(self, index):
        assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
        assert dist.get_rank() == int(os.environ["RANK"])
        time.sleep(0.008 if dist.get_rank() == 1 else 0.002)


@retried
def test_a_trial_of_all_ranks_is_as_slow_as_the_slowest():
    with RanksRunner.here(born_here(SlowInRankOne()), LIMIT_S, 2) as runner:
        assert runner.subject["length"] == 1000
        answer = run(runner, Settings(batch_size=4))
        alone = run(runner.alone, Settings(batch_size=4))
    first, second = answer["rank_rates"]
    assert answer["samples"] / answer["seconds"] == second
    assert second < 1 / 0.008
    assert first > 2 * second
    assert alone["samples"] / alone["seconds"] > 2 * second
    assert "rank_rates" not in alone


class FailsInRankOne(subjects.Base):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def access(self, index):
        if dist.get_rank() == 1:
            self.how()


def _raise():
    raise ValueError("broken")


FAULTS = {
    "raises": (_raise, "exception"),
    "dies": (partial(os._exit, 3), "killed"),
    "hangs": (partial(time.sleep, 3600), "timeout"),
}


@pytest.mark.parametrize(("how", "cause"), FAULTS.values(), ids=FAULTS.keys())
def test_what_goes_wrong_in_one_rank_is_said_with_its_number_and_the_next_trial_runs(how, cause):
    with RanksRunner.here(born_here(FailsInRankOne(how)), LIMIT_S, 2) as runner:
        began = time.monotonic()
        answer = run(runner, Settings(batch_size=4), limit_s=2.0)
        assert time.monotonic() - began < LIMIT_S
        assert answer["infeasible"].startswith("rank 1: ")
        assert answer["cause"] == cause or (how is not _raise and cause == "killed")
        assert run(runner.alone, Settings(batch_size=4))["samples"] > 0


def test_another_reason_is_said_before_lateness():
    late, broken = {"infeasible": "late", "cause": "timeout"}, {"infeasible": "broken", "cause": "exception"}
    fine = {"samples": 10}
    assert failed_of([late, fine, broken])["infeasible"] == "rank 2: broken"
    assert failed_of([late, fine])["infeasible"] == "rank 0: late"
    assert failed_of([fine, fine]) is None


def test_the_slowest_decides_and_first_batches_are_the_last_ones():
    figures = {"seconds": 2.0, "first_batch_s": 0.5, "later_first_batch_s": None}
    answers = [figures | {"samples": 30, "first_batch_s": 0.7}, figures | {"samples": 20}]
    told = slowest_trial([*answers, figures | {"samples": 40, "later_first_batch_s": 0.1}])
    assert told == figures | {"samples": 20, "first_batch_s": 0.7, "later_first_batch_s": 0.1,
                              "rank_rates": [15.0, 10.0, 20.0]}  # fmt: skip


def test_shared_memory_is_foreseen_for_all_ranks(monkeypatch):
    monkeypatch.setattr(limits, "shared_memory_free", lambda: 1_000_000)
    settings = W(2)  # 2 workers x prefetch 2, and the one that is consumed: 5 batches
    assert limits.foreseen(settings, 150_000, 1) == {}
    words = limits.foreseen(settings, 150_000, 1, ranks=2)["shared memory"]
    assert words.startswith("needs up to 2 MB of shared memory (batch x prefetch x workers x ranks)")


def record_of(rates, chosen, alone, cpus=8.0, neighbours=4):
    candidates = candidates_of(rates)
    for candidate in candidates.by_settings.values():
        for its in candidate.trials:
            its.rank_rates = [its.rate_samples_per_s * share for share in (1.0, 1.1, 1.2, 1.3)]
    facts = {"ranks": 4, "on_this_machine": neighbours, "cpus": cpus}
    return facts | of_ranks.figures(candidates, candidates.by_settings[chosen], neighbours, cpus, alone)


def test_what_one_rank_alone_would_have_suggested_is_said_with_its_cost():
    record = record_of({W(0): 300, W(2): 1000, W(8): 700}, W(2), (W(8), 4000.0))
    assert record["workers_on_this_machine"] == 8
    assert not record["more_workers_than_cpus"]
    assert record["total_samples_per_s"] == pytest.approx(4.6 * record["slowest_samples_per_s"])
    together, alone = of_ranks.words(record)
    assert together.startswith("4 ranks at once: the slowest ")
    assert together.endswith("2 workers x 4 ranks = 8 on 8 processors.")
    assert "8 workers x 4 ranks = 32, more than the 8 processors; that gives 0.7" in alone
    assert alone.startswith("One rank alone would have suggested 8 workers, batch 64 (4")


def test_too_many_workers_and_the_same_suggestion_are_said():
    record = record_of({W(0): 300, W(3): 1000}, W(3), (W(3), 1500.0))
    assert record["more_workers_than_cpus"]
    together, alone = of_ranks.words(record)
    assert together.endswith("3 workers x 4 ranks = 12, more than the 8 processors.")
    assert alone == "One rank alone would have suggested the same."


def test_a_suggestion_that_cannot_run_in_all_ranks_or_had_no_time():
    assert "there was no time to try that" in of_ranks.words(record_of({W(0): 300}, W(0), (W(8), 4.0)))[1]
    candidates = candidates_of({W(0): 300})
    candidates.add(trial(W(8), 10, infeasible="rank 1: /dev/shm is full", cause="shared_memory"))
    for its in candidates.by_settings[W(0)].trials:
        its.rank_rates = [1.0, 1.0]
    record = of_ranks.figures(candidates, candidates.by_settings[W(0)], 2, 8.0, (W(8), 4.0))
    said = of_ranks.alone_words({"on_this_machine": 2, "cpus": 8.0}, record["alone"])
    assert said.endswith("which cannot run: rank 1: /dev/shm is full.")


def answered(dataset, seconds_of, **known):
    """Return a profile of two ranks that has an answer, given ever more time."""

    def attempt(budget_s):
        try:
            return profile(dataset, ranks=2, budget_s=budget_s, **known)
        except LoaderError:  # importing torch twice took the whole budget
            return Profile()

    return with_enough_time(attempt, seconds_of, limits_s=(8, 24, 72))


def test_the_whole_profile_of_two_ranks(born_here):
    answer = answered(subjects.Sleeps(2000, 0.002), lambda a: a.recommended and a.ranks.get("alone"),
                      workers=[0, 2], batch_size=16, prefetch=[2], in_order=[True])  # fmt: skip
    assert answer.recommendation["num_workers"] == 2
    assert "sampler=DistributedSampler(dataset)" in answer.call
    assert "num_workers=2 in each rank" in answer.verdict
    record = json.loads(json.dumps(answer.as_dict()))["ranks"]
    assert record["ranks"] == record["on_this_machine"] == 2
    assert record["workers_on_this_machine"] == 4
    assert record["more_workers_than_cpus"] == (record["cpus"] < 4)
    assert len(record["rates_samples_per_s"]) == 2
    assert record["alone"]["settings"]["num_workers"] in (0, 2)
    assert all(len(t.rank_rates) == 2 for t in answer.trials if not t.infeasible)


class SplitsItself(subjects.Counting):
    """A stream of which each rank yields its own part."""

    def __iter__(self):
        return iter(range(dist.get_rank(), 10**6, dist.get_world_size()))


@pytest.mark.parametrize(("stream", "same"), [(subjects.Counting(), True), (SplitsItself(), False)])
def test_a_stream_that_is_the_same_on_every_rank_is_a_trap(stream, same, born_here):
    def found(answer):
        return "same_stream_on_every_rank" in [finding["code"] for finding in answer.lint]

    answer = answered(stream, lambda a: a.recommended and found(a) == same,
                      workers=[0], prefetch=[2], in_order=[True])  # fmt: skip
    assert found(answer) == same


def test_ranks_must_be_positive():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        profile([1, 2], ranks=0)
    outcome = CliRunner().invoke(loader, ["a:b", "--ranks", "0"])
    assert outcome.exit_code == 2
    assert "--ranks" in outcome.stderr


def test_ranks_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = CliRunner().invoke(loader, ["a:b", "--ranks", "8"])
    assert outcome.exit_code == 2
    assert "--ranks 8, but torchrun has started 2" in " ".join(outcome.stderr.split())


def test_a_rank_elsewhere_that_does_not_answer_is_given_up(monkeypatch):
    store = new_store()
    remote = RemoteRunner(store, 1, ready_s=0.0)
    monkeypatch.setattr("mbperf.loader.processes.ranks.ANSWER_GRACE_S", 0.1)
    remote.begin({"job": "trial"}, 0.1)
    assert remote.finish() == {"infeasible": "it does not answer", "cause": "timeout"}
    remote._ready_until = time.monotonic()
    with pytest.raises(LoaderError, match="rank 1: it does not answer"):
        remote.await_ready()
    store.set("ready/1", json.dumps({"failed": "no such module"}))
    with pytest.raises(LoaderError, match="rank 1: no such module"):
        remote.await_ready()


def test_ranks_of_one_machine_share_its_processors(monkeypatch):
    store = new_store()
    monkeypatch.setattr("mbperf.processors.quota", lambda: None)
    alone = TrialRunner(Source(live=subjects.Base()))
    alone.host, alone.cores = "here", frozenset(range(8))
    others = [RemoteRunner(store, rank, 1.0) for rank in (1, 2, 3)]
    for other, host, cores in zip(others, ("here", "there", "there"), ((8, 9), (0,), (1,)), strict=True):
        other.host, other.cores = host, frozenset(cores)
    runner = RanksRunner(alone, others, store)
    assert (runner.at_once, len(runner.neighbours)) == (4, 2)
    assert (runner.cpus_of_all, runner.cpus) == (10.0, 5.0)
    monkeypatch.setattr("mbperf.processors.quota", lambda: 3.0)
    assert (runner.cpus_of_all, runner.cpus) == (3.0, 1.5)
    alone.close()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def under_torchrun(*arguments, limit_s=120.0):
    """Return output and exit status of `mbperf loader` in two ranks of torchrun, ended with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), "-m", "mbperf", "loader", *arguments]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, env=environment) as process:  # fmt: skip
        try:
            return (*process.communicate(timeout=limit_s), process.returncode)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_torchruns_ranks_are_taken_and_the_first_prints():
    def attempt(seconds):
        return under_torchrun("subjects:sleeps", "--workers", "0,2", "--budget", f"{seconds}s", "--json")

    out, err, _ = with_enough_time(attempt, lambda told: told[2] == 0, limits_s=(15, 45))
    data = json.loads(out)  # one object: one rank has printed
    assert data["ranks"]["ranks"] == 2, err
    assert data["recommendation"]["num_workers"] == 2
    assert all(len(t["rank_rates"]) == 2 for t in data["trials"] if not t["infeasible"])


def test_a_dataset_that_cannot_be_made_ends_all_of_torchruns_ranks():
    out, err, status = under_torchrun("no_such_module:dataset", "--budget", "30s")
    assert status != 0
    assert "No module named 'no_such_module'" in err
    assert out == ""
