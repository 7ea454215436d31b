"""Run `mbperf bench --against REV`: two trees made ready, measured in lockstep, shown and recorded."""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from mbperf.against import table
from mbperf.against.processes import RemoteCall, TreeFailed, TreeProcess, remote_timer
from mbperf.against.revision import RevisionError, checked_out, commit_of, described, prepare
from mbperf.measure import covariates, heap, machine
from mbperf.measure.change import CANNOT_TELL, WORSE
from mbperf.measure.covariates import Covariates
from mbperf.measure.lockstep import (
    COMPARED,
    THAT,
    THIS,
    Comparison,
    Effort,
    Lost,
    compare,
    decide,
)
from mbperf.measure.rounds import Call, Plan, Rounds, run_rounds
from mbperf.measure.rows import CONTROL

# Of one group in one pass: 5 ms of calls are as long as their warm-up. A pass begins with three interpreters
# that import torch, 4 s on two cores, so that few groups may take longer each.
PLAN = Plan(budget_s=1.0, width=0.002, min_rounds=12, max_rounds=200, batch_s=5e-3, patience_s=4.0)
LEAST_PASS_S = 4.0
# Ten passes of one group, and of starting interpreters.
GROUP_S, START_S = 10.0, 80.0


@dataclass
class LockstepRun:
    """Two trees, and the three processes of a pass: of the working tree, its control, of the other tree.

    Args:
        trees: contender -> folder.
        selection: pytest's arguments.
        state: of the heap.
    """

    trees: dict[str, Path]
    selection: Sequence[str]
    state: str
    plan: Plan = PLAN
    processes: dict[str, TreeProcess] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def start(self, number: int = 0) -> dict[str, dict[str, Any]]:
        """Start the fresh processes of a pass, all at once, and return what each tree has collected.

        Raises:
            TreeFailed: one of them cannot; the message says which.
        """
        self.end()
        self.processes = {
            name: TreeProcess(called(name), tree, self.selection, self.state, hash_seed=number)
            for name, tree in self.trees.items()
        }
        for process in self.processes.values():
            process.start()
        return {name: process.ready() for name, process in self.processes.items()}

    def race(self, group: str, number: int) -> Rounds:
        """Measure a group in forks of this pass's processes; the first time, check it in forks of their own.

        Raises:
            Lost: a tree's subject is wrong, its process failed, or the trees' inputs differ.
        """
        if not self.processes:
            self.start(number)
        try:
            if group not in self.checked:
                self._check(group)
            return self._rounds(group, number)
        except (TreeFailed, Lost) as error:
            self.end()  # what they have been asked and not answered would be the next group's
            raise Lost(str(error)) from None
        except BaseException:
            self.end()
            raise

    def _check(self, group: str) -> None:
        for name in (THIS, THAT):
            if wrong := self.processes[name].ask("check", group):
                raise Lost(f"{called(name)} is wrong: {wrong.strip().splitlines()[0]}")
        self.checked.add(group)

    def _rounds(self, group: str, number: int) -> Rounds:
        inputs = {name: process.ask("open", group) for name, process in self.processes.items()}
        if inputs[THIS] != inputs[THAT]:
            raise Lost("its inputs differ between the trees")
        calls: dict[str, list[Call]] = {
            name: [RemoteCall(process, index) for index in range(len(inputs[THIS]))]
            for name, process in self.processes.items()
        }
        rounds = run_rounds(
            calls, COMPARED, replace(self.plan, seed=number), timer=remote_timer, read=self._read
        )
        for process in self.processes.values():
            process.tell("close", "")
        return rounds

    def _read(self) -> Covariates:
        """The switches of the processes that compute; this one only waits."""
        switches = sum(process.switches for process in self.processes.values())
        return Covariates(switches, covariates.read().steal_s)

    def end(self) -> None:
        """End the processes of this pass."""
        for process in self.processes.values():
            process.end()
        self.processes = {}


def called(name: str) -> str:
    """Return how people call a contender's tree."""
    return "the revision" if name == THAT else "the working tree"


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see its options."""

    revision: str
    selection: Sequence[str]
    budget_s: float | None = None
    state: str = heap.RECYCLED
    json_file: Path | None = None
    fail_on_worse: bool = False


def bench_against(tree: Path, request: Request) -> int:
    """Measure a working tree against a revision of it, print the table, and return the exit code.

    Args:
        tree: the working tree.
        request: the revision and the options.

    Raises:
        click.ClickException: the revision is unknown or does not build, or nothing can be compared.
    """
    try:
        with ended_by_signals():
            commit = commit_of(tree, request.revision)
            with checked_out(tree, commit) as other:
                say(f"{request.revision} is {described(other)}")
                prepare(tree, other, commit, say)
                record = _measure(tree, other, request)
    except (RevisionError, TreeFailed) as error:
        raise click.ClickException(str(error)) from None
    table.show(record)
    if request.json_file:
        request.json_file.write_text(json.dumps(record, indent=1) + "\n")
    failed = [row for row in record["groups"] if row["verdict"] == WORSE or row.get("lost")]
    return 1 if request.fail_on_worse and failed else 0


def _measure(tree: Path, other: Path, request: Request) -> dict[str, Any]:
    run = LockstepRun({THIS: tree, CONTROL: tree, THAT: other}, request.selection, request.state)
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        facts = run.start()
        groups, left_out = in_both(facts[THIS]["groups"], facts[THAT]["groups"])
        run.plan = replace(PLAN, budget_s=max(PLAN.budget_s, LEAST_PASS_S / max(1, len(groups))))
        effort = Effort(request.budget_s or START_S + GROUP_S * len(groups))
        progress = Progress(run, len(groups), began, effort.budget_s)
        found = compare(groups, progress.race, effort, progress.before_pass)
    finally:
        run.end()
    return {
        "schema": 1,
        "this": described(tree),
        "that": described(other),
        "revision": request.revision,
        "machine": machine.name(),
        "torch": facts[THIS]["torch"],
        "threads": facts[THIS]["threads"],
        "heap": request.state if heap.has_states() else "",
        "load_before": load,
        "took_s": time.monotonic() - began,
        "groups": rows(found),
        "left_out": left_out,
        "not_collected": {name: facts[name]["errors"] for name in (THIS, THAT) if facts[name]["errors"]},
    }


def in_both(this: dict[str, str], that: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the groups to compare, and why each of the others is left out.

    Args:
        this: group -> why this tree does not compare it, or an empty string.
        that: the same of the other tree.

    >>> in_both({"a": "", "b": "", "c": "cold"}, {"a": "", "c": "", "d": ""})
    (['a'], {'b': 'not in the revision', 'c': 'cold', 'd': 'only in the revision'})
    """
    left_out = {
        name: this[name] or that.get(name, "not in the revision")
        for name in this
        if this[name] or that.get(name, "?")
    }
    left_out |= {name: "only in the revision" for name in that if name not in this}
    return [name for name in this if name not in left_out], left_out


def rows(found: dict[str, Comparison]) -> list[dict[str, Any]]:
    """Return a row for each group: times, ratio and control with bounds, verdict, or why there is none."""
    decisions = decide(found)
    result = []
    for group, one in found.items():
        row: dict[str, Any] = {"group": group, "processes": len(one.ratios), "verdict": CANNOT_TELL}
        if one.lost:
            row |= {"verdict": "", "lost": one.lost}
        elif decided := decisions.get(group):
            row |= asdict(decided.ratio) | {"control": asdict(decided.control), "verdict": decided.verdict}
        row |= {f"{name}_s": statistics.median(s) for name, s in one.seconds.items() if s}
        row["ratios"] = [float(f"{ratio.ratio:.5g}") for ratio in one.ratios]
        row["rounds"] = one.rounds
        result.append(row)
    return result


@dataclass
class Progress:
    """Says how far a run is, in place on a terminal, a line for each pass elsewhere."""

    run: LockstepRun
    count: int
    began: float
    budget_s: float
    number: int = 0

    def before_pass(self, number: int) -> None:
        """Start this pass's processes; the first pass has those that told which groups there are."""
        self.number = number
        if number:
            self.run.start(number)
        if not sys.stderr.isatty():
            say(f"pass {number + 1}, {self._left()}")

    def race(self, group: str, number: int) -> Rounds:
        """Measure a group, and say so on a terminal."""
        if sys.stderr.isatty():
            click.echo(f"\r\033[Kpass {number + 1}, {self._left()}: {group}", err=True, nl=False)
        try:
            return self.run.race(group, number)
        finally:
            if sys.stderr.isatty():
                click.echo("\r\033[K", err=True, nl=False)

    def _left(self) -> str:
        left_s = max(0, round(self.budget_s - (time.monotonic() - self.began)))
        return f"at most {left_s // 60}:{left_s % 60:02} left of {self.count} groups"


def say(text: str) -> None:
    """Tell what goes on, beside what is printed as the result."""
    click.echo(f"mbperf: {text}", err=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise, as Ctrl-C does, so that everything is cleared up on the way out."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
