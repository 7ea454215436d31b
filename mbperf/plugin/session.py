"""One run: which groups it measures, how long each may take, and what was found.

Each group is measured in several fresh processes, spread over the run, before the first test. The tests of
its contenders replay their share.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from mbperf.measure import fork, heap
from mbperf.measure.figures import figures, process_ratios, time_s
from mbperf.measure.group import Group, Samples, measure
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import LEAST_ROUNDS, Prior, geometric_mean, geometric_mean_across, prior


@dataclass(frozen=True)
class Profile:
    """How thorough a run is: seconds for all groups together, fresh processes, rounds in each."""

    name: str
    budget_s: float
    processes: int
    min_rounds: int
    max_rounds: int
    patience_s: float = 40.0

    @property
    def is_baseline(self) -> bool:
        """Whether a later run may be compared with this one."""
        return self.name != "smoke"


# The default run has to end within 6 minutes, imports, checks and tables included: one process a group, as
# the judge alone takes minutes in three. Below 8 rounds there is no 99 % interval, so a smoke run says CANNOT
# TELL by design.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", budget_s=30, processes=1, min_rounds=4, max_rounds=12, patience_s=10),
        Profile("default", budget_s=220, processes=1, min_rounds=10, max_rounds=200),
        Profile("long", budget_s=540, processes=3, min_rounds=5, max_rounds=100, patience_s=10),
    )
}
LEAST_SHARE_S = 0.02
# Seconds of a group's least rounds, and of making and judging its inputs by their size, on 2 cores of Zen 4.
# Only their proportion matters once the first groups are measured.
GROUP_S, GROUP_BYTES_PER_S = 0.2, 40e6
THOROUGH = 3.0  # times as long, in the first process of a group, which judges it
# A judge on one of two cores beside other work took 69 s; no group takes so long.
PROCESS_TIMEOUT_S = 300.0

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
    samples: dict[str, list[Samples]] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    took_s: float = 0.0
    done_s: float = 0.0  # what these should have taken
    # Monotonic, and of the wall: what the budget promises is when the reader has the table.
    deadline: float = 0.0
    priors: dict[str, Prior] = field(default_factory=dict)

    def measure_all(self) -> None:
        """Measure the groups in fresh processes: in passes, each of all groups in an order of its own."""
        groups = [group for group in self.groups if group.measured_by is None]
        with _nothing_to_collect():
            for number in range(self.profile.processes):
                for group in random.Random(number).sample(groups, len(groups)):
                    self._one_of_each_state(group, number)

    def _one_of_each_state(self, group: Group, number: int) -> None:
        for state in self.states(group):
            if not self.is_lost(group):
                samples, seconds = self._in_fresh_process(group, state, number)
                self._keep(group, samples, seconds)

    def samples_of(self, group: Group) -> list[Samples]:
        """Return what was measured of a group, by process; one that measures itself does so now."""
        if group.name not in self.samples:
            if group.measured_by is None:
                self.measure_all()
            else:
                began, left_s = time.monotonic(), self.left_s()
                self.announce(group, *self.progress(), self.expected_s(left_s))
                plan = self.plan(self.share_s(group, left_s), len(self.samples) + 1)
                self._keep(group, _with_extra_metrics(group, measure(group, plan)), time.monotonic() - began)
        return self.samples[group.name]

    def _in_fresh_process(self, group: Group, state: str, number: int) -> tuple[Samples, float]:
        """Samples of one fresh process, and how many seconds it took; the first judges for all."""
        began, left_s = time.monotonic(), self.left_s()
        self.announce(group, *self.progress(), self.expected_s(left_s))
        plan = self.plan(self.share_s(group, left_s), seed=1000 * number + len(self.samples))
        if number == 0:
            plan = replace(plan, patience_s=THOROUGH * plan.patience_s)
        try:
            samples = fork.call(
                partial(_measure_here, group, plan, state, first=number == 0), PROCESS_TIMEOUT_S
            )
        except fork.ChildFailed as error:
            samples = Samples({}, 0, 0, False, plan.seed, heap=state, failed=str(error))
        return samples, time.monotonic() - began

    def _keep(self, group: Group, samples: Samples, seconds: float) -> None:
        self.done_s += usual_s(group, first=group.name not in self.samples)
        self.took_s += seconds
        self.samples.setdefault(group.name, []).append(samples)

    def states(self, group: Group) -> Iterator[str]:
        """Yield the states of the heap in which a group is measured, the second once the first has been.

        One where it makes no difference: the page faults of the first process say whether it does. A run of
        one process a group takes the state in which torch is the faster one.
        """
        if self.profile.processes == 1:
            yield heap.RECYCLED
            return
        yield heap.FRESH
        if heap.matters(self.samples[group.name][0].page_faults.values()):
            yield heap.RECYCLED

    def is_lost(self, group: Group) -> bool:
        """Whether a process has shown that further ones are of no use."""
        return any(one.failed or one.wrong or one.not_measured for one in self.samples.get(group.name, []))

    def left_s(self) -> float:
        """Return what is left of the budget, which begins to run with the first question."""
        self.deadline = self.deadline or time.monotonic() + self.profile.budget_s
        return max(0.0, self.deadline - time.monotonic())

    def waiting(self, group: Group) -> int:
        """Return how many processes of a group are still to come, as far as is known."""
        if group.measured_by or self.is_lost(group):
            return int(group.name not in self.samples)
        done = self.samples.get(group.name, [])
        known = heap.matters(done[0].page_faults.values()) if done else _is_large(group)
        states = 2 if known and self.profile.processes > 1 else 1
        return max(0, self.profile.processes * states - len(done))

    def progress(self) -> tuple[int, int]:
        """Return the number of the process that comes next, and how many there will be."""
        done = sum(map(len, self.samples.values()))
        return done + 1, done + sum(map(self.waiting, self.groups))

    def share_s(self, group: Group, left_s: float) -> float:
        """Return the share of the time left that a process of a group may take, by the group's weight."""
        waiting = sum(one.weight * self.waiting(one) for one in self.groups)
        return max(LEAST_SHARE_S, left_s * group.weight / max(waiting, group.weight))

    def expected_s(self, left_s: float) -> float:
        """Return about how long the processes that wait will take: the budget's rest, or longer than that.

        Where the least rounds and the judge take longer than the budget allows, those measured tell how long.
        """
        slowness = self.took_s / self.done_s if self.done_s else 1.0
        to_come = sum(
            self.waiting(one) * usual_s(one, first=False)
            + (usual_s(one, first=True) - usual_s(one, first=False)) * (one.name not in self.samples)
            for one in self.groups
        )
        return max(left_s, slowness * to_come)

    def measure_again(self, group: Group) -> list[Samples]:
        """Measure a group a second time, with its fair share of the whole budget."""
        state = self.headline(group)[0].heap
        self.deadline = time.monotonic() + self.share_s(group, self.profile.budget_s) * self.profile.processes
        if group.measured_by:
            return [measure(group, self.plan(self.left_s(), seed=len(self.groups) + 1))]
        return [self._in_fresh_process(group, state, number)[0] for number in range(self.profile.processes)]

    def plan(self, budget_s: float, seed: int) -> Plan:
        """Return the plan for one process of a group."""
        return Plan(
            budget_s=budget_s,
            min_rounds=self.profile.min_rounds,
            max_rounds=self.profile.max_rounds,
            patience_s=self.profile.patience_s,
            seed=seed,
            least_rounds=-(-LEAST_ROUNDS // self.profile.processes),
        )

    def by_state(self, group: Group) -> list[list[Samples]]:
        """Return the processes of a group by the state of their heap, the one that suits its base first.

        What is claimed is then claimed against torch at its best.
        """
        timed = [one for one in self.samples_of(group) if one.seconds]
        states = [[one for one in timed if one.heap == state] for state in {one.heap: 0 for one in timed}]
        base = "torch" if "torch" in group.bases else next(iter(group.bases), group.subject)
        return sorted(states, key=lambda processes: time_s(processes, base))

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
                row["heap"] = states[0][0].heap if others or self.profile.processes == 1 else ""
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
            f"{len(self.samples)} groups, {both} of them in both states of the heap: "
            f"{len(done)} fresh processes, {rounds} rounds, {self.took_s:.0f} s"
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


def _measure_here(group: Group, plan: Plan, state: str, first: bool) -> Samples:
    """Measure a group in this fresh process, its heap in a state."""
    import torch

    can_be_set = heap.set_state(state)
    if group.threads:
        torch.set_num_threads(group.threads)
    samples = measure(group, plan, thorough=first)
    samples.heap = state if can_be_set else ""
    return _with_extra_metrics(group, samples) if first else samples


def _with_extra_metrics(group: Group, samples: Samples) -> Samples:
    its = {name: figure for name, figure in group.extra_metrics.items() if name in samples.seconds}
    samples.extra_metrics |= {name: dict(figure()) for name, figure in its.items()}
    return samples


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Every child begins with a collection, which would walk all that torch has loaded: 0.3 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _bytes(group: Group) -> int:
    return group.traffic.total_bytes if group.traffic else 0


def _is_large(group: Group) -> bool:
    """Whether a group is likely to be measured in both states of the heap."""
    return _bytes(group) >= heap.DEFAULT_THRESHOLD


def usual_s(group: Group, first: bool) -> float:
    """Return how long the least of a process usually takes, in seconds."""
    seconds = GROUP_S + _bytes(group) / GROUP_BYTES_PER_S
    return seconds * THOROUGH if first else seconds


def geometric_means(run: Session) -> dict[str, dict[str, Any]]:
    """Return, per operation, dtype and pass, the geometric mean over groups of the subject's ratios.

    Groups with options of their own (reduction, weights, cold) are left out, as they repeat a shape.

    Returns:
        "op dtype pass" -> base -> ratio, low, high and the number of groups.
    """
    columns: dict[str, dict[str, list[Any]]] = {}
    for group in run.groups:
        if group.name not in run.samples or group.facts.get("options"):
            continue
        label = " ".join(filter(None, [group.op, group.facts.get("dtype"), group.facts.get("pass")]))
        processes = run.headline(group)
        for base, ratios in process_ratios(group, processes).items():
            if base in group.bases:
                pair = [(one.seconds[base], one.seconds[group.subject]) for one in processes]
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
