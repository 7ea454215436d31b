"""A group: contenders that do the same thing to the same inputs, checked against each other, then raced.

The A/A control ("again": the subject once more), the memory limit ("roof") and a null call ("null") join by
themselves. Every contender has an input set; which one is dealt afresh each round.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from mbperf.measure.rounds import Call, Plan, Rounds, Timer, run_rounds
from mbperf.measure.traffic import Traffic

CONTROL, ROOF, NULL = "again", "roof", "null"
Inputs = tuple[Any, ...]
SEED = 20190301


@dataclass(frozen=True)
class Group:
    """One operation on one case.

    Args:
        op: what is done, for instance "cross_entropy".
        case: to what, for instance "512x32000 float32 forward+backward".
        make_inputs: allocates and fills the inputs; called once per input set, after seeding torch alike
            (with SEED and the number of the input, which a cold group counts from 0).
        contenders: name -> function of the inputs; the first is the subject, the others are its bases.
        expected: the reference's outputs, a function of the inputs.
        traffic: the bytes that have to move; None where bytes say nothing (no roof then).
        floors: base -> how many times faster than it the subject has to be.
        facts: what the pictures need: N, C, dtype, pass, ...
        extra_metrics: contender -> figures measured outside the rounds, such as peak memory.
        optional: name -> factory of a contender that runs only when asked for by name; called where it is
            measured, so that it may start threads.
        asked: the optional contenders that were asked for.
        cold: every call finds its inputs in no cache; where that cannot be had, the group is not measured.
        reads: the tensors that a call on these inputs reads, for a cold group whose inputs lead to more
            memory than their tensors have, or to less.
        min_rounds: fewer than the plan's where one call takes seconds, never fewer than the plan's least.
        input_sets: how many sets to deal; one per contender, or two where calls or inputs are dear.
        weight: of its share of the budget, where the other groups' is 1.
        threads: torch's threads while the group is measured; as many as the process has unless given.
        timer: how calls are timed; by the wall's clock unless given.
        measured_by: what measures the group instead of the rounds below, on a GPU for instance.
    """

    op: str
    case: str
    make_inputs: Callable[[], tuple[Any, ...]]
    contenders: Mapping[str, Callable[..., Any]]
    expected: Callable[..., Sequence[Any]]
    traffic: Traffic | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    extra_metrics: Mapping[str, Callable[[], Mapping[str, Any]]] = field(default_factory=dict)
    optional: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    cold: bool = False
    reads: Callable[..., Sequence[Any]] | None = None
    min_rounds: int | None = None
    input_sets: int | None = None
    weight: float = 1.0
    threads: int | None = None
    timer: Timer | None = None
    measured_by: "Callable[[Group, Plan], Samples] | None" = None

    @property
    def name(self) -> str:
        """Operation and case; the group's label in every table."""
        return f"{self.op} {self.case}"

    @property
    def subject(self) -> str:
        """The contender that is being proved."""
        return next(iter(self.contenders))

    @property
    def bases(self) -> list[str]:
        """The contenders the subject is compared with."""
        return [*list(self.contenders)[1:], *self.asked]

    def lineup(self) -> list[str]:
        """Names of all rows, in the order of the tables."""
        roof = [ROOF] if self.traffic else []
        return [self.subject, CONTROL, *self.bases, *roof, NULL]

    def with_optional(self, names: Sequence[str]) -> "Group":
        """Return the group with those of its optional contenders that `names` asks for."""
        return replace(self, asked=tuple(name for name in self.optional if name in names))


@dataclass
class Samples:
    """What one process measured of one group: seconds per call, paired by round, and page faults per call.

    `heap` is the state that its heap was held in, or "" where it was left alone; `extra_metrics` was measured
    outside the rounds; `failed` says how the process failed.
    """

    seconds: dict[str, list[float]]
    inner_calls: int
    dropped_rounds: int
    noisy: bool
    seed: int
    wrong: dict[str, str] = field(default_factory=dict)
    page_faults: dict[str, float] = field(default_factory=dict)
    sm_clock_mhz: list[float] = field(default_factory=list)  # of a GPU, before and after each round
    not_measured: str = ""  # the reason why this machine cannot
    heap: str = ""
    extra_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure(group: Group, plan: Plan, thorough: bool = True) -> Samples:
    """Check the contenders of a group, race those that agree, and check them again.

    Args:
        group: what to measure.
        plan: how long and how finely.
        thorough: against the group's reference, on changed inputs too, and once more after the rounds. Else
            another process has done so, and here the contenders have to agree with the subject.

    Returns:
        Samples; a contender that disagrees is in `wrong` and has no seconds.

    >>> group = Group("double", "1", lambda: (3.0,), {"mine": lambda x: x + x}, lambda x: [x * 2])
    >>> sorted(measure(group, Plan(budget_s=0.01, max_rounds=12)).seconds)
    ['again', 'mine', 'null']
    """
    from mbperf.measure import cold

    if group.measured_by:
        return group.measured_by(group, plan)
    began, functions = time.monotonic(), functions_of(group)
    sets: list[list[Inputs]] = [[] for _ in range(_set_count(group, len(functions)))]
    checks = [_Check(group, functions, sets, thorough)]
    wrong = checks[0].disagreements(functions)
    if group.cold and len(wrong) < len(functions):
        if reason := cold.why_not():
            return Samples({}, 0, 0, False, plan.seed, wrong, not_measured=reason)
        for _ in cold.more_inputs(group, functions, sets, plan, checks[0].held_bytes()):
            checks.append(_Check(group, functions, sets, thorough))
            wrong = checks[-1].disagreements(functions) | wrong
    right = [name for name in functions if name not in wrong]
    if not right:
        return Samples({}, 0, 0, False, plan.seed, wrong)
    calls = _calls(group, {name: functions[name] for name in right}, sets)
    timer = cold.timer if group.cold else group.timer
    its_plan = _fit(plan, group, rotation=len(checks))
    since_s = time.monotonic() - began
    rounds = run_rounds(calls, compared(group, calls), its_plan, right, timer, since_s=since_s)
    for check in checks if thorough else ():
        wrong = check.disagreements(right) | wrong
    return _samples(group, rounds, wrong)


class _Check:
    """Makes one more input of every set, and judges the contenders on these."""

    def __init__(
        self,
        group: Group,
        functions: Mapping[str, Callable[..., Any]],
        sets: Sequence[list[Inputs]],
        thorough: bool,
    ) -> None:
        from mbperf.measure.agreement import Judge

        for one in sets:
            one.append(make(group, len(one)))
        inputs_of = {name: [sets[index % len(sets)][-1]] for index, name in enumerate(functions)}
        self._calls = {
            name: [partial(functions[name], *inputs) for inputs in its] for name, its in inputs_of.items()
        }
        if thorough:
            self._judge = Judge(inputs_of, group.expected)
        else:
            self._judge = Judge(inputs_of, None, changes=(False,), slack=2)

    def disagreements(self, names: Iterable[str]) -> dict[str, str]:
        """Return what is wrong with each of these contenders that is wrong."""
        return self._judge.disagreements({name: self._calls[name] for name in names})

    def held_bytes(self) -> int:
        """Return the memory of the references, which are kept for the check after the rounds."""
        return self._judge.held_bytes()


def _calls(
    group: Group, functions: Mapping[str, Callable[..., Any]], sets: Sequence[Sequence[Inputs]]
) -> dict[str, list[Call]]:
    """The calls of every row: of contenders one for each input set, of the others one."""
    if group.cold:
        from mbperf.measure import cold

        return cold.calls(group, functions, sets)
    calls: dict[str, list[Call]] = {
        name: [partial(function, *one[0]) for one in sets] for name, function in functions.items()
    }
    if group.traffic:
        from mbperf.measure.roof import roof_call

        calls[ROOF] = [roof_call(group.traffic)]
    return {**calls, NULL: [nothing]}


def _samples(group: Group, rounds: Rounds, wrong: dict[str, str]) -> Samples:
    """What was right and undisturbed, in the order of the tables."""
    kept, dropped, noisy = rounds.kept()
    timed = {name: kept[name] for name in group.lineup() if name in kept and name not in wrong}
    faults = {name: statistics.median(rounds.page_faults[name]) for name in timed}
    return Samples(timed, rounds.inner_calls, dropped, noisy, rounds.seed, wrong, faults)


def functions_of(group: Group) -> dict[str, Callable[..., Any]]:
    """Return what is called for each contender, the control among them."""
    subject = group.contenders[group.subject]
    others = {name: fn for name, fn in group.contenders.items() if name != group.subject}
    asked = {name: group.optional[name]() for name in group.asked}
    return {group.subject: subject, CONTROL: subject, **others, **asked}


def _set_count(group: Group, contenders: int) -> int:
    """How many input sets to deal, equal in values and separately allocated."""
    return contenders if group.input_sets is None else max(2, group.input_sets)


def make(group: Group, index: int) -> Inputs:
    """Return the inputs of this number, the same values every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + index)
        return group.make_inputs()


def nothing() -> None:
    """What the clock and the loop cost by themselves."""


def compared(group: Group, calls: Mapping[str, Sequence[Call]]) -> list[tuple[str, str]]:
    """The pairs whose intervals have to become narrow: the control, and the subject against its bases."""
    pairs = [(CONTROL, group.subject), *((base, group.subject) for base in group.bases)]
    return [(base, x) for base, x in pairs if base in calls and x in calls]


def _fit(plan: Plan, group: Group, rotation: int) -> Plan:
    """The plan as this group needs it."""
    fewer = plan.min_rounds if group.min_rounds is None else max(plan.least_rounds, group.min_rounds)
    return replace(plan, multiple=rotation, min_rounds=min(plan.min_rounds, fewer))


def check(group: Group, name: str) -> str | None:
    """Run one contender without a clock and return what is wrong with it, or None.

    Args:
        group: its group.
        name: the contender; the roof and the null call compute nothing that could be wrong.

    Returns:
        The message of the disagreement, or None.

    >>> group = Group("double", "1", lambda: (3.0,), {"mine": lambda x: x + x}, lambda x: [x * 2])
    >>> check(group, "mine")
    """
    from mbperf.measure.agreement import Judge

    functions = functions_of(group)
    if name not in functions:
        return None
    inputs = [make(group, 0)]
    judge = Judge({name: inputs}, group.expected)
    return judge.disagreements({name: [partial(functions[name], *inputs[0])]}).get(name)
