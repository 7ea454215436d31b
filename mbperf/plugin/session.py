"""One run: which groups it measures, how long each may take, and what was found.

Before the first test, the contenders of each group are judged in a process of its own, and the group is then
measured in several fresh processes, spread over the run. The tests of its contenders replay their share.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from mbperf import processors
from mbperf.measure import fork, heap, machine
from mbperf.measure.figures import figures, paired_seconds, process_ratios, time_s
from mbperf.measure.group import Group, Judgement, Samples, extra_metrics, judge, measure
from mbperf.measure.rounds import Pace, Plan
from mbperf.measure.rows import mean_label, reference_of
from mbperf.measure.statistics import (
    LEAST_ROUNDS,
    Prior,
    ask_scipy_once,
    geometric_mean,
    geometric_mean_across,
    prior,
)


@dataclass(frozen=True)
class Profile:
    """How thorough a run is.

    Args:
        name: on the command line.
        budget_s: seconds for all groups together.
        processes: fresh processes of each group, in the state of the heap that its rows show.
        beside: how many of them are in the other state too, where the state makes a difference.
        min_rounds, max_rounds: of each process.
        patience_s: a process that has not had its least rounds by then makes do with fewer.
    """

    name: str
    budget_s: float
    processes: int
    beside: int
    min_rounds: int
    max_rounds: int
    patience_s: float = 10.0

    @property
    def is_baseline(self) -> bool:
        """Whether a later run may be compared with this one."""
        return self.name != "smoke"


# The default run is meant to end within 6 minutes, imports and tables included; two cores of Zen 4 take 7.
# Below 8 rounds in all there is no 99 % interval, so a smoke run says CANNOT TELL by design.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", budget_s=30, processes=1, beside=0, min_rounds=4, max_rounds=12),
        Profile("default", budget_s=300, processes=3, beside=1, min_rounds=3, max_rounds=100, patience_s=3),
        Profile("long", budget_s=900, processes=5, beside=5, min_rounds=8, max_rounds=100),
    )
}
LEAST_SHARE_S = 0.15  # of the rounds of a process: some 30 of calls of a millisecond, two in all of long ones
# Seconds of the judge, by the bytes that a group moves, on 2 cores of Zen 4. Only the proportions matter once
# the first groups are judged.
JUDGE_S, JUDGE_BYTES_PER_S = 0.1, 100e6
# A judge on one of two cores beside other work took 69 s; no group takes so long.
PROCESS_TIMEOUT_S = 300.0
# The judge compares on one thread, so that two of them keep two cores busy. Each holds up to 16 times what a
# call moves: input sets, their copies, references in float64.
JUDGES, JUDGE_COPIES = 2, 16
# In the fresh state torch has to be this much faster before rows show it: where both are alike, a run that
# shows the one could not be compared with a run that shows the other.
FASTER_WHEN_FRESH = 0.95

Announce = Callable[[Group, int, int, float], None]


@dataclass
class Session:
    """The state of one run.

    Args:
        profile: how thorough.
        groups: all groups this run will be asked for.
        announce: told group, number of the process, their count and about how many seconds are left.
    """

    profile: Profile
    groups: Sequence[Group]
    announce: Announce
    judged: dict[str, Judgement] = field(default_factory=dict)
    samples: dict[str, list[Samples]] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    process_s: dict[str, float] = field(default_factory=dict)  # of each group's last process
    share_of: dict[str, float] = field(default_factory=dict)  # its share of the budget in it
    large: set[str] = field(default_factory=set)  # groups whose freed blocks, kept, could fill the memory
    took_s: float = 0.0
    # Monotonic, and of the wall: what the budget promises is when the reader has the table.
    deadline: float = 0.0
    priors: dict[str, Prior] = field(default_factory=dict)

    def measure_all(self) -> None:
        """Judge all groups, then measure them in passes, each of all groups in an order of its own."""
        began = time.monotonic()
        groups = [group for group in self.groups if group.measured_by is None]
        ask_scipy_once(self.profile.max_rounds)
        with _nothing_to_collect():
            self._judge(groups)
            for number in range(self.profile.processes):
                for group in random.Random(number).sample(groups, len(groups)):
                    self._one_of_each_state(group, number)
        self.took_s += time.monotonic() - began

    def _judge(self, groups: Sequence[Group]) -> None:
        """Judge groups side by side, those that need half of the memory one by one: nothing is timed yet."""
        half = machine.available_bytes() // JUDGES
        self.large |= {one.name for one in groups if JUDGE_COPIES * _bytes(one) > half}
        small, large = ([one for one in groups if (one.name in self.large) is it] for it in (False, True))
        self._judge_at_once(small, self._judges(), recycled=True)
        self._judge_at_once(large, 1, recycled=False)

    def _judge_at_once(self, groups: Sequence[Group], at_once: int, recycled: bool) -> None:
        """Judge groups, so many at a time; one of which none is right is not measured."""
        judges = [partial(_judge_here, group, recycled) for group in groups]
        for position, found in fork.call_each(judges, PROCESS_TIMEOUT_S, at_once):
            group = groups[position]
            judgement = Judgement(failed=str(found)) if isinstance(found, fork.ChildFailed) else found
            self.judged[group.name] = judgement
            self.announce(group, *self.progress(), self.expected_s(self.left_s()))
            if not judgement.names(group):
                wrong, failed = judgement.wrong, judgement.failed
                self.samples[group.name] = [Samples({}, 0, 0, False, 0, wrong=wrong, failed=failed)]

    @staticmethod
    def _judges() -> int:
        """How many judges to have at a time: as many as there are cores for, at most two."""
        return min(JUDGES, processors.usable())

    def _one_of_each_state(self, group: Group, number: int) -> None:
        for state in self.states(group, number):
            if not self.is_lost(group):
                self._keep(group, *self._in_fresh_process(group, state, number))

    def samples_of(self, group: Group) -> list[Samples]:
        """Return what was measured of a group, by process; one that measures itself does so now."""
        if group.name not in self.samples:
            if group.measured_by is None:
                self.measure_all()
            else:
                began, left_s = time.monotonic(), self.left_s()
                self.announce(group, *self.progress(), self.expected_s(left_s))
                samples = measure(group, self.plan(group, self.share_s(group, left_s), len(self.samples) + 1))
                samples.extra_metrics |= extra_metrics(group, samples.seconds)
                self._keep(group, samples, time.monotonic() - began)
                self.took_s += self.process_s[group.name]
        return self.samples[group.name]

    def _in_fresh_process(self, group: Group, state: str, number: int) -> tuple[Samples, float]:
        """Samples of one fresh process, and how many seconds it took."""
        began, left_s = time.monotonic(), self.left_s()
        self.announce(group, *self.progress(), self.expected_s(left_s))
        self.share_of[group.name] = self.share_s(group, left_s)
        plan = self.plan(
            group, self.share_of[group.name], 1000 * number + len(self.samples), self._pace(group, state)
        )
        judgement = self.judged[group.name]
        try:
            samples = fork.call(partial(_measure_here, group, plan, state, judgement), PROCESS_TIMEOUT_S)
        except fork.ChildFailed as error:
            samples = Samples({}, 0, 0, False, plan.seed, heap=state, failed=str(error))
        samples.extra_metrics = judgement.extra_metrics
        return samples, time.monotonic() - began

    def _pace(self, group: Group, state: str) -> Pace | None:
        """What the first process in this state found out of the calls of a round."""
        timed = (one for one in self.samples.get(group.name, []) if one.seconds and one.heap == state)
        return next((Pace(one.inner_calls, one.warm) for one in timed), None)

    def _keep(self, group: Group, samples: Samples, seconds: float) -> None:
        self.process_s[group.name] = seconds
        self.samples.setdefault(group.name, []).append(samples)

    def states(self, group: Group, number: int) -> Iterator[str]:
        """Yield the states of the heap in which a group's process of this number is measured.

        One where the state makes no difference: the page faults of the first process say whether it does.
        Where it does, the first processes are in both, the others in the one in which torch is faster.
        """
        if only := self.only_state(group):
            yield only
            return
        if number < self.profile.beside:
            yield heap.FRESH
        matters = heap.matters(self.samples[group.name][0].page_faults.values())
        if matters and (number < self.profile.beside or self.shown_state(group) == heap.RECYCLED):
            yield heap.RECYCLED
        elif number >= self.profile.beside:
            yield heap.FRESH

    def only_state(self, group: Group) -> str:
        """Return the one state in which a group is measured whatever difference it makes, or an empty string.

        Fresh where freed blocks could fill the memory; recycled where a run has one process a group, and
        where calls take long.
        """
        if group.name in self.large:
            return heap.FRESH
        return heap.RECYCLED if self.profile.processes == 1 or not group.also_fresh else ""

    def shown_state(self, group: Group) -> str:
        """Return the state of the heap that a group's rows show: the one in which its base is faster.

        What is claimed is then claimed against torch at its best.
        """
        timed = [one for one in self.samples[group.name] if one.seconds]
        base = reference_of(group.bases) or group.subject
        fresh_s, recycled_s = (
            time_s([one for one in timed if one.heap == state], base) for state in (heap.FRESH, heap.RECYCLED)
        )
        if math.isinf(recycled_s):
            return next((one.heap for one in timed), "")
        return heap.FRESH if fresh_s < FASTER_WHEN_FRESH * recycled_s else heap.RECYCLED

    def is_lost(self, group: Group) -> bool:
        """Whether a process has shown that further ones are of no use."""
        return any(one.failed or one.wrong or one.not_measured for one in self.samples.get(group.name, []))

    def left_s(self) -> float:
        """Return what is left of the budget, which begins to run with the first question."""
        self.deadline = self.deadline or time.monotonic() + self.profile.budget_s
        return max(0.0, self.deadline - time.monotonic())

    def waiting(self, group: Group) -> int:
        """Return how many processes of a group are still to be timed, as far as is known."""
        if group.measured_by or self.is_lost(group):
            return int(group.name not in self.samples)
        done, of_each = self.samples.get(group.name, []), self.profile
        matters = group.also_fresh and (
            heap.matters(done[0].page_faults.values()) if done else _is_large(group)
        )
        return max(0, of_each.processes + (of_each.beside if matters else 0) - len(done))

    def progress(self) -> tuple[int, int]:
        """Return the number of the process that comes next, and how many there will be, judges included."""
        done = len(self.judged) + sum(len(its) for its in self.samples.values() if not _is_empty(its))
        return done + 1, done + len(self._to_judge()) + sum(map(self.waiting, self.groups))

    def _to_judge(self) -> list[Group]:
        return [one for one in self.groups if not one.measured_by and one.name not in self.judged]

    def share_s(self, group: Group, left_s: float) -> float:
        """Return the share of the time left that the rounds of a process of a group may take, by weight.

        What the processes that wait take beside their rounds' share is set aside first.
        """
        process_s, waiting = self._processes_s(), {one.name: self.waiting(one) for one in self.groups}
        aside = sum(
            waiting[one.name] * max(0.0, process_s[one.name] - self.share_of.get(one.name, 0.0))
            for one in self.groups
            if not one.measured_by
        )
        shares = sum(one.weight * waiting[one.name] for one in self.groups)
        return max(LEAST_SHARE_S, (left_s - aside) * group.weight / max(shares, group.weight))

    def expected_s(self, left_s: float) -> float:
        """Return about how long the processes that wait will take: the budget's rest, or longer than that."""
        judge_s, process_s = self._judges_s(), self._processes_s()
        to_judge = sum(judge_s[one.name] for one in self._to_judge()) / self._judges()
        return max(left_s, to_judge + sum(self.waiting(one) * process_s[one.name] for one in self.groups))

    def _judges_s(self) -> dict[str, float]:
        """How long the judge of each group took, or will by what those before took."""
        usual = {one.name: usual_s(one) for one in self.groups}
        took = {name: one.took_s for name, one in self.judged.items()}
        slow = sum(took.values()) / sum(usual[name] for name in took) if took else 1.0
        return {name: took.get(name, slow * seconds) for name, seconds in usual.items()}

    def _processes_s(self) -> dict[str, float]:
        """How long the last process of each group took, or will take by its judge."""
        judge_s, took = self._judges_s(), self.process_s
        judges = sum(judge_s[name] for name in took)
        slow = sum(took.values()) / judges if judges else 1.0
        return {name: took.get(name, slow * seconds) for name, seconds in judge_s.items()}

    def measure_again(self, group: Group) -> list[Samples]:
        """Measure a group a second time, with its fair share of the whole budget."""
        state = self.headline(group)[0].heap or heap.FRESH
        self.deadline = time.monotonic() + self.share_s(group, self.profile.budget_s) * self.profile.processes
        if group.measured_by:
            return [measure(group, self.plan(group, self.left_s(), seed=len(self.groups) + 1))]
        return [self._in_fresh_process(group, state, number)[0] for number in range(self.profile.processes)]

    def plan(self, group: Group, budget_s: float, seed: int, pace: Pace | None = None) -> Plan:
        """Return the plan for one process of a group; one that measures itself has all its rounds at once."""
        shares = self.profile.processes if group.measured_by else 1
        patience_s = self.profile.patience_s * shares
        return Plan(
            budget_s=budget_s,
            min_rounds=self.profile.min_rounds * shares,
            max_rounds=self.profile.max_rounds,
            patience_s=patience_s * group.weight if group.measured_by else patience_s,
            seed=seed,
            least_rounds=-(-LEAST_ROUNDS * shares // self.profile.processes),
            pace=pace,
        )

    def by_state(self, group: Group) -> list[list[Samples]]:
        """Return the processes of a group by the state of their heap, the one that its rows show first."""
        timed = [one for one in self.samples_of(group) if one.seconds]
        states = [[one for one in timed if one.heap == state] for state in {one.heap: 0 for one in timed}]
        shown = self.shown_state(group)
        return sorted(states, key=lambda processes: processes[0].heap != shown)

    def headline(self, group: Group) -> list[Samples]:
        """Return the processes that a group's rows show."""
        return next(iter(self.by_state(group)), [])

    def rows_of(self, group: Group) -> dict[str, dict[str, Any]]:
        """Return the figures of every contender of a group that agreed and was timed."""
        if group.name not in self.rows:
            self._find_priors()
            states = self.by_state(group)
            first, *others = [figures(group, processes, self.priors) for processes in states] or [{}]
            for name, row in first.items():
                row["heap"] = states[0][0].heap if others or self.only_state(group) else ""
                for samples in self.samples[group.name]:
                    row |= samples.extra_metrics.get(name, {})
                for other in others:
                    if name in other:
                        row["other_heap"] = {"heap": states[1][0].heap} | {
                            key: other[name][key] for key in ("time_s", "ratios", "page_faults")
                        }
            self.rows[group.name] = first
        return self.rows[group.name]

    def _find_priors(self) -> None:
        """What the groups together say about how processes differ, for each base."""
        if self.priors:
            return
        found: dict[str, list[list[float]]] = {}
        for group in self.groups:
            for processes in self.by_state(group) if group.name in self.samples else ():
                for base, ratios in process_ratios(group, processes).items():
                    found.setdefault(base, []).append([one.log for one in ratios])
        self.priors = {base: prior(logs) for base, logs in found.items()}

    def subject_rows(self) -> dict[str, dict[str, Any]]:
        """Return the figures of the subjects that were asked for and timed, by group."""
        return {
            group.name: self.rows[group.name][group.subject]
            for group in self.groups
            if group.subject in self.rows.get(group.name, {})
        }

    def account(self) -> str:
        """Return in one line what the run did with its time."""
        done = [one for its in self.samples.values() for one in its]
        rounds = sum(len(next(iter(one.seconds.values()), ())) for one in done)
        both = sum(len({one.heap for one in its}) > 1 for its in self.samples.values())
        return (
            f"{_counted(len(self.samples), 'group')}, {both} of them in both states of the heap: "
            f"{_counted(len(self.judged), 'process', 'es')} to judge, {len(done)} to measure, "
            f"{_counted(rounds, 'round')}, {self.took_s:.0f} s"
        )

    def seconds_of(self, group: Group, name: str) -> list[float]:
        """Return the seconds per call of a contender, all processes and kept rounds in order."""
        return [s for one in self.headline(group) for s in one.seconds.get(name, [])]

    def wrong(self, group: Group, name: str) -> str | None:
        """Return what is wrong with a contender in any process, or None."""
        return next((one.wrong[name] for one in self.samples_of(group) if name in one.wrong), None)

    def failed(self, group: Group) -> str:
        """Return how a process of a group failed, or an empty string."""
        return next((one.failed for one in self.samples_of(group) if one.failed), "")

    def not_measured(self, group: Group) -> str:
        """Return why this machine cannot measure a group that was asked for, or an empty string."""
        return next((one.not_measured for one in self.samples.get(group.name, []) if one.not_measured), "")


def _measure_here(group: Group, plan: Plan, state: str, judgement: Judgement) -> Samples:
    """Measure a group in this fresh process, its heap in a state."""
    can_be_set = heap.set_state(state)
    _set_threads(group)
    samples = measure(group, plan, judgement)
    samples.heap = state if can_be_set else ""
    return samples


def _judge_here(group: Group, recycled: bool) -> Judgement:
    """Judge a group in this fresh process, which keeps its pages unless they could fill the memory."""
    if recycled:
        heap.set_state(heap.RECYCLED)
    _set_threads(group)
    return judge(group)


def _set_threads(group: Group) -> None:
    import torch

    if group.threads:
        torch.set_num_threads(group.threads)


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Every child begins with a collection, which would walk all that torch has loaded: 0.3 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _counted(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


def _bytes(group: Group) -> int:
    return group.traffic.total_bytes if group.traffic else 0


def _is_large(group: Group) -> bool:
    """Whether a group is likely to be measured in both states of the heap."""
    return _bytes(group) >= heap.DEFAULT_THRESHOLD


def _is_empty(processes: Sequence[Samples]) -> bool:
    """Whether a judge alone has put this there."""
    return all(not one.seconds and not one.heap for one in processes)


def usual_s(group: Group) -> float:
    """Return how long the judge of a group usually takes, in seconds."""
    return JUDGE_S + _bytes(group) / JUDGE_BYTES_PER_S


def geometric_means(run: Session) -> dict[str, dict[str, Any]]:
    """Return, per operation, device, dtype and pass, the geometric mean over groups of the subject's ratios.

    Groups with options of their own (reduction, weights, cold) are left out, as they repeat a shape.

    Returns:
        "op device dtype pass" -> base -> ratio, low, high and the number of groups; no device is the CPU.
    """
    columns: dict[str, dict[str, list[Any]]] = {}
    for group in run.groups:
        if group.name not in run.samples or group.facts.get("options"):
            continue
        label = mean_label(group.op, group.facts)
        processes = run.headline(group)
        for base, ratios in process_ratios(group, processes).items():
            if base in group.bases:
                pair = [paired_seconds(one, base, group.subject) for one in processes]
                columns.setdefault(label, {}).setdefault(base, []).append((pair, ratios))
    return {
        label: {base: _mean(run, base, its) for base, its in bases.items()}
        for label, bases in columns.items()
    }


def _mean(run: Session, base: str, groups: Sequence[Any]) -> dict[str, Any]:
    """Of single processes by a bootstrap over rounds, else by how processes differ."""
    if all(len(ratios) == 1 for _, ratios in groups):
        mean = geometric_mean([pair for (pair,), _ in groups])
    else:
        mean = geometric_mean_across(
            [[one.log for one in ratios] for _, ratios in groups], run.priors.get(base)
        )
    return asdict(mean) | {"groups": len(groups)}
