"""Race one tree against another: fresh processes of both take turns within the same rounds, pass after pass.

Each pass starts new interpreters and gives every group that is not decided yet a ratio, of the medians over
its rounds; the interval is that of the mean over passes. A second process of the working tree is the control.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mbperf.measure.change import BETTER, CANNOT_TELL, SAME, WORSE
from mbperf.measure.rounds import Clock, Rounds
from mbperf.measure.rows import CONTROL
from mbperf.measure.statistics import (
    MARGIN,
    Prior,
    Ratio,
    across_processes,
    paired_ratio,
    prior,
    reach,
)

THIS, THAT = "this", "that"
CONTENDERS = (THIS, CONTROL, THAT)
COMPARED = ((CONTROL, THIS), (THAT, THIS))


class Lost(RuntimeError):
    """A group that no further process would measure; the message says why."""


@dataclass(frozen=True)
class Effort:
    """How much to do: seconds for all groups together, and fresh processes of each tree for one group.

    With fewer than 6 Student's t alone makes an interval 10 standard errors wide. A group that 24 do not
    decide stays undecided.
    """

    budget_s: float
    least_processes: int = 6
    most_processes: int = 24


@dataclass
class Comparison:
    """What is known of one group: of each pass the ratio of times, that over this, and the control's."""

    group: str
    ratios: list[Ratio] = field(default_factory=list)
    controls: list[Ratio] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CONTENDERS})
    rounds: list[int] = field(default_factory=list)
    lost: str = ""

    def add(self, rounds: Rounds) -> None:
        """Take in what the processes of one pass did."""
        kept, _, _ = rounds.kept()
        self.ratios.append(paired_ratio(kept[THAT], kept[THIS]))
        self.controls.append(paired_ratio(kept[CONTROL], kept[THIS]))
        for name in CONTENDERS:
            self.seconds[name].append(statistics.median(kept[name]))
        self.rounds.append(len(kept[THIS]))


@dataclass(frozen=True)
class Decision:
    """The ratio of times, that over this (above 1: this tree is faster), the control's, and the verdict."""

    ratio: Ratio
    control: Ratio
    verdict: str


Race = Callable[[str, int], Rounds]  # of a group in a pass
Between = Callable[[int], None]


def compare(
    groups: Sequence[str],
    race: Race,
    effort: Effort,
    before_pass: Between = lambda number: None,
    clock: Clock = time.monotonic,
) -> dict[str, Comparison]:
    """Measure groups in passes until each is decided, or the budget is spent.

    Args:
        groups: their names.
        race: measures one group in fresh processes; raises Lost for one that cannot be.
        effort: how much to do.
        before_pass: called with the number of each pass before it begins.
        clock: seconds, of the budget.

    Returns:
        Group -> what was found, of those that were begun.
    """
    found = {group: Comparison(group) for group in groups}
    end = clock() + effort.budget_s
    for number in range(effort.most_processes):
        waiting = undecided(found, effort)
        if not waiting or clock() >= end:
            break
        before_pass(number)
        for group in random.Random(number).sample(waiting, len(waiting)):
            if clock() >= end:
                break
            try:
                found[group].add(race(group, number))
            except Lost as error:
                found[group].lost = str(error)
    return found


def undecided(found: Mapping[str, Comparison], effort: Effort) -> list[str]:
    """Return the groups that need further processes."""
    verdicts = {group: one.verdict for group, one in decide(found).items()}
    return [
        group
        for group, one in found.items()
        if not one.lost and (len(one.ratios) < effort.least_processes or verdicts[group] == CANNOT_TELL)
    ]


def decide(found: Mapping[str, Comparison]) -> dict[str, Decision]:
    """Return the decision on each group that was measured in at least two processes of each tree.

    Both columns of ratios vary between processes for the same reasons, so both say by how much.
    """
    measured = {group: one for group, one in found.items() if len(one.ratios) > 1 and not one.lost}
    columns = [its for one in measured.values() for its in (one.ratios, one.controls)]
    known = prior([[ratio.log for ratio in its] for its in columns])
    return {group: _decided(one, known) for group, one in measured.items()}


def _decided(one: Comparison, known: Prior) -> Decision:
    ratio = across_processes(one.ratios, known)
    control = across_processes(one.controls, known)
    return Decision(ratio, control, verdict(ratio, control))


def verdict(ratio: Ratio, control: Ratio) -> str:
    """Decide on a ratio of times, that over this: BETTER or WORSE beyond 1 %, SAME within, else CANNOT TELL.

    A difference no larger than what the control shows of identical trees is none.

    >>> control = Ratio(1.0, 0.99, 1.01)
    >>> verdict(Ratio(0.97, 0.96, 0.98), control), verdict(Ratio(1.0, 0.995, 1.005), control)
    ('WORSE', 'SAME')
    """
    least = max(1 + MARGIN, reach(control))
    if ratio.low > least:
        return BETTER
    if ratio.high < 1 / least:
        return WORSE
    if ratio.low >= 1 / (1 + MARGIN) and ratio.high <= 1 + MARGIN:
        return SAME
    return CANNOT_TELL
