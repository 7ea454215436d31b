"""One run: which groups it measures, how long each may take, and what was found.

A group is measured once, when its first test asks; the tests of its other contenders replay their share.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mbperf.measure.figures import figures
from mbperf.measure.group import Group, Samples, measure
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import geometric_mean


@dataclass(frozen=True)
class Profile:
    """How thorough a run is: seconds for all groups together, fresh processes, rounds per group."""

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


# The default run has to end within 5 minutes, imports, checks and tables included. Below 8 rounds there is
# no 99 % interval, so a smoke run says CANNOT TELL by design.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", budget_s=30, processes=1, min_rounds=4, max_rounds=12, patience_s=10),
        Profile("default", budget_s=220, processes=1, min_rounds=10, max_rounds=200),
        Profile("long", budget_s=540, processes=3, min_rounds=12, max_rounds=200),
    )
}
LEAST_SHARE_S = 0.05
# Seconds of a group's least rounds, and of making and judging its inputs by their size, on 2 cores of Zen 4.
# Only their proportion matters once the first groups are measured.
GROUP_S, GROUP_BYTES_PER_S = 0.5, 15e6

Announce = Callable[[Group, int, int, float], None]


@dataclass
class Session:
    """The state of one run.

    Args:
        profile: how thorough.
        groups: all groups this run will be asked for.
        announce: told group, its number, their count and about how many seconds are left, before each.
        earlier: samples of earlier fresh processes, by group name.
    """

    profile: Profile
    groups: Sequence[Group]
    announce: Announce
    earlier: list[dict[str, Samples]] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    # Monotonic, and of the wall: what the budget promises is when the reader has the table.
    deadline: float = 0.0

    def samples_of(self, group: Group) -> Samples:
        """Measure a group, or return what was measured."""
        if group.name not in self.samples:
            self.deadline = self.deadline or time.monotonic() + self.profile.budget_s
            number, left_s = len(self.samples) + 1, max(0.0, self.deadline - time.monotonic())
            self.announce(group, number, len(self.groups), self.expected_s(left_s))
            began = time.monotonic()
            self.samples[group.name] = measure(group, self.plan(self.share_s(group, left_s), number))
            self.took_s[group.name] = time.monotonic() - began
        return self.samples[group.name]

    def share_s(self, group: Group, left_s: float) -> float:
        """Return the share of the time left that a group may take beyond its least rounds, by weight."""
        waiting = sum(one.weight for one in self.groups if one.name not in self.samples)
        return max(LEAST_SHARE_S, left_s * group.weight / max(waiting, group.weight))

    def expected_s(self, left_s: float) -> float:
        """Return about how long the groups that wait will take: the budget's rest, or longer than that.

        Where the least rounds and the judge take longer than the budget allows, those measured tell how long.
        """
        done_s = sum(usual_s(one) for one in self.groups if one.name in self.took_s)
        slowness = sum(self.took_s.values()) / done_s if done_s else 1.0
        return max(left_s, slowness * sum(usual_s(one) for one in self.groups if one.name not in self.took_s))

    def measure_again(self, group: Group) -> Samples:
        """Measure a group a second time, with its fair share of the whole budget."""
        share_s = self.profile.budget_s * group.weight / sum(one.weight for one in self.groups)
        return measure(group, self.plan(max(LEAST_SHARE_S, share_s), number=len(self.groups) + 1))

    def plan(self, budget_s: float, number: int) -> Plan:
        """Return the plan for the group measured as `number`-th of this process."""
        return Plan(
            budget_s=budget_s,
            min_rounds=self.profile.min_rounds,
            max_rounds=self.profile.max_rounds,
            patience_s=self.profile.patience_s,
            seed=number + 1000 * len(self.earlier),
        )

    def processes_of(self, group: Group) -> list[Samples]:
        """Return the samples of a group from every fresh process that has them, this one's last."""
        return [one[group.name] for one in self.earlier if group.name in one] + [self.samples_of(group)]

    def rows_of(self, group: Group) -> dict[str, dict[str, Any]]:
        """Return the figures of every contender of a group that agreed and was timed."""
        if group.name not in self.rows:
            self.rows[group.name] = figures(group, self.processes_of(group))
            for name, further in group.further.items():
                if name in self.rows[group.name]:
                    self.rows[group.name][name].update(further())
        return self.rows[group.name]

    def seconds_of(self, group: Group, name: str) -> list[float]:
        """Return the seconds per call of a contender, all processes and kept rounds in order."""
        return [s for one in self.processes_of(group) for s in one.seconds.get(name, [])]

    def wrong(self, group: Group, name: str) -> str | None:
        """Return what is wrong with a contender in any process, or None."""
        return next((one.wrong[name] for one in self.processes_of(group) if name in one.wrong), None)

    def not_measured(self, group: Group) -> str:
        """Return why this machine cannot measure a group that was asked for, or an empty string."""
        return self.samples[group.name].not_measured if group.name in self.samples else ""


def usual_s(group: Group) -> float:
    """Return how long the least of a group usually takes, in seconds."""
    moved_bytes = group.traffic.total_bytes if group.traffic else 0
    return GROUP_S + moved_bytes / GROUP_BYTES_PER_S


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
        for base in group.bases:
            both = run.seconds_of(group, base), run.seconds_of(group, group.subject)
            if all(both):
                columns.setdefault(label, {}).setdefault(base, []).append(both)
    return {
        label: {base: asdict(geometric_mean(pairs)) | {"groups": len(pairs)} for base, pairs in bases.items()}
        for label, bases in columns.items()
    }


def save_samples(session: Session, file: Path) -> None:
    """Write the samples of this process for the one that started it."""
    file.write_text(json.dumps({name: one.to_json() for name, one in session.samples.items()}))


def load_samples(file: Path) -> dict[str, Samples]:
    """Read what `save_samples` wrote."""
    return {name: Samples(**plain) for name, plain in json.loads(file.read_text()).items()}
