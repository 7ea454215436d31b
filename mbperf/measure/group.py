"""A group: contenders that do the same thing to the same inputs, checked against each other, then raced.

The A/A control ("again": the subject once more), the memory limit ("roof") and a null call ("null") join by
themselves. Every contender has an input set; which one is dealt afresh each round.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from mbperf.measure import heap
from mbperf.measure.rounds import Call, Plan, Rounds, Timer, run_rounds
from mbperf.measure.rows import CONTROL, NULL, ROOF, reference_of
from mbperf.measure.traffic import Traffic

Inputs = tuple[Any, ...]
SEED = 20190301
# F.cross_entropy holds three of the size of its input, and small blocks split what is free. 1 GiB: 0.3 s.
RESULTS_AT_ONCE, MOST_IN_ADVANCE = 8, 1 << 30
CALLS_BETWEEN, LONGEST_BETWEEN_S = 20, 0.05  # of each contender, between the judge's two looks at it


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
        traffic: the bytes that have to move; None where bytes say nothing.
        limit: a function of the inputs in the place of the roof's bare copy, where what no way can do without
            is work: the matrix products of a layer, for instance. `facts["limit"]` says in words what it is.
            Not of a cold group.
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
        also_fresh: also on fresh pages, where these make a difference; without it on recycled ones alone, for
            groups whose calls take long.
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
    limit: Callable[..., Any] | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    extra_metrics: Mapping[str, Callable[[], Mapping[str, Any]]] = field(default_factory=dict)
    optional: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    cold: bool = False
    reads: Callable[..., Sequence[Any]] | None = None
    min_rounds: int | None = None
    also_fresh: bool = True
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
        roof = [ROOF] if self.traffic or (self.limit and not self.cold) else []
        return [self.subject, CONTROL, *self.bases, *roof, NULL]

    def with_optional(self, names: Sequence[str]) -> "Group":
        """Return the group with those of its optional contenders that `names` asks for."""
        return replace(self, asked=tuple(name for name in self.optional if name in names))


@dataclass
class Samples:
    """What one process measured of one group: seconds per call, paired by round, and page faults per call.

    `warm` says whether an untimed call went before the timed ones of a round; `heap` is the state that its
    heap was held in, or "" where it was left alone; `extra_metrics` was measured outside the rounds; `failed`
    says how the process failed.
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
    warm: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass
class Judgement:
    """What was found of a group in a process of its own, before any is timed.

    `wrong` says what is wrong with a contender; `extra_metrics` are those of the contenders that are right;
    `failed` says how the process failed; `took_s` is how long it took.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    extra_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: str = ""
    took_s: float = 0.0

    def names(self, group: Group) -> list[str]:
        """Return the contenders of a group that may be timed."""
        return [] if self.failed else [name for name in names_of(group) if name not in self.wrong]


def judge(group: Group) -> Judgement:
    """Check the contenders of a group against its reference, on inputs as they are and changed in place.

    Those that are right at first are called some more times in between: who hands out old results may begin
    with a later call.

    >>> group = Group("double", "1", lambda: (3.0,), {"mine": lambda x: x + x}, lambda x: [x * 2])
    >>> judge(group).wrong
    {}
    """
    began, functions, sets = time.monotonic(), functions_of(group), _empty_sets(group)
    check = _Thorough(group, functions, sets)
    wrong = check.disagreements(functions, changes=(False,))
    right = [name for name in functions if name not in wrong]
    for name in right:
        until = time.monotonic() + LONGEST_BETWEEN_S
        for inputs in itertools.islice(itertools.cycle(sets), CALLS_BETWEEN):
            functions[name](*inputs[0])
            if time.monotonic() > until:
                break
    if right:
        wrong |= check.disagreements(right, changes=(True,))
    del check, sets  # what is measured next may take a process as much memory as all that
    its = extra_metrics(group, [name for name in right if name not in wrong])
    return Judgement(wrong, its, took_s=time.monotonic() - began)


def extra_metrics(group: Group, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Measure the figures that contenders have outside the rounds."""
    return {name: dict(group.extra_metrics[name]()) for name in names if name in group.extra_metrics}


def measure(group: Group, plan: Plan, judgement: Judgement | None = None) -> Samples:
    """Check the contenders of a group, race those that agree, and check them again.

    Args:
        group: what to measure.
        plan: how long and how finely.
        judgement: what `judge` has found of this group in another process: those that were right there race
            at once, and have to agree with the first of them afterwards, on the buffers that were timed.
            Without it they are checked against the group's reference, before and after.

    Returns:
        Samples; a contender that disagrees is in `wrong` and has no seconds.

    >>> group = Group("double", "1", lambda: (3.0,), {"mine": lambda x: x + x}, lambda x: [x * 2])
    >>> sorted(measure(group, Plan(budget_s=0.01, max_rounds=12)).seconds)
    ['again', 'mine', 'null']
    """
    from mbperf.measure import cold

    if group.measured_by:
        return group.measured_by(group, plan)
    began, functions, sets = time.monotonic(), functions_of(group), _empty_sets(group)
    if judgement:
        functions = {name: functions[name] for name in judgement.names(group)}
    check_of = _Quick if judgement else _Thorough
    wrong = dict(judgement.wrong) if judgement else {}
    checks: list[_Check] = [check_of(group, functions, sets)]
    if not judgement:
        wrong |= checks[0].disagreements(functions)
    if group.cold and not functions.keys() <= wrong.keys():
        if reason := cold.why_not():
            return Samples({}, 0, 0, False, plan.seed, wrong, not_measured=reason)
        for _ in cold.more_inputs(group, functions, sets, plan, checks[0].held_bytes()):
            checks.append(check_of(group, functions, sets))
            if not judgement:
                wrong = checks[-1].disagreements(functions) | wrong
    right = [name for name in functions if name not in wrong]
    if not right:
        return Samples({}, 0, 0, False, plan.seed, wrong)
    calls = _calls(group, {name: functions[name] for name in right}, sets)
    timer = cold.timer if group.cold else group.timer
    its_plan = _fit(plan, group, rotation=len(checks))
    recycle_for(sets[0][0])
    since_s = time.monotonic() - began
    rounds = run_rounds(
        calls, compared(group, calls), its_plan, right, timer, since_s=since_s, brief=brief(group)
    )
    for check in checks:
        wrong = check.disagreements(right) | wrong
    return _samples(group, rounds, wrong)


class _Check(Protocol):
    """Makes one more input of every set, and checks the contenders on these."""

    def disagreements(self, names: Iterable[str]) -> dict[str, str]:
        """Return what is wrong with each of these contenders that is wrong."""

    def held_bytes(self) -> int:
        """Return the memory of what is kept for the check after the rounds, beside the inputs."""


class _Thorough:
    """Against the group's reference."""

    def __init__(
        self, group: Group, functions: Mapping[str, Callable[..., Any]], sets: Sequence[list[Inputs]]
    ) -> None:
        from mbperf.measure.agreement import Judge

        inputs_of = _one_more(group, functions, sets)
        self._calls = {name: [partial(functions[name], *inputs)] for name, inputs in inputs_of.items()}
        self._judge = Judge({name: [inputs] for name, inputs in inputs_of.items()}, group.expected)
        self.held_bytes = self._judge.held_bytes

    def disagreements(self, names: Iterable[str], changes: Sequence[bool] = (False, True)) -> dict[str, str]:
        return self._judge.disagreements({name: self._calls[name] for name in names}, changes)


class _Quick:
    """Against the first contender."""

    def __init__(
        self, group: Group, functions: Mapping[str, Callable[..., Any]], sets: Sequence[list[Inputs]]
    ) -> None:
        from mbperf.measure.agreement import Agreement

        inputs_of = _one_more(group, functions, sets)
        self._calls = {name: partial(functions[name], *inputs) for name, inputs in inputs_of.items()}
        self._agreement = Agreement(inputs_of)

    def disagreements(self, names: Iterable[str]) -> dict[str, str]:
        return self._agreement.disagreements({name: self._calls[name] for name in names})

    def held_bytes(self) -> int:
        return 0


def _one_more(group: Group, names: Iterable[str], sets: Sequence[list[Inputs]]) -> dict[str, Inputs]:
    """Make one more input of every set and deal them to the contenders."""
    first = make(group, len(sets[0]))
    for one in sets:
        one.append(first if one is sets[0] else _another(group, first, len(one)))
    return {name: sets[index % len(sets)][-1] for index, name in enumerate(names)}


def _empty_sets(group: Group) -> list[list[Inputs]]:
    """As many input sets as are dealt: equal in values and separately allocated."""
    count = len(names_of(group)) if group.input_sets is None else max(2, group.input_sets)
    return [[] for _ in range(count)]


def recycle_for(inputs: Inputs) -> None:
    """Leave a recycled heap room for the results of all contenders on these inputs."""
    heap.recycle_in_advance(min(MOST_IN_ADVANCE, RESULTS_AT_ONCE * _bytes(inputs)))


def _bytes(inputs: Inputs) -> int:
    from mbperf.measure.agreement import tensors

    return sum(tensor.nbytes for tensor in tensors(inputs))


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
    if group.limit:
        calls[ROOF] = [partial(group.limit, *one[0]) for one in sets]
    elif group.traffic:
        from mbperf.measure.roof import roof_call

        calls[ROOF] = [roof_call(group.traffic)]
    return {**calls, NULL: [nothing]}


def _samples(group: Group, rounds: Rounds, wrong: dict[str, str]) -> Samples:
    """What was right and undisturbed, in the order of the tables."""
    kept, dropped, noisy = rounds.kept()
    timed = {name: kept[name] for name in group.lineup() if name in kept and name not in wrong}
    faults = {name: statistics.median(rounds.page_faults[name]) for name in timed}
    return Samples(timed, rounds.inner_calls, dropped, noisy, rounds.seed, wrong, faults, warm=rounds.warm)


def names_of(group: Group) -> list[str]:
    """Return the names of what is called, the control among them."""
    return [group.subject, CONTROL, *group.bases]


def functions_of(group: Group) -> dict[str, Callable[..., Any]]:
    """Return what is called for each contender, the control among them."""
    subject = group.contenders[group.subject]
    others = {name: fn for name, fn in group.contenders.items() if name != group.subject}
    asked = {name: group.optional[name]() for name in group.asked}
    return {group.subject: subject, CONTROL: subject, **others, **asked}


def make(group: Group, index: int) -> Inputs:
    """Return the inputs of this number, the same values every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + index)
        return group.make_inputs()


def _another(group: Group, inputs: Inputs, index: int) -> Inputs:
    """Return inputs equal to these, in memory of their own: copies where they are plain tensors."""
    import torch

    if all(type(one) is torch.Tensor for one in inputs):
        copies = tuple(one.detach().clone().requires_grad_(one.requires_grad) for one in inputs)
        if all(copy.stride() == one.stride() for copy, one in zip(copies, inputs, strict=True)):
            return copies
    return make(group, index)


def nothing() -> None:
    """What the clock and the loop cost by themselves."""


def compared(group: Group, calls: Mapping[str, Sequence[Call]]) -> list[tuple[str, str]]:
    """The pairs whose intervals have to become narrow: the control, and the subject against its bases."""
    pairs = [(CONTROL, group.subject), *((base, group.subject) for base in group.bases)]
    return [(base, x) for base, x in pairs if base in calls and x in calls]


def brief(group: Group) -> list[str]:
    """Return the contenders that need not stay for all rounds: the subject is claimed against the others."""
    return [name for name in group.bases if name != reference_of(group.bases)]


def _fit(plan: Plan, group: Group, rotation: int) -> Plan:
    """The plan as this group needs it."""
    fewer = plan.min_rounds if group.min_rounds is None else max(plan.least_rounds, group.min_rounds)
    pace = None if group.cold else plan.pace  # how many inputs a cold group has differs between processes
    return replace(plan, multiple=rotation, min_rounds=min(plan.min_rounds, fewer), pace=pace)


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
