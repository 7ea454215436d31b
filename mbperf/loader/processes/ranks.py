"""Trials of several ranks at once: each has a runner of its own, in this process or in another of torchrun's.

The first rank decides what is tried. The others hear of it, and trials meet, through a store of
torch.distributed that the first rank keeps.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch import distributed as dist

from mbperf import processors
from mbperf.loader.processes.cleanup import KILL_WAIT_S
from mbperf.loader.processes.runner import HARD_GRACE_S, TrialRunner
from mbperf.loader.shard import Shard
from mbperf.loader.source import LoaderError, Source

LONGEST_PAUSE_S = 0.02
ANSWER_GRACE_S = HARD_GRACE_S + KILL_WAIT_S  # what a rank's own runner may need to end a trial
TOGETHER = ("trial", "examine", "step")  # what other ranks disturb; the rest tells the same of all


class Member(Protocol):
    """One rank's runner, on which machine, and the processors it may use."""

    subject: dict[str, Any]
    host: str
    cores: frozenset[int]

    def start(self) -> None: ...  # noqa: D102  as TrialRunner's
    def await_ready(self) -> None: ...  # noqa: D102
    def begin(self, job: dict[str, Any], limit_s: float) -> None: ...  # noqa: D102
    def finish(self) -> dict[str, Any]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class RanksRunner:
    """A TrialRunner of several ranks: an answer is the slowest rank's, with every rank's rate.

    Args:
        alone: the first rank's runner, in this process.
        others: those of the other ranks.
        store: where trials meet.
    """

    def __init__(self, alone: TrialRunner, others: Sequence[Member], store: dist.TCPStore):
        self.alone, self._members, self._store = alone, [alone, *others], store
        self._trials = 0
        self.subject: dict[str, Any] = {}

    @classmethod
    def here(cls, source: Source, ready_s: float, ranks: int) -> "RanksRunner":
        """Return one whose ranks are all started by this process."""
        runners = [TrialRunner(source, ready_s, Shard(rank, ranks)) for rank in range(ranks)]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return cls(runners[0], runners[1:], store)

    @classmethod
    def in_world(cls, source: Source, ready_s: float) -> "RanksRunner":
        """Return that of torchrun's first rank; all others have to `follow`."""
        meeting, shard = meet()
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
        meeting.set("mbperf/port", str(store.port))
        others = [RemoteRunner(store, rank, ready_s) for rank in range(1, shard.ranks)]
        return cls(TrialRunner(source, ready_s, shard), others, store)

    def __enter__(self) -> "RanksRunner":
        """Make the dataset in each rank, all at once."""
        try:
            self._ready()
        except BaseException:
            self.close()
            raise
        self.subject = self.alone.subject
        return self

    def __exit__(self, *exception: object) -> None:
        """End everything."""
        self.close()

    @property
    def at_once(self) -> int:
        """Ranks whose trials run at the same time."""
        return len(self._members)

    @property
    def neighbours(self) -> list[Member]:
        """The ranks on the first one's machine, itself included."""
        return [member for member in self._members if member.host == self.alone.host]

    @property
    def cpus_of_all(self) -> float:
        """Processors of this machine that its ranks may use, all together."""
        quota = processors.quota()
        cores = float(len(frozenset().union(*(member.cores for member in self.neighbours))))
        return cores if quota is None else min(cores, quota)

    @property
    def cpus(self) -> float:
        """Processors that a rank's trial has for itself."""
        return self.cpus_of_all / len(self.neighbours)

    def run(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run a job in the first rank, or in all at once what they would disturb each other in."""
        if job["job"] not in TOGETHER:
            return self.alone.run(job, limit_s)
        return combined(job["job"], self.run_each(job, limit_s))

    def run_each(self, job: dict[str, Any], limit_s: float) -> list[dict[str, Any]]:
        """Run a job in every rank at once, and return what each answers."""
        self._ready()
        if job["job"] == "trial":
            self._trials += 1
            job = job | {"gate": (self._store.host, self._store.port, f"trial{self._trials}")}
        for member in self._members:
            member.begin(job, limit_s)
        return [member.finish() for member in self._members]

    def close(self) -> None:
        """End every rank's processes."""
        for member in self._members:
            member.close()

    def _ready(self) -> None:
        for member in self._members:
            member.start()
        for member in self._members:
            member.await_ready()


def combined(kind: str, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the one answer of all ranks: the slowest's; of an instrumented run the first's."""
    if kind == "examine":
        return answers[0]
    if (failed := failed_of(answers)) is not None:
        return failed
    return slowest_trial(answers) if kind == "trial" else max(answers, key=lambda answer: answer["step_s"])


def failed_of(answers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what went wrong, with the rank; that a rank was late says less than any other reason."""
    failed = [
        answer | {"infeasible": f"rank {rank}: {answer['infeasible']}"}
        for rank, answer in enumerate(answers)
        if "infeasible" in answer
    ]
    return min(failed, key=lambda answer: answer["cause"] == "timeout", default=None)


def slowest_trial(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the slowest rank's figures, with the rate of each and the last one's first batches."""
    rates = [answer["samples"] / answer["seconds"] if answer["seconds"] else 0.0 for answer in answers]
    slowest = answers[rates.index(min(rates))]
    later = [a["later_first_batch_s"] for a in answers if a["later_first_batch_s"] is not None]
    return slowest | {
        "rank_rates": rates,
        "first_batch_s": max(answer["first_batch_s"] for answer in answers),
        "later_first_batch_s": max(later, default=None),
    }


class RemoteRunner:
    """What the first rank holds in place of another process's runner.

    Args:
        store: both sides read and write it.
        rank: whose runner it is.
        ready_s: how long making the dataset may take there.
    """

    def __init__(self, store: dist.TCPStore, rank: int, ready_s: float):
        self._store, self._rank, self._jobs = store, rank, 0
        self._ready_until = time.monotonic() + ready_s + KILL_WAIT_S
        self._deadline = 0.0
        self.subject: dict[str, Any] = {}
        self.host, self.cores = "", frozenset[int]()

    def start(self) -> None:
        """Do nothing: the rank starts its process itself."""

    def await_ready(self) -> None:
        """Wait until the rank has made the dataset.

        Raises:
            LoaderError: it could not, or did not in time.
        """
        if self.subject:
            return
        told = received(self._store, f"ready/{self._rank}", self._ready_until)
        if told is None or "failed" in told:
            raise LoaderError(f"rank {self._rank}: {told['failed'] if told else 'it does not answer'}")
        self.subject, self.host, self.cores = told["subject"], told["host"], frozenset(told["cores"])

    def begin(self, job: dict[str, Any], limit_s: float) -> None:
        """Tell the rank what to do."""
        self._jobs += 1
        self._deadline = time.monotonic() + limit_s + ANSWER_GRACE_S
        self._store.set(f"job/{self._rank}/{self._jobs}", json.dumps([job, limit_s]))

    def finish(self) -> dict[str, Any]:
        """Return its answer."""
        answer = received(self._store, f"answer/{self._rank}/{self._jobs}", self._deadline)
        return answer or {"infeasible": "it does not answer", "cause": "timeout"}

    def close(self) -> None:
        """Tell the rank that this was all."""
        self._store.set(f"job/{self._rank}/{self._jobs + 1}", json.dumps(None))


def received(store: dist.Store, key: str, until_s: float) -> Any:
    """Return what another rank has put under a key, or None where it did not come in time."""
    pause_s = 1e-3
    # Asked again and again: a wait inside the store cannot be interrupted, and prints when it is over.
    while not store.check([key]):
        if time.monotonic() > until_s:
            return None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return json.loads(store.get(key))


def meet() -> tuple[dist.Store, Shard]:
    """Return the store that torchrun's ranks have in common, and which of them this is."""
    store, rank, ranks = next(iter(dist.rendezvous("env://")))
    return store, Shard(rank, ranks)


def follow(source: Source, ready_s: float, forgotten_s: float) -> None:
    """Run what the first rank asks for, in any other of torchrun's, until it is through or gone.

    Args:
        source: the dataset, as the first rank has it.
        ready_s: how long making it may take.
        forgotten_s: how long to wait for the next job.
    """
    meeting, shard = meet()
    port = received(meeting, "mbperf/port", time.monotonic() + forgotten_s)
    if port is None:
        return
    with contextlib.suppress(dist.DistNetworkError):  # the first rank has ended, with all that it knew
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)
        try:
            with TrialRunner(source, ready_s, shard) as runner:
                told = {"subject": runner.subject, "host": runner.host, "cores": sorted(runner.cores)}
                store.set(f"ready/{shard.rank}", json.dumps(told))
                _obey(runner, store, shard.rank, forgotten_s)
        except LoaderError as error:
            store.set(f"ready/{shard.rank}", json.dumps({"failed": str(error)}))


def _obey(runner: TrialRunner, store: dist.TCPStore, rank: int, forgotten_s: float) -> None:
    for number in itertools.count(1):
        order = received(store, f"job/{rank}/{number}", time.monotonic() + forgotten_s)
        if order is None:
            return
        store.set(f"answer/{rank}/{number}", json.dumps(runner.run(*order)))
