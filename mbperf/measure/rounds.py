"""Interleaved rounds: every contender once per round, in an order and on inputs that favour none.

Orders come from a cyclic Latin square, permuted afresh per block, so that over a block each contender stands
once in each place. Input sets are dealt afresh every round: where a buffer happens to lie made up to 1.4 % of
difference between identical contenders that kept theirs, and none once they were dealt (1,000 rounds each).
"""

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mbperf.measure import covariates
from mbperf.measure.covariates import Covariates
from mbperf.measure.statistics import LEAST_ROUNDS, paired_ratio

# A machine that stalls does not get all its rounds.
MOST_OVERDRAFT = 3.0
# One untimed round longer than this is dear, and calls that long leave their own state behind anyway.
LONG_ROUND_S = 0.5
# A call that takes so many batches need not be timed more closely to know that one is enough.
SURELY_ENOUGH = 20
# The median of fewer rounds is at the mercy of a single interruption; batches are made shorter to have them.
ROUNDS_AIMED_AT = 30
# Slower than all others by so much: as slow as another might leave in one process and stay in the next.
MUCH_SLOWER = 1.5

Call = Callable[[], object]
Clock = Callable[[], float]


class Timer(Protocol):
    """How the calls of one contender in one round are timed; `mbperf.measure` has the wall clock's below."""

    def __call__(self, call: Call, n: int) -> float:
        """Make `n` calls, wait until their work is done, and return the seconds they took together."""


@dataclass(frozen=True)
class WallTimer:
    """Time on a clock; what a call returns is freed before the next one, inside the contender's own time."""

    clock: Clock = time.perf_counter

    def __call__(self, call: Call, n: int) -> float:
        """Make `n` calls and return the seconds they took together."""
        repeat = itertools.repeat(None, n)
        start = self.clock()
        for _ in repeat:
            call()
        return self.clock() - start


@dataclass(frozen=True)
class Pace:
    """The calls of every contender in a round, and whether an untimed one goes before them."""

    inner_calls: int
    warm: bool


@dataclass(frozen=True)
class Plan:
    """How long and how finely to measure one group.

    Args:
        budget_s: stop after this long, however wide the intervals.
        width: stop when every interval is at most this wide, relative to its ratio.
        min_rounds, max_rounds: bounds that neither overrules; undisturbed rounds at least, all at most.
        batch_s: how long the fastest contender's calls of one round should take together.
        patience_s: a group that has its least rounds neither within three budgets nor within this long, from
            the making of its inputs on, makes do with fewer.
        multiple: the calls per round are a multiple of this (the rotation of a cold group).
        seed: of the orders and of the dealing.
        least_rounds: bound on `min_rounds` where a group asks for fewer; what an interval needs by default.
        pace: what an earlier process of the group found; found out here unless given.
    """

    budget_s: float
    width: float = 0.01
    min_rounds: int = 12
    max_rounds: int = 200
    batch_s: float = 1e-3
    patience_s: float = 40.0
    multiple: int = 1
    seed: int = 0
    least_rounds: int = LEAST_ROUNDS
    pace: Pace | None = None


@dataclass
class Rounds:
    """Seconds and page faults per call of every contender in every round, and what else was seen.

    A contender that left has fewer: its seconds stand beside the first ones of the others.
    """

    seconds: dict[str, list[float]]
    page_faults: dict[str, list[float]]
    inner_calls: int
    warm: bool
    seed: int
    seen: list[Covariates] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    met: set[int] = field(default_factory=set, repr=False)

    def kept(self) -> tuple[dict[str, list[float]], int, bool]:
        """Return the undisturbed rounds, how many were dropped, and whether the group is noisy."""
        flags, noisy = covariates.disturbed(self.seen, self.round_s)
        kept = {
            name: [s for s, dropped in zip(column, flags, strict=False) if not dropped]
            for name, column in self.seconds.items()
        }
        return kept, sum(flags), noisy

    def surely_kept(self) -> int:
        """Return how many rounds will be kept however the later ones are."""
        return sum(not covariates.is_disturbed(*one) for one in zip(self.seen, self.round_s, strict=True))


def latin_square(names: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Return one block of orders: a cyclic Latin square with rows and names permuted.

    >>> square = latin_square("abc", random.Random(0))
    >>> sorted(order[0] for order in square)
    ['a', 'b', 'c']
    """
    shuffled = rng.sample(list(names), len(names))
    square = [shuffled[i:] + shuffled[:i] for i in range(len(shuffled))]
    rng.shuffle(square)
    return square


def deal(calls: Mapping[str, Sequence[Call]], rng: random.Random) -> dict[str, Call]:
    """Return one call of each contender: on which of the equal input sets it runs this round, by chance.

    As many sets as contenders are dealt without sharing. Identical contenders then differ by chance alone,
    wherever their buffers lie, so that the sign test's level is exact.

    >>> dealt = deal({"a": [int, str], "b": [int, str]}, random.Random(0))
    >>> dealt["a"] is not dealt["b"]
    True
    """
    several = [name for name, its in calls.items() if len(its) > 1]
    sets = max((len(calls[name]) for name in several), default=1)
    hands = rng.sample([index % sets for index in range(max(sets, len(several)))], len(several))
    slots = dict(zip(several, hands, strict=True))
    return {name: its[slots.get(name, 0)] for name, its in calls.items()}


def run_rounds(
    calls: Mapping[str, Sequence[Call]],
    compared: Sequence[tuple[str, str]],
    plan: Plan,
    pace: Sequence[str] = (),
    timer: Timer | None = None,
    clock: Clock = time.perf_counter,
    read: covariates.Reader = covariates.read,
    since_s: float = 0.0,
    brief: Collection[str] = (),
) -> Rounds:
    """Measure all contenders in interleaved rounds until the intervals are narrow or the budget is spent.

    Args:
        calls: the contenders; of each, one call per input set, in the same order (or just one).
        compared: (base, contender) pairs whose interval has to become narrow.
        plan: bounds on the time and on the rounds.
        pace: the contenders whose fastest sets the number of calls per round; all of them by default.
        timer: of the calls; the wall's by default.
        clock: seconds, of the budget; replaced by a fake one in the tests of this ruler.
        read: covariates; likewise.
        since_s: how long the group has taken so far; the plan's patience counts it.
        brief: contenders that leave after the least rounds if they are much slower than all that stay, and
            these would have fewer rounds for it.

    Returns:
        Rounds, seconds per call.

    >>> rounds = run_rounds({"a": [int], "b": [int]}, [("a", "b")], Plan(budget_s=9, max_rounds=12))
    >>> len(rounds.seconds["a"])
    12
    """
    start = clock()
    timer = timer or WallTimer(clock)
    rng = random.Random(plan.seed)
    first = {} if plan.pace else deal(calls, rng)
    found = plan.pace or calibrate(first, pace or list(calls), plan, timer, brief)
    rounds = Rounds(
        {name: [] for name in calls}, {name: [] for name in calls}, found.inner_calls, found.warm, plan.seed
    )
    rounds.met |= {id(call) for call in first.values()}
    names = list(calls)
    with _no_collection():
        for order, ends_block in _orders(names, plan, rng):
            before, began = read(), clock()
            _run_round(deal(calls, rng), [name for name in order if name in names], rounds, timer)
            rounds.round_s.append(clock() - began)
            rounds.seen.append(read().since(before))
            if _spent(clock() - start, since_s, rounds, plan):
                break
            if _undisturbed(rounds) < plan.min_rounds:
                continue
            # Looked at after whole blocks only: there every contender has stood in every place.
            if ends_block and _narrow(rounds, compared, plan):
                break
            if brief and rounds.surely_kept() >= plan.min_rounds and not _all_affordable(rounds, plan):
                typical_s = {name: statistics.median(rounds.seconds[name]) for name in names}
                names[:] = [name for name in names if name not in _dear(typical_s, brief)]
    return rounds


def _all_affordable(rounds: Rounds, plan: Plan) -> bool:
    """Whether the budget is enough for the most rounds with everybody in them."""
    return statistics.median(rounds.round_s) * plan.max_rounds <= plan.budget_s


def _dear(seconds: Mapping[str, float], brief: Collection[str]) -> list[str]:
    """Those of `brief` that take much longer than every other contender."""
    slowest_s = max((s for name, s in seconds.items() if name not in brief), default=0.0)
    return [name for name, s in seconds.items() if name in brief and s > MUCH_SLOWER * slowest_s]


def calibrate(
    calls: Mapping[str, Call], pace: Sequence[str], plan: Plan, timer: Timer, brief: Collection[str] = ()
) -> Pace:
    """Return the common number of calls per round, and whether an untimed one goes before them.

    The fastest contender's calls then take about `plan.batch_s`, or less where the budget would be spent
    after few rounds.
    """
    once = {name: timer(call, 1) for name, call in calls.items()}
    warm = sum(once.values()) < LONG_ROUND_S
    first = min(pace, key=lambda name: once[name])
    # Asked again: the first call of all sets up what the others find, such as threads.
    once[first] = min(once[first], timer(calls[first], 1))
    if once[first] > SURELY_ENOUGH * plan.batch_s:
        return Pace(plan.multiple, warm)
    # The first call says who may be the fastest; only they are worth a closer look.
    likely = [name for name in pace if once[name] <= 5 * once[first]]
    fastest = min(_seconds_per_call(calls[name], plan.batch_s, timer) for name in likely)
    round_s = sum(once.values()) - sum(once[name] for name in _dear(once, brief))
    affordable_s = plan.budget_s / max(plan.min_rounds, ROUNDS_AIMED_AT) * fastest / max(round_s, 1e-9)
    # However small the budget: a single call of 3 us would be half clock.
    batch_s = min(plan.batch_s, max(plan.batch_s / 10, affordable_s))
    calls_per_round = max(1, round(batch_s / max(fastest, 1e-9)))
    return Pace(-(-calls_per_round // plan.multiple) * plan.multiple, warm)


def _seconds_per_call(call: Call, enough_s: float, timer: Timer) -> float:
    """Return the least seconds per call of three tries of at least `enough_s` / 4 each."""
    n = 1
    while (seconds := timer(call, n)) * 4 < enough_s and n < 1_000_000:
        n *= 2
    return min([seconds] + [timer(call, n) for _ in range(2)]) / n


def _orders(names: list[str], plan: Plan, rng: random.Random) -> Iterator[tuple[list[str], bool]]:
    """Yield the order of each round, and whether it ends a block; each block is of who is left by then."""
    rounds = itertools.count(1)
    while True:
        square = latin_square(names, rng)
        for place, order in enumerate(square, 1):
            if next(rounds) > plan.max_rounds:
                return
            yield order, place == len(square)


def _run_round(dealt: Mapping[str, Call], order: Sequence[str], rounds: Rounds, timer: Timer) -> None:
    """One round; an untimed call first leaves caches and allocator as a loop of this contender would.

    Without it a contender would be timed on what another freed: whether malloc has to ask the system for
    pages alone moves F.cross_entropy twofold.
    """
    for name in order:
        call = dealt[name]
        if rounds.warm or id(call) not in rounds.met:
            rounds.met.add(id(call))  # what a first call sets up, such as workers, is no part of the others
            call()
        faults = covariates.page_faults()
        seconds = timer(call, rounds.inner_calls)
        rounds.page_faults[name].append((covariates.page_faults() - faults) / rounds.inner_calls)
        # A clock too coarse for a null call reads 0, which has no logarithm.
        rounds.seconds[name].append(max(seconds, 1e-9) / rounds.inner_calls)


def _spent(seconds: float, since_s: float, rounds: Rounds, plan: Plan) -> bool:
    """Whether to stop, wide intervals or not."""
    if _undisturbed(rounds) >= plan.min_rounds:
        return seconds >= plan.budget_s
    return seconds >= max(MOST_OVERDRAFT * plan.budget_s, plan.patience_s - since_s)


def _undisturbed(rounds: Rounds) -> int:
    flags, _ = covariates.disturbed(rounds.seen, rounds.round_s)
    return len(flags) - sum(flags)


def _narrow(rounds: Rounds, compared: Sequence[tuple[str, str]], plan: Plan) -> bool:
    """Whether every interval is; that of who has left becomes no narrower."""
    kept, _, _ = rounds.kept()
    staying = max(map(len, kept.values()))
    pairs = [(kept[base], kept[x]) for base, x in compared if len(kept[base]) == staying]
    return all(paired_ratio(base_s, x_s).width <= plan.width for base_s, x_s in pairs)


class _no_collection:
    """No garbage collection inside rounds; one before them."""

    def __enter__(self) -> None:
        self.was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *exception: object) -> None:
        if self.was_enabled:
            gc.enable()


def rotate(calls: Sequence[Call]) -> Call:
    """Return one call that makes the next of `calls` each time, so that none finds its data in cache."""
    if len(calls) == 1:
        return calls[0]
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call
